#!/usr/bin/env bash
# Creates the virtual environment of one stack, or finds that nothing is left to do.
#
#     scripts/setup.sh [onedl|openmmlab|oldest] [dev]
#
# onedl goes to .venv, the others to .venv-STACK; `dev` adds the tools of tests and checks. oldest is
# openmmlab at the oldest supported versions, on Python 3.9.
# pip's own settings (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL, ...) are left as they are.
# PYTHON names the interpreter, MAX_JOBS and CFLAGS rule the compilation of MMCV's operators.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
  echo "setup: $*" >&2
  exit 1
}

stack=${1:-onedl}
with_dev=${2:-}
venv=.venv-$stack extra=$stack
build=build pins=(common "$stack") dev_pins=(dev "dev-$stack")
pythons='3.11 to 3.13' example='PYTHON=python3.11 make setup'
case $stack in
  onedl) venv=.venv ;;
  openmmlab) ;;
  oldest)
    extra=openmmlab
    build=build-oldest pins=(oldest) dev_pins=(dev-oldest)
    pythons=3.9 example='PYTHON=python3.9 make setup STACK=oldest'
    ;;
  *) die "STACK must be onedl, openmmlab or oldest, got '$stack'." ;;
esac
[ -z "$with_dev" ] || [ "$with_dev" = dev ] || die "the second argument must be dev, got '$with_dev'."

python=${PYTHON:-python3}
py=$venv/bin/python
log=$venv/setup.log
built=$venv/mmcv # what its wheel is compiled from
mmcv=$(grep -E '^(onedl-)?mmcv==' "requirements/$stack.txt")

# The stamps hold what the environment was made from: the folder (an editable install points to
# it), the pins and this script.
made_from() { # names of requirements
  (pwd && cat setup.py scripts/setup.sh && cd requirements && cat "${@/%/.txt}") | cksum
}
base=$(made_from "$build" "${pins[@]}")
dev=$(made_from "$build" "${pins[@]}" "${dev_pins[@]}")
is_done() { # name, wanted content
  [ -x "$py" ] && [ "$(cat "$venv/$1.stamp" 2>/dev/null)" = "$2" ]
}
say_ready() {
  echo "setup: $venv holds the $stack stack${with_dev:+ and the test tools}${1:-}."
  exit 0
}
is_ready() { is_done base "$base" && { [ -z "$with_dev" ] || is_done dev "$dev"; }; }
is_ready && say_ready ', nothing to do'

# One set-up at a time. The lock also waits for a compiler that outlived a killed set-up.
if command -v flock >/dev/null; then
  exec 9>"$venv.lock"
  flock -n 9 || { echo "setup: waiting for another set-up of $venv."; flock 9; }
  is_ready && say_ready ', nothing to do'
fi

child=
stop() {
  [ -z "$child" ] || kill -- "-$child" 2>/dev/null || true
  child=
}
trap stop EXIT
trap 'stop; echo; echo "setup: interrupted, the next run goes on from here."; exit 130' INT TERM

# Runs a command with its output in the log, and tells every few seconds that it lives.
try() { # label, command...
  local label=$1 started=$SECONDS shown=$SECONDS status=0 last='' format='' period=30
  shift
  [ ! -t 1 ] || period=1
  echo "setup: $label"
  printf '\n=== %s\n' "$label" >>"$log"
  set -m # a process group of its own, so that `stop` reaches the compilers too
  "$@" >>"$log" 2>&1 </dev/null &
  child=$!
  set +m
  while kill -0 "$child" 2>/dev/null; do
    sleep 1
    if [ $((SECONDS - shown)) -ge "$period" ]; then
      shown=$SECONDS
      # What pip or ninja said last: '[12/78]' while compiling, else pip's own line.
      last=$(tail -c 20000 "$log" | tr '\r' '\n' |
        grep -oE '^ *(\[[0-9]+/[0-9]+\]|(Collecting|Downloading|Building) [^ ]+|Installing collected packages)' | tail -n 1 || true)
      format='  %d:%02d  %s\n'
      [ ! -t 1 ] || format='\r\033[K  %d:%02d  %s'
      # shellcheck disable=SC2059
      printf "$format" $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "${last#"${last%%[! ]*}"}"
    fi
  done
  [ ! -t 1 ] || printf '\r\033[K'
  wait "$child" || status=$?
  child=
  return $status
}

run() { # as `try`, and ends the set-up if the command fails
  local label=$1
  try "$@" && return
  echo "--- errors and the last lines of $log:" >&2
  tail -n 2000 "$log" | grep -E '(^|[ :])(fatal )?error:' | head -n 5 >&2 || true
  tail -n 20 "$log" >&2
  die "failed at '$label'; see $log, then run the same command again."
}

command -v "$python" >/dev/null ||
  die "no '$python' found: install Python $pythons, or name one, as in $example."
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
  die "'$python' does not run: name a working Python $pythons, as in $example."
