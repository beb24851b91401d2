#!/usr/bin/env bash
# Builds, tests and times everything on a machine with a GPU, in one command and within ten minutes.
# Needs no network: it uses the machine's own python with torch, triton, pybind11, cmake, ninja and pytest.
#
#   scripts/gpu_check.sh               results go to benchmarks/results
#   OUT=/tmp/x BUDGET=300 scripts/gpu_check.sh
#
# A failing step does not stop the ones after it; the exit code is the number of steps that failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-python3}
out=$(mkdir -p "${OUT:-benchmarks/results}" && cd "${OUT:-benchmarks/results}" && pwd)
deadline=$((SECONDS + ${BUDGET:-570}))
log=$out/gpu_check.log
: >"$log"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 PIP_BREAK_SYSTEM_PACKAGES=1
# Peaks measured on another day, or by another user of the machine, are not today's.
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$(mktemp -d)}
steps=() failed=0

# step NAME SECONDS COMMAND...: SIGINT at its limit, so that a benchmark still writes what it has.
step() {
  local name=$1 limit=$2 begin=$SECONDS left=$((deadline - SECONDS)) code=0
  shift 2
  ((left < limit)) && limit=$left
  echo "=== $name" | tee -a "$log"
  if ((limit < 10)); then
    code=skipped
  else
    timeout --signal=INT --kill-after=15 "$limit" "$@" >"$log.step" 2>&1
    code=$?
    cat "$log.step" >>"$log"
    if ((code)); then tail -n 40 "$log.step"; else tail -n 3 "$log.step"; fi
    rm -f "$log.step"
  fi
  [[ $code == 0 ]] || failed=$((failed + 1))
  steps+=("$(printf '%-28s %8s %5d s' "$name" "$code" $((SECONDS - begin)))")
}

step "build" 200 "$python" -m pip install --no-index --no-build-isolation --no-deps --quiet -e .
step "info" 60 "$python" -m vitkernels info
step "kernels against float64" 150 "$python" scripts/gpu_check.py check
step "tests (gpu)" 150 "$python" -m pytest -q -m gpu tests
bench=("$python" -m vitkernels bench --device cuda --quiet)
step "bench, every peer" 120 "${bench[@]}" --op window_attention --preset efficientvit_m5 --batch 64 \
  --json "$out/bench_peers.json" --plot "$out/bench_peers.png"
step "bench, efficientvit_m5" 60 "${bench[@]}" --model efficientvit_m5 --batch 1 64 256 \
  --json "$out/bench_efficientvit_m5.json"
if command -v compute-sanitizer >/dev/null; then
  step "compute-sanitizer memcheck" 90 compute-sanitizer --tool memcheck --error-exitcode 1 \
    "$python" scripts/gpu_check.py check --backends cuda --dtypes float16 float32 --shapes 3 --repeats 1
  step "compute-sanitizer racecheck" 90 compute-sanitizer --tool racecheck --error-exitcode 1 \
    "$python" scripts/gpu_check.py check --backends cuda --dtypes float16 --shapes 3 --repeats 1
fi
step "bench, every preset" 240 "${bench[@]}" --op window_attention --preset all --batch 1 64 \
  --providers eager-cached sdpa vitkernels-cuda vitkernels-triton --json "$out/bench_presets.json"

{
  "$python" scripts/gpu_check.py summary "$out"
  printf '\n%-28s %8s %7s\n' step exit time
  printf '%s\n' "${steps[@]}"
  echo "$failed failed; $SECONDS s"
} | tee "$out/gpu_check.txt"
exit "$failed"
