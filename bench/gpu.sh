#!/bin/bash
# What a machine with a GPU is for, in one command and within ten minutes: build, test, sanitise, benchmark.
#
#   bench/gpu.sh                       all parts in this order
#   bench/gpu.sh build bench           some of them; `build` is skipped by itself where it was done for this commit
#
#   build      a wheel for this GPU's architecture, installed as users install it, and in place for the tests
#   tests      the whole suite, device = cuda included, and the CUDA-graph and two-stream checks
#   sanitize   compute-sanitizer memcheck, racecheck, initcheck, synccheck over a small run of every kernel
#   wrappers   each cp.async / ldmatrix / mma wrapper on silicon against its plain statement
#   bench      the benchmarks of bench/gpu, peers side by side; JSON and a table
#   llama      a whole Llama of the 8 B shape, training and decoding; not among the parts by default, as it takes minutes
#
# OUT=FOLDER     where logs and JSON go (default: bench/results/gpu)
# PEERS=FOLDER   wheels of peers that this machine lacks (bitsandbytes, torchao): installed beside, never into, the rest
# PYTHON=python3 the interpreter; it brings torch with CUDA. Needs no network.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD
OUT=${OUT:-$root/bench/results/gpu}
PYTHON=${PYTHON:-python3}
parts=${*:-build tests sanitize wrappers bench}
mkdir -p "$OUT"
site=$root/build/gpu-site
failed=()

capability=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || {
  echo "gpu.sh: no CUDA device that torch can use; nvidia-smi says:" >&2
  nvidia-smi >&2
  exit 2
}
[ "$capability" = 90 ] && capability=90a
export PYFASTPEFT_CUDA=1 PYFASTPEFT_CUDA_ARCHS=$capability PYTHONUNBUFFERED=1
export PYTHONPATH=$root/build/gpu-peers:$site${PYTHONPATH:+:$PYTHONPATH}
jobs=$(nproc)
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$OUT/gpu.txt"

# part NAME SECONDS COMMAND…: runs it, keeps its log, remembers a failure and goes on
part() {
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  local rc=$?
  tail -n "${TAIL:-4}" "$OUT/$name.log"
  echo "== $name: $([ $rc = 0 ] && echo ok || echo "FAILED ($rc)") in $((SECONDS - begin)) s"
  [ $rc = 0 ] || failed+=("$name")
  return $rc
}

peers() {
  [ -n "${PEERS:-}" ] && [ ! -d build/gpu-peers ] || return 0
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target build/gpu-peers "$PEERS"/*.whl
}

build() {
  local commit
  commit=$(git rev-parse HEAD 2>/dev/null || echo unknown)
  if [ "$(cat build/gpu-commit 2>/dev/null)" = "$commit" ] && [ -z "$(git status --porcelain -uno 2>/dev/null)" ]; then
    echo "build: done before for $commit"
    return 0
  fi
  rm -rf "$site"
  "$PYTHON" -m pip install -q --no-build-isolation --no-deps --no-index --target "$site" . &&
    (cd / && "$PYTHON" -c 'import pyfastpeft; print(pyfastpeft.__file__, pyfastpeft.build_info())') &&
    "$PYTHON" setup.py -q build_ext --inplace && echo "$commit" >build/gpu-commit
}

sanitize() {
  local tool ours rc=0
  for tool in memcheck racecheck initcheck synccheck; do
    echo "-- $tool"
    ours=(--kernel-name kernel_substring=pyfastpeft)  # torch's kernels are not ours to judge,
    [ "$tool" = initcheck ] && ours=()                # but what they have written it must see
    # each tensor is an allocation of its own, so that bounds are real
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=$root:$PYTHONPATH compute-sanitizer --tool "$tool" "${ours[@]}" \
      --error-exitcode 9 --print-limit 20 "$PYTHON" bench/gpu/small_run.py || rc=1
  done
  return $rc
}

bench() {
  local file name rc=0
  for file in bench/gpu/bench_*.py; do
    name=$(basename "$file" .py)
    PYTHONPATH=$root:$PYTHONPATH timeout 120 "$PYTHON" "$file" --json "$OUT/${name#bench_}.json" || rc=1
  done
  return $rc
}

llama() { PYTHONPATH=$root:$PYTHONPATH "$PYTHON" bench/gpu/llama.py --json "$OUT/llama.json"; }

tests() {
  "$PYTHON" -m pytest -q --maxfail=30 -n "$((jobs > 8 ? 8 : jobs))" -k cuda tests/ops
  local rc=$?
  "$PYTHON" -m pytest -q -n "$((jobs > 8 ? 8 : jobs))" tests || rc=1
  PYTHONPATH=$root:$PYTHONPATH "$PYTHON" bench/gpu/graph_and_streams.py || rc=1
  return $rc
}

wrappers() { "$PYTHON" -m pytest -q -rA -k cuda tests/emu/test_wrappers.py; }

export root site PYTHON OUT jobs
export -f build tests sanitize wrappers bench llama
peers || failed+=(peers)
for name in $parts; do
  case $name in
    build) TAIL=4 part build 240 bash -c build || break ;;
    tests) TAIL=12 part tests 300 bash -c tests ;;
    sanitize) TAIL=12 part sanitize 240 bash -c sanitize ;;
    wrappers) TAIL=12 part wrappers 60 bash -c wrappers ;;
    bench) TAIL=60 part bench 300 bash -c bench ;;
    llama) TAIL=40 part llama 540 bash -c llama ;;
    *) echo "gpu.sh: unknown part '$name', expected build, tests, sanitize, wrappers, bench or llama" >&2; exit 2 ;;
  esac
done
[ ${#failed[@]} = 0 ] && echo "gpu.sh: all of '$parts' passed" || { echo "gpu.sh: failed: ${failed[*]}"; exit 1; }
