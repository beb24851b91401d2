#!/usr/bin/env bash
# Builds, tests and times everything on a machine with a GPU, in one command and within ten minutes.
# Needs no network: it uses the machine's own python with torch, triton, pybind11, cmake, ninja and pytest.
#
#   scripts/gpu_check.sh               results go to benchmarks/results
#   OUT=/tmp/x BUDGET=300 scripts/gpu_check.sh
#
# A failing step does not stop the ones after it; the exit code is the number of steps that failed. A step that
# cannot run here, or has no time left, is skipped: it is listed with its reason and does not count as failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-python3}
out=$(mkdir -p "${OUT:-benchmarks/results}" && cd "${OUT:-benchmarks/results}" && pwd)
budget=${BUDGET:-570}
deadline=$((SECONDS + budget))
log=$out/gpu_check.log
: >"$log"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 PIP_BREAK_SYSTEM_PACKAGES=1
# Peaks measured on another day, or by another user of the machine, are not today's.
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$(mktemp -d)}
steps=() failed=0 skipped=0

record() { steps+=("$(printf '%-28s %8s %5d s  %s' "$@")"); }

skip() { # NAME REASON
  echo "=== $1: skipped, $2" | tee -a "$log"
  skipped=$((skipped + 1))
  record "$1" skipped 0 "$2"
}

# step [--partial] NAME SECONDS COMMAND...: SIGINT at its limit, so that a benchmark still writes what it has.
# With --partial the command's own exit status counts when that happens: half a benchmark is no failure.
step() {
  local status=() note=""
  if [[ $1 == --partial ]]; then
    status=(--preserve-status)
    shift
  fi
  local name=$1 limit=$2 begin=$SECONDS left=$((deadline - SECONDS)) code=0
  shift 2
  ((left < limit)) && limit=$left
  if ((limit < 10)); then
    skip "$name" "out of time"
    return 0
  fi
  echo "=== $name" | tee -a "$log"
  timeout "${status[@]}" --signal=INT --kill-after=15 "$limit" "$@" >"$log.step" 2>&1
  code=$?
  cat "$log.step" >>"$log"
  if ((code)); then tail -n 40 "$log.step"; else tail -n 3 "$log.step"; fi
  ((SECONDS - begin >= limit)) && note="stopped at its limit"
  ((code)) && failed=$((failed + 1))
  record "$name" "$code" $((SECONDS - begin)) "$note"
  return "$code"
}

# The limits add up to the default budget; what a step leaves over, the last one may use.
step "build tools" 10 "$python" scripts/build_tools.py
step "build" 160 "$python" -m pip install --no-index --no-build-isolation --no-deps --quiet -e .
step "info" 20 "$python" -m vitkernels info
step "kernels against float64" 90 "$python" scripts/gpu_check.py check
step "tests (gpu)" 40 "$python" -m pytest -q -m gpu tests
bench=("$python" -m vitkernels bench --device cuda --quiet)
# With its default preset each: every peer, and every backend of ours.
for operator in window_attention cascaded_group_attention neighborhood_attention kan_linear \
  polyline_path_attention polyline_path_mask polyline_path_scan strip_attention block_sparse_linear \
  token_merge attention_with_size learnable_token_merge; do
  step --partial "bench, $operator" 13 "${bench[@]}" --op "$operator" --batch 64 --json "$out/bench_$operator.json"
done
step --partial "bench, efficientvit_m5" 40 "${bench[@]}" --model efficientvit_m5 --batch 1 64 256 \
  --json "$out/bench_efficientvit_m5.json"

# What the sanitizer itself cannot do here (no permission for the device, a driver it does not know) is no
# finding of its, so a single addition goes first.
sanitizer=(compute-sanitizer --error-exitcode 1)
cannot=""
if ! command -v compute-sanitizer >/dev/null; then
  cannot="compute-sanitizer is not on PATH"
elif ! probe=$(timeout 20 "${sanitizer[@]}" "$python" -c 'import torch; print(torch.ones(1, device="cuda") + 1)' 2>&1); then
  echo "$probe" >>"$log"
  reason=$(grep -im 1 error <<<"$probe" || tail -n 1 <<<"$probe")
  cannot="compute-sanitizer cannot run an addition here: ${reason:-no answer within 20 s}"
fi
# One tile and several; queries, keys and values in passes together and apart.
shapes=(3x5 7x7-lse 12x12-lse 12x12-wide)
for tool in memcheck racecheck; do
  if [[ $cannot ]]; then
    skip "compute-sanitizer $tool" "$cannot"
  else
    step "compute-sanitizer $tool" 35 "${sanitizer[@]}" --tool "$tool" "$python" scripts/gpu_check.py check \
      --backends cuda --dtypes float16 float32 --shapes "${shapes[@]}" --repeats 1
  fi
done
step --partial "bench, every preset" $((deadline - SECONDS)) "${bench[@]}" --op window_attention --preset all \
  --batch 1 64 --providers eager-cached sdpa vitkernels-cuda vitkernels-triton --json "$out/bench_presets.json"
rm -f "$log.step"

{
  "$python" scripts/gpu_check.py summary "$out"
  printf '\n%-28s %8s %7s\n' step exit time
  printf '%s\n' "${steps[@]}"
  echo "$failed failed, $skipped skipped; $SECONDS s"
} | tee "$out/gpu_check.txt"
exit "$failed"
