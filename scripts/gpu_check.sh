#!/usr/bin/env bash
# Builds, tests, times and profiles everything on a machine with a GPU, in one command and within ten minutes.
# Needs no network: it uses the machine's own python with torch, triton, pybind11, cmake, ninja and pytest.
#
#   scripts/gpu_check.sh               all of it; results go to benchmarks/results
#   scripts/gpu_check.sh check         build and proof only; further parts: bench, networks, profile
#   OUT=/tmp/x BUDGET=300 scripts/gpu_check.sh
#   PREBUILT=1 scripts/gpu_check.sh    with the extension module that lies in vitkernels/
#
# A failing step does not stop the ones after it; the exit code is the number of steps that failed. A step that
# cannot run here, or has no time left, is skipped: it is listed with its reason and does not count as failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

parts=" ${*:-check bench networks profile} "
python=${PYTHON:-python3}
out=$(mkdir -p "${OUT:-benchmarks/results}" && cd "${OUT:-benchmarks/results}" && pwd)
budget=${BUDGET:-570}
deadline=$((SECONDS + budget))
log=$out/gpu_check.log
: >"$log"
scratch=$(mktemp -d)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PIP_BREAK_SYSTEM_PACKAGES=1
# Peaks measured on another day, or by another user of the machine, are not today's.
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$scratch/cache}

record() { printf '%-34s %8s %5d s  %s\n' "$@" >>"$scratch/steps"; }

skip() { # NAME REASON
  echo "=== $1: skipped, $2" | tee -a "$log"
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
  local file=$scratch/${name//[^a-zA-Z0-9]/_}
  shift 2
  ((left < limit)) && limit=$left
  if ((limit < 10)); then
    skip "$name" "out of time"
    return 0
  fi
  timeout "${status[@]}" --signal=INT --kill-after=15 "$limit" "$@" >"$file" 2>&1
  code=$?
  { echo "=== $name"; cat "$file"; } >>"$log"
  echo "=== $name"
  # What failed by name, else the end.
  if ((code)); then
    grep -E '^FAILED|^ERROR|========= (Error|Invalid|Race)' "$file" | cut -c1-300 | head -n 30
    tail -n 6 "$file"
  else
    tail -n 2 "$file"
  fi
  ((SECONDS - begin >= limit)) && note="stopped at its limit"
  record "$name" "$code" $((SECONDS - begin)) "$note"
  return "$code"
}

step "build tools" 10 "$python" scripts/build_tools.py
if [[ ${PREBUILT:-} ]]; then
  skip "build" "PREBUILT is set"
else
  step "build" 160 "$python" -m pip install --no-index --no-build-isolation --no-deps --quiet -e .
fi
step "info" 30 "$python" -m vitkernels info

# What the sanitizer itself cannot do here (no permission for the device, a driver it does not know) is no
# finding of its, so a single addition goes first.
sanitizer="compute-sanitizer --error-exitcode 1"
cannot_sanitize() {
  local probe reason
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not on PATH"
  elif ! probe=$(timeout 30 $sanitizer "$python" -c 'import torch; print(torch.ones(1, device="cuda") + 1)' 2>&1); then
    echo "$probe" >>"$log"
    reason=$(grep -im 1 error <<<"$probe" || tail -n 1 <<<"$probe")
    echo "compute-sanitizer cannot run an addition here: ${reason:-no answer within 30 s}"
  fi
}

if [[ $parts == *" check "* ]]; then
  step "kernels against float64" 150 "$python" scripts/gpu_check.py check --seconds 140
  # Correctness may share the device, so these run side by side.
  step "tests (gpu)" 100 "$python" -m pytest -q -m gpu ${PYTEST_ARGUMENTS:-} tests &
  step "past element 2^31" 100 "$python" scripts/gpu_check.py far &
  cannot=$(cannot_sanitize)
  for tool in memcheck racecheck; do
    if [[ $cannot ]]; then
      skip "compute-sanitizer $tool" "$cannot"
    else
      # Without PyTorch's cache every tensor is an allocation, so that memcheck knows where it ends. racecheck
      # has no use for that, and without the cache it stops at an exception that it cannot handle.
      without_cache=()
      [[ $tool == memcheck ]] && without_cache=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1)
      step "compute-sanitizer $tool" 110 "${without_cache[@]}" "$python" scripts/gpu_check.py check \
        --prefix "$sanitizer --tool $tool --kernel-name kns=vitkernels" --backends cuda --dtypes float16 float32 \
        --most-shapes 3 --repeats 1 --seconds 100 --jobs 8 &
    fi
  done
  wait
