#!/usr/bin/env bash
# Quantize a random model of Llama 3.1 8B's shape on a GPU, and keep the run's record.
#
#   tests/gpu/quantize_8b_shape.sh RECORD [QSUN_OPTION...]
#
# QSUN_OPTIONs for qsun's own engine: --engine qsun --set quantize.search.positions=all
#
# Run from the repository root; nothing is downloaded. Needs a CUDA GPU with 32 GB, 40 GB of memory,
# 25 GB of disk under TMPDIR, and a python3 (or PYTHON) that imports qsun's requirements; qsun
# itself is taken from here. vLLM is not needed: no load check. Four minutes on an H200.
# LAYERS=2 makes a model of two decoder blocks instead of 32: the same code in a minute.
# tests/gpu/random_model.py makes the model, its tokenizer and its texts.
set -euo pipefail

record=${1:?usage: tests/gpu/quantize_8b_shape.sh RECORD [QSUN_OPTION...]}
shift
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

work=$(mktemp -d)
nvidia-smi ${CUDA_VISIBLE_DEVICES:+--id="$CUDA_VISIBLE_DEVICES"} --query-gpu=memory.used --format=csv,noheader,nounits --loop-ms=500 >"$work/gpu.txt" &
watcher=$!
trap 'kill "$watcher" 2>/dev/null; rm -rf "$work"' EXIT

"$python" -m tests.gpu.check_turns
"$python" -m tests.gpu.random_model configs/models/llama-3.1-8b/config.json "$work/run" \
  ${LAYERS:+--layers "$LAYERS"}
"$python" -c 'import sys; sys.argv[0] = "qsun"; from qsun.cli.main import main; main()' \
  quantize "$work/run/run.yaml" --out "$work/out" --set load_check.mode=skip "$@"

mkdir -p "$(dirname "$record")"
cp "$work/out/records/quantization.json" "$record"
echo "GPU memory in use at most, by nvidia-smi: $(sort -n "$work/gpu.txt" | tail -n 1) MiB"
echo "record: $record"
