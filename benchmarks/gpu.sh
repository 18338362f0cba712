#!/usr/bin/env bash
# One pass over everything that needs a GPU: tests, kernel timings, whole-model steps. Usage:
#   benchmarks/gpu.sh OUT [tests|models|kernels|first-use|llama|dsa|prefill|memcheck|racecheck ...]
# Logs and JSON go to the folder OUT; each part goes on when another one fails.
set -u -o pipefail
out=${1:?the folder for logs and results}; shift
parts=${*:-tests models kernels dsa llama prefill}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
status=0
run() { # name, command...
  local name=$1; shift
  echo "== $name"
  "$@" 2>&1 | tee "$out/$name.log" | tail -n 40 || { echo "== $name FAILED"; status=1; }
}
sanitize() { # tool: one process a test file
  local tool=$1 name pids=() file
  # torch's allocator would hide what lies beyond a tensor. Without it no CUDA graph can be captured, as
  # autotune's clock does.
  [ "$tool" = memcheck ] && export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for file in $(grep -l "mark.gpu\|def test.*device: str" tests/kernels/test_*.py | grep -v autotune); do
    name=$(basename "$file" .py)
    timeout "${SANITIZE_SECONDS:-280}" compute-sanitizer --tool "$tool" --error-exitcode 9 --log-file "$out/$tool.$name.txt" \
      python3 -m pytest "$file" -m "gpu and not slow" -q -p no:cacheprovider > "$out/$tool.$name.log" 2>&1 &
    pids+=("$!:$name")
  done
  local code failed=0
  for pid in "${pids[@]}"; do
    wait "${pid%%:*}"; code=$?
    [ $code -eq 0 ] || failed=1
    echo "$tool ${pid##*:}: exit $code; $(tail -n 1 "$out/$tool.${pid##*:}.log"); $(tail -n 1 "$out/$tool.${pid##*:}.txt")"
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
  return $failed
}
for part in $parts; do
  case $part in
    tests) run tests timeout 280 python3 -m pytest tests/kernels tests/compile/test_dispatch.py -m gpu --slow -q -n 12 -p no:cacheprovider ;;
    models) run models timeout 400 python3 -m pytest tests/compile/test_cuda.py -m gpu -q -n 12 -p no:cacheprovider ;;
    kernels) run kernels timeout 200 python3 benchmarks/kernels.py --out "$out/kernels.json" --plot "$out/roofline.png" ;;
    first-use) run first-use timeout 200 python3 benchmarks/first_use.py ;;
    memcheck | racecheck) run "$part" sanitize "$part" ;;
    llama | dsa) run "$part" timeout 400 python3 benchmarks/decode.py --only "$part" --out "$out/$part.json" ;;
    prefill) run prefill timeout 400 python3 benchmarks/decode.py --only prefill --out "$out/prefill.json" ;;
    *) echo "unknown part: $part"; status=2 ;;
  esac
done
exit $status