fi

bench=(--device cuda --quiet --dtype bfloat16)
if [[ $parts == *" bench "* ]]; then
  warm_up() { # Compiles what torch.compile and Triton compile, for all operators at once; its times are no results.
    "$python" -c 'from vitkernels.bench.case import operators; print(*operators(), sep="\n")' |
      XDG_CACHE_HOME=$scratch/warm xargs -P 12 -I OP \
        "$python" -m vitkernels bench "${bench[@]}" --op OP --batch 64 --rounds 2
  }
  export -f warm_up
  step --partial "compilation" 100 bash -c "$(declare -p bench python scratch); warm_up"
  # With its default preset each: every peer, and every backend of ours.
  step --partial "bench, operators" 250 "$python" scripts/gpu_check.py bench "$out" \
    --arguments "--device cuda --dtype bfloat16 --batch 64 --rounds 9"
fi

if [[ $parts == *" networks "* ]]; then
  # torch.compile of a network takes minutes: there is time for all of them where this is the only part.
  seconds=$((deadline - SECONDS - 20))
  [[ $parts == " networks " ]] || seconds=$((seconds < 210 ? seconds : 210))
  seconds=$((seconds > 10 ? seconds : 10))
  step --partial "bench, networks" $((seconds + 10)) "$python" scripts/gpu_check.py networks "$out" \
    "efficientvit_m5 --batch 1" "efficientvit_m5 --batch 256" "medvit_small --batch 64" "ppma_t --batch 64" \
    "deit_small_patch16_224 --token-merging 13 --batch 64" \
    --arguments "--device cuda --dtype bfloat16 --rounds 9" --seconds "$seconds" --timing-seconds 40
fi

if [[ $parts == *" profile "* ]]; then
  step --partial "breakdown of networks" 60 "$python" scripts/gpu_check.py breakdown "efficientvit_m5 1" \
    "efficientvit_m5 256" "medvit_small 64" "ppma_t 64" "deit_small_patch16_224 64 13" "s2aformer_t 64"
  if command -v ncu >/dev/null; then
    step --partial "profile" 120 ncu --clock-control none --profile-from-start off --force-overwrite \
      --section SpeedOfLight --section Occupancy --section LaunchStats --section WarpStateStats \
      --section MemoryWorkloadAnalysis --export "$out/profile" "$python" scripts/gpu_check.py profiled
    ncu --import "$out/profile.ncu-rep" --page raw --csv >"$out/profile.csv" 2>>"$log"
  else
    skip "profile" "ncu is not on PATH"
  fi
fi
if [[ $parts == *" bench "* ]]; then
  step --partial "bench, every preset" $((deadline - SECONDS)) "$python" -m vitkernels bench "${bench[@]}" \
    --op window_attention --preset all --batch 1 64 --providers eager-cached sdpa vitkernels-cuda vitkernels-triton \
    --json "$out/bench_presets.json"
fi

failed=$(awk 'substr($0, 35, 9) ~ /^ *[0-9]+$/ && substr($0, 35, 9) + 0 != 0' "$scratch/steps" | wc -l)
skipped=$(grep -c ' skipped ' "$scratch/steps")
{
  "$python" scripts/gpu_check.py summary "$out"
  printf '\n%-34s %8s %7s\n' step exit time
  cat "$scratch/steps"
  echo "$failed failed, $skipped skipped; $SECONDS s"
} | tee "$out/gpu_check.txt"
rm -rf "$scratch"
exit "$failed"
