#!/usr/bin/env bash
# Train on the GPUs of this machine, or of several: tools/dist_train.sh CONFIG GPUS [options]
# NNODES, NODE_RANK, MASTER_ADDR and PORT say where this machine stands among several.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 CONFIG GPUS [options of tools/train.py]" >&2; exit 2; }

python -m torch.distributed.run \
  --nnodes="${NNODES:-1}" \
  --node_rank="${NODE_RANK:-0}" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" \
  --master_port="${PORT:-29500}" \
  --nproc_per_node="$2" \
  "$(dirname "$0")/train.py" "$1" --launcher pytorch "${@:3}"