case $stack-$version in
  oldest-3.9 | onedl-3.1[123] | openmmlab-3.1[123]) ;;
  *) die "Python $version does not go with the $stack stack: name Python $pythons, as in $example." ;;
esac

if ! "$py" -m pip --version >/dev/null 2>&1; then
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    die "$python has no venv module: install it (Debian, Ubuntu: apt install python3-venv)."
  echo "setup: creating $venv with Python $version"
  "$python" -m venv --clear "$venv" || die "could not create $venv with $python."
fi
pip() { "$py" -m pip "$1" --no-build-isolation "${@:2}"; }
: >"$log"

# -g0 takes 40 % off the compile time. With -O1 nms is 2.5 times as fast as with -O3 and the backward of
# roi_align 1.3 times as slow (docs/development.md).
export MMCV_WITH_OPS=1 CFLAGS="${CFLAGS:--g0 -O1 -DNDEBUG}"

ops_work() {
  "$py" -c "
import torch
from mmcv.ops import nms
boxes = torch.tensor([[0., 0., 9., 9.], [0., 0., 9., 8.]])
assert nms(boxes, torch.tensor([1., 0.5]), 0.5)[1].tolist() == [0]"
}

install_kept() { pip install --no-deps --force-reinstall "$kept"/*.whl; }
install_wheel() { install_kept || pip install --no-deps --only-binary :all: "$mmcv"; }

build_wheel() { # command that prepares the sources in a folder
  rm -rf "$built" && mkdir -p "$built/source" "$kept" &&
    pip download --no-deps --no-binary :all: --dest "$built" "$mmcv" &&
    tar -xzf "$built"/*.tar.gz -C "$built/source" --strip-components 1 &&
    "$@" "$built/source" &&
    pip wheel --verbose --no-deps --wheel-dir "$built" "$built/source" &&
    mv -f "$built"/*.whl "$kept" && rm -rf "$built"
}

compile_mmcv() {
  command -v "${CXX:-c++}" >/dev/null ||
    die "no C++ compiler '${CXX:-c++}' found, and $mmcv must be compiled: install one (Debian, Ubuntu: apt install g++)."
  local include
  include=$("$py" -c 'import sysconfig; print(sysconfig.get_path("include"))')
  [ -f "$include/Python.h" ] ||
    die "no Python headers in $include, and $mmcv must be compiled: install them (Debian, Ubuntu: apt install python3-dev)."
  "$py" -c '
import sys, torch
from torch.utils.cpp_extension import CUDA_HOME
sys.exit(torch.cuda.is_available() and CUDA_HOME is None)' 2>/dev/null ||
    die "a GPU is visible but no CUDA compiler: install the CUDA toolkit of torch and set CUDA_HOME, or set CUDA_VISIBLE_DEVICES= to train on the CPU."
  # One job per core, but no more than memory holds at 3 GiB per job.
  MAX_JOBS=${MAX_JOBS:-$("$py" -c '
import os
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
print(max(1, min(cores, memory // (3 * 2**30))))')}
  export MAX_JOBS
  local label="compiling the operators of $mmcv in $MAX_JOBS jobs"
  echo "setup: $mmcv comes as source: 1 to 3 minutes on 2 cores, once; longer with CUDA."
  if ! try "$label" build_wheel "$py" scripts/group_mmcv.py; then
    echo "setup: its sources do not compile in groups, see $log. One by one they take 5 to 15 minutes."
    run "$label" build_wheel :
  fi
  run "installing $mmcv" install_kept
}

if ! is_done base "$base"; then
  run 'installing torch and the build tools' pip install -r "requirements/$build.txt"
  # pip keeps no wheel that it builds from a folder. So this one is put into pip's cache, or into the
  # environment if pip has none, by what it depends on.
  cache=$("$py" -m pip cache dir 2>>"$log") || cache=$venv
  kept=$cache/wheels/psbn_mmdet/$("$py" -c '
import sys, sysconfig, torch
gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
print(sys.argv, torch.__version__, gpus, sys.implementation.cache_tag, sysconfig.get_platform())
' "$mmcv" "$CFLAGS" "${FORCE_CUDA:-}" "${TORCH_CUDA_ARCH_LIST:-}" 2>>"$log" | cksum | tr ' ' -)
  try "installing $mmcv" install_wheel || compile_mmcv
  run "installing the $stack stack" pip install -r "requirements/$stack.txt"
  if ! try "checking the operators of $mmcv" ops_work; then
    echo "setup: they were compiled for another torch or Python."
    compile_mmcv
    run "checking the operators of $mmcv" ops_work
  fi
  run 'installing psbn_mmdet' pip install -c "requirements/$stack.txt" -e ".[$extra]"
  echo "$base" >"$venv/base.stamp"
fi
if [ -n "$with_dev" ] && ! is_done dev "$dev"; then
  run 'installing the test tools' pip install -r "requirements/$stack.txt" -r "requirements/dev-$stack.txt"
  echo "$dev" >"$venv/dev.stamp"
fi
say_ready
