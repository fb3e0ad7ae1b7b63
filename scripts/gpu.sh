#!/usr/bin/env bash
# Runs benchmarks/gpu.py on a machine that has a GPU, Python and torch, but no network.
#
#     scripts/gpu.sh pack WHEELS [CIFAR]    # here: what it needs, into .gpu, and what that weighs
#     scripts/gpu.sh run [OPTIONS]          # there, in a copy of this folder: install, measure
#
# WHEELS is a folder with the wheels of MMEngine, MMDetection and what they need beside torch, for
# the Python there, and MMCV's source. CIFAR has train.zip and test.zip, JPEGs in folders of their
# classes. OPTIONS are those of benchmarks/gpu.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
most=64 # MiB

die() {
  echo "gpu: $*" >&2
  exit 1
}

pack() {
  [ $# -ge 1 ] || die "name the folder with the wheels: scripts/gpu.sh pack WHEELS [CIFAR]"
  ls "$1"/*.whl "$1"/*mmcv*.tar.gz >/dev/null || die "$1 must hold wheels and MMCV's source."
  rm -rf .gpu && mkdir .gpu
  cp "$1"/*.whl "$1"/*mmcv*.tar.gz .gpu
  if [ $# -ge 2 ]; then
    [ -f "$2/train.zip" ] && [ -f "$2/test.zip" ] || die "$2 must hold train.zip and test.zip."
    # A JPEG of 32 x 32 pixels is mostly its header, the same in all: packed together they are a
    # third of what they are one by one.
    python3 - "$2" <<'PY'
import lzma, sys, zipfile
from pathlib import Path
for name in ('train.zip', 'test.zip'):
    with zipfile.ZipFile(Path(sys.argv[1], name)) as old, lzma.open(f'.gpu/{name}.xz', 'w') as out:
        with zipfile.ZipFile(out, 'w') as new:  # nothing is compressed in it
            for image in sorted(old.namelist()):
                if image.endswith('.jpg'):
                    new.writestr(zipfile.ZipInfo(image), old.read(image))
PY
  fi
  list
}

list() { # what travels
  local tree packed
  tree=$(git ls-files -z --cached --others --exclude-standard | xargs -0 cat | wc -c)
  packed=$(cat .gpu/* | wc -c)
  du -b .gpu/* | awk '{ printf "%7.2f MiB  %s\n", $1 / 2^20, $2 }'
  awk -v tree="$tree" -v packed="$packed" -v most=$most 'BEGIN {
    printf "%7.2f MiB  this folder, what git knows and does not ignore\n", tree / 2^20
    printf "%7.2f MiB  together, of %d at most\n", (tree + packed) / 2^20, most
    exit tree + packed > most * 2^20
  }' || die "more than $most MiB."
}

run() {
  [ -d .gpu ] || die "no folder .gpu: scripts/gpu.sh pack makes it."
  local site start=$SECONDS
  site=$(mktemp -d)
  tell() { echo "gpu: $1, $((SECONDS - start)) s"; }
  install() { python3 -m pip install -q --no-index --no-deps --no-compile --target "$site/packages" "$@"; }
  export PYTHONPATH="$site/packages${PYTHONPATH:+:$PYTHONPATH}"
  install .gpu/*.whl
  python3 -c 'import matplotlib, mmengine, pycocotools, safetensors, scipy, torchvision'
  tell 'wheels installed'
  if [ -f .gpu/train.zip.xz ]; then
    mkdir "$site/cifar"
    for name in train test; do
      python3 -c '
import lzma, shutil, sys
shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], "wb"))' ".gpu/$name.zip.xz" "$site/cifar/$name.zip"
    done
    set -- --cifar "$site/cifar" "$@"
    tell 'CIFAR-10 unpacked'
  fi
  mkdir "$site/mmcv"
  tar -xzf .gpu/*mmcv*.tar.gz -C "$site/mmcv" --strip-components 1
  python3 scripts/group_mmcv.py "$site/mmcv"
  # For the CPU alone: MMCV's CUDA operators take minutes, and gpu.py does without.
  CUDA_VISIBLE_DEVICES='' MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} CFLAGS='-g0 -O1 -DNDEBUG' \
    install --no-build-isolation "$site/mmcv"
  tell "MMCV's operators compiled"
  python3 benchmarks/gpu.py "$@"
  tell 'done'
}

case ${1:-} in
  pack | run) "$@" ;;
  *) die "pack or run, see the head of $0." ;;
esac
