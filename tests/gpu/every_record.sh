#!/usr/bin/env bash
# Make peers on the small Qwen3, three served systems, TPOT by format and both engines on the 8B shape.
#
#   tests/gpu/every_record.sh STATE RECORDS [PEERS_GPU]
#
# Run from the repository root; nothing is downloaded. PYTHON (or python3) imports qsun's
# requirements, QSUN_SERVING_PYTHON vLLM. What only has to be right comes first, side by side; what
# keeps time then has GPU 0 to itself. Where PEERS_GPU is another one, the peers and after them both
# engines are there meanwhile. A part that fails does not stop the others; each is kept in STATE, and
# the same command goes on.
set -euo pipefail

state=${1:?usage: tests/gpu/every_record.sh STATE RECORDS [PEERS_GPU]}
records=${2:?usage: tests/gpu/every_record.sh STATE RECORDS [PEERS_GPU]}
peers_gpu=${3:-0}
python=${PYTHON:-python3}
serving=${QSUN_SERVING_PYTHON:?names the interpreter that has vLLM}
export PYTHONUNBUFFERED=1
mkdir -p "$state" "$records"
failed=()

part() {
  local name=$1 begun=$SECONDS
  shift
  echo "$name: begins"
  if "$python" -m "$@" >>"$state/$name.log" 2>&1; then
    echo "$name: $((SECONDS - begun)) s"
  else
    echo "$name: failed after $((SECONDS - begun)) s, see $state/$name.log"
    return 1
  fi
}

peers() {
  local only=qwen3/,qwen3-first,qwen3-round,qwen3-llm,qwen3-gptq,qwen3-auto,qwen3-qsun-w
  mkdir -p "$records/peers-qwen3"
  part peers tests.gpu.compare_peers "$state/peers" --gpus "$peers_gpu" --making-gib 15 \
    --minutes 25 --only "$only" && cp "$state/peers/peers-qwen3.json" "$records/peers-qwen3"
}

both_engines() {
  part both-engines tests.gpu.compare_peers "$state/peers" --gpus "$peers_gpu" --only 8b- &&
    cp "$state/peers/8b-llmcompressor.json" "$records/gpu-8b-shape-w4.json" &&
    cp "$state/peers/8b-qsun.json" "$records/gpu-8b-shape-w4-qsun.json"
}

if [ "$peers_gpu" = 0 ]; then
  peers &
else
  {
    status=0
    peers || status=1
    both_engines || status=1
    exit $status
  } &
fi
other=$!
CUDA_VISIBLE_DEVICES=$peers_gpu part systems-make tests.gpu.serve_systems make "$state/systems" ||
  failed+=(systems-make)
if [ "$peers_gpu" = 0 ]; then
  wait "$other" || failed+=(peers)
fi
part systems tests.gpu.serve_systems run "$records/gpu-serving-systems.json" "$state/systems" \
  --seconds 10 --minutes 20 || failed+=(systems)
part decode-tpot tests.gpu.decode_tpot "$records/decode-tpot.json" "$state/tpot" \
  --vllm "$serving" --minutes 20 || failed+=(decode-tpot)
if [ "$peers_gpu" = 0 ]; then
  both_engines || failed+=(both-engines)
else
  wait "$other" || failed+=("peers or both-engines")
fi
echo "every part has ended; failed: ${failed[*]:-none}"
[ ${#failed[@]} = 0 ]
