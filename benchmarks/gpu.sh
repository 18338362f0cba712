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
sanitize() { # tool: the GPU tests of all kernels, dealt out to processes that each stop at their time
  # SANITIZE_TESTS: a file of tests, a line each, in place of all; SANITIZE_SECONDS, SANITIZE_SHARDS
  # CLSA_REFERENCES=cpu: references without kernels of cuBLAS; SANITIZE_ONLY="name ...": checks kernels so named alone
  local tool=$1 shards=${SANITIZE_SHARDS:-14} gpus folder shard pids=() ours name only=()
  for name in ${SANITIZE_ONLY:-}; do only+=(--kernel-name "kernel_substring=$name"); done
  folder=$(mktemp -d)
  mapfile -t gpus < <(if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then tr , '\n' <<< "$CUDA_VISIBLE_DEVICES"; else nvidia-smi --query-gpu=index --format=csv,noheader; fi)
  # torch's allocator would hide what lies beyond a tensor. Without it no CUDA graph can be captured, as
  # autotune's clock does.
  [ "$tool" = memcheck ] && export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  cat "${SANITIZE_TESTS:-/dev/null}" > "$folder/all"
  [ -s "$folder/all" ] || python3 -m pytest tests/kernels --ignore=tests/kernels/test_autotune.py \
    -m "gpu and not slow" --collect-only -q -p no:cacheprovider | grep :: | sort -t: -k1,1 > "$folder/all"
  split -d -n "r/$shards" "$folder/all" "$folder/shard."
  for shard in "$folder"/shard.*; do
    CUDA_VISIBLE_DEVICES=${gpus[${#pids[@]} % ${#gpus[@]}]} timeout "${SANITIZE_SECONDS:-280}" \
      compute-sanitizer --tool "$tool" "${only[@]}" --log-file "$shard.found" \
      python3 -m pytest "@$shard" -v -p no:cacheprovider > "$shard.log" 2>&1 &
    pids+=("$!:$shard")
  done
  for shard in "${pids[@]}"; do
    wait "${shard%%:*}" || echo "$tool: a shard ended with $?: $(tail -n 1 "${shard#*:}.log" | cut -c1-150)"
  done
  cat "$folder"/shard.*.found > "$out/$tool.txt"
  cat "$folder"/shard.*.log | grep -E "::.*(PASSED|FAILED|ERROR)" | sed -E 's/ +\[ *[0-9]+%\]$//' | sort > "$out/$tool.tests.txt"
  # cuBLAS' and cuDNN's kernels synchronize in ways that racecheck does not follow; the tests' references call them.
  ours=$(grep -E "Error|WARN|Invalid|hazard|ERROR SUMMARY: [1-9]" "$out/$tool.txt" | grep -vcE "nvjet|cudnn|RACECHECK SUMMARY")
  echo "$tool: $(grep -c PASSED "$out/$tool.tests.txt") of $(wc -l < "$folder/all") tests passed," \
    "$(grep -cE "FAILED|ERROR" "$out/$tool.tests.txt") failed;" \
    "$ours lines of findings outside cuBLAS and cuDNN"
  sort "$out/$tool.txt" | uniq -c | sort -rn | head -n 12
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
  [ "$ours" = 0 ] && [ "$(grep -c PASSED "$out/$tool.tests.txt")" = "$(wc -l < "$folder/all")" ]
}
for part in $parts; do
  case $part in
    tests) run tests timeout 280 python3 -m pytest tests/kernels tests/compile/test_dispatch.py -m gpu --slow -q -n 12 --dist worksteal -p no:cacheprovider ;;
    models) run models timeout 400 python3 -m pytest tests/compile/test_cuda.py -m gpu -q -n 12 --dist worksteal -p no:cacheprovider ;;
    kernels) run kernels timeout 200 python3 benchmarks/kernels.py --out "$out/kernels.json" --plot "$out/roofline.png" ;;
    first-use) run first-use timeout 200 python3 benchmarks/first_use.py ;;
    memcheck | racecheck) run "$part" sanitize "$part" ;;
    llama | dsa) run "$part" timeout 400 python3 benchmarks/decode.py --only "$part" --out "$out/$part.json" ;;
    prefill) run prefill timeout 400 python3 benchmarks/decode.py --only prefill --out "$out/prefill.json" ;;
    *) echo "unknown part: $part"; status=2 ;;
  esac
done
exit $status
