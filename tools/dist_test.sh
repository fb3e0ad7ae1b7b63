#!/usr/bin/env bash
# Test on the GPUs of this machine, or of several: tools/dist_test.sh CONFIG CHECKPOINT GPUS [options]
# NNODES, NODE_RANK, MASTER_ADDR and PORT say where this machine stands among several.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: $0 CONFIG CHECKPOINT GPUS [options of tools/test.py]" >&2; exit 2; }

python -m torch.distributed.run \
  --nnodes="${NNODES:-1}" \
  --node_rank="${NODE_RANK:-0}" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" \
  --master_port="${PORT:-29500}" \
  --nproc_per_node="$3" \
  "$(dirname "$0")/test.py" "$1" "$2" --launcher pytorch "${@:4}"
