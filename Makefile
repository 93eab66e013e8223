# Everything runs from here. A fresh machine needs Python 3.11 with venv, make and git.
PYTHON ?= python3.11
UV_VERSION = 0.13.9
BIN = .venv/bin
UV = $(BIN)/uv
# A machine without a GPU takes torch's CPU build: from PIP_FIND_LINKS where that is set,
# else from the index that uv knows for it.
ifdef PIP_FIND_LINKS
MAIN_TORCH = --find-links $(PIP_FIND_LINKS)
SERVING_TORCH = --find-links $(PIP_FIND_LINKS)
else
MAIN_TORCH = --torch-backend auto
SERVING_TORCH = --torch-backend cpu
endif

.PHONY: setup bubblewrap chromium demo test lint types check interop overhead peers records loads \
  gpu-simulation example lock clean

setup: .venv/.installed .venv-serving/.installed .venv-triton/.installed bubblewrap chromium

# Generated programs run in it. Root installs it; who is not is told how, and goes on without.
bubblewrap:
	@if command -v bwrap >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ]; then \
	  apt-get install -y -q bubblewrap || { apt-get update -q && apt-get install -y -q bubblewrap; }; \
	else \
	  echo "bubblewrap is missing, generated programs cannot be run: sudo apt install bubblewrap"; \
	fi

# The report's page is tested in it.
chromium:
	@if command -v chromium >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ]; then \
	  apt-get install -y -q chromium || { apt-get update -q && apt-get install -y -q chromium; }; \
	else \
	  echo "chromium is missing, pages cannot be tested: sudo apt install chromium"; \
	fi

.venv/.installed: requirements/main.txt requirements/data.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q uv==$(UV_VERSION)
	$(UV) pip install -q --python $(BIN)/python --compile-bytecode $(MAIN_TORCH) \
	  -r requirements/main.txt
	$(UV) pip install -q --python $(BIN)/python --no-deps -r requirements/data.txt -e .
	touch $@

# Kernels for GPUs are tested by Triton's interpreter, apart: packages that find Triton want a GPU.
.venv-triton/.installed: requirements/triton.txt .venv/.installed
	rm -rf .venv-triton
	$(UV) pip install -q --python $(BIN)/python --no-deps --target .venv-triton -r requirements/triton.txt
	touch $@

# vLLM pins another compressed-tensors: an environment of its own. Compiled at once, because every
# vLLM process would otherwise compile its imports again.
.venv-serving/.installed: requirements/serving.txt .venv/.installed
	$(UV) venv -q --clear --python $(PYTHON) .venv-serving
	$(UV) pip install -q --python .venv-serving/bin/python --no-deps --compile-bytecode \
	  $(SERVING_TORCH) -r requirements/serving.txt
	touch $@

demo: setup
	$(BIN)/python examples/same_question.py
	rm -rf exports/smollm2-135m-w4
	$(BIN)/qsun quantize configs/smollm2-135m-w4.yaml
	$(BIN)/qsun inspect exports/smollm2-135m-w4
	rm -rf exports/smollm2-135m-bundle
	$(BIN)/qsun export configs/smollm2-135m-bundle.yaml --out exports/smollm2-135m-bundle
	$(BIN)/qsun verify exports/smollm2-135m-bundle
	$(BIN)/qsun evaluate exports/smollm2-135m-bundle --tasks math.seen --limit 16 \
	  --set 'evaluate.tpot_streams=[1]'

# Tests that keep time, or use both cores by themselves, have the machine to themselves; the others
# share it, the longest first.
ALONE = tests/test_smollm2.py tests/test_disaggregation.py tests/test_bench_load.py \
  $(wildcard tests/test_serve_*.py) tests/served
LONGEST = tests/test_end_to_end_tiny.py tests/test_verify_numeric.py tests/test_tune.py \
  tests/test_reference_modules.py tests/test_handoff.py
OTHERS = $(filter-out $(LONGEST) $(ALONE) tests/served/%,$(sort $(shell find tests -name 'test_*.py')))

# What is made once for all processes lies in QSUN_TESTS_FOLDER.
test: setup
	shared=$$(mktemp -d) && trap 'rm -rf "$$shared"' EXIT && export QSUN_TESTS_FOLDER="$$shared" && \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
	  $(LONGEST) $(OTHERS) && \
	$(BIN)/python -m pytest $(ALONE)

# AutoAWQ in an environment of its own; its archive is built from source, in a second.
.venv-interop/.installed: requirements/interop.txt .venv/.installed
	$(UV) venv -q --clear --python $(PYTHON) .venv-interop
	$(UV) pip install -q --python .venv-interop/bin/python --no-deps --compile-bytecode \
	  $(SERVING_TORCH) -r requirements/interop.txt
	touch $@

interop: .venv/.installed .venv-interop/.installed
	rm -rf exports/smollm2-135m-w4-gemm
	$(BIN)/qsun quantize configs/smollm2-135m-w4.yaml --format awq --out exports/smollm2-135m-w4-gemm \
	  --set load_check.mode=skip
	$(BIN)/python tests/interop/compare.py exports/smollm2-135m-w4-gemm \
	  --interop-python .venv-interop/bin/python --record docs/records/autoawq-interop.json

# vllm-router in an environment of its own; both routers over the same fake workers, two cores.
.venv-router/.installed: requirements/router.txt .venv/.installed
	$(UV) venv -q --clear --python $(PYTHON) .venv-router
	$(UV) pip install -q --python .venv-router/bin/python --no-deps --compile-bytecode \
	  -r requirements/router.txt
	touch $@

overhead: .venv/.installed .venv-router/.installed
	$(BIN)/python -m tests.serving_overhead docs/records/serving-overhead.json \
	  --vllm-router .venv-router/bin/vllm-router

# Other quantizers, which tests/compare_peers.py runs beside qsun; each pins packages of its own.
.venv-gptqmodel/.installed .venv-autoround/.installed: .venv-%/.installed: \
    requirements/peers-%.txt .venv/.installed
	$(UV) venv -q --clear --python $(PYTHON) .venv-$*
	$(UV) pip install -q --python .venv-$*/bin/python --no-deps --compile-bytecode \
	  $(SERVING_TORCH) -r requirements/peers-$*.txt
	touch $@

peers: .venv/.installed .venv-gptqmodel/.installed .venv-autoround/.installed

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

check: lint types test

# The runs behind the README's table, at full length; each leaves its record.
records: setup
	rm -rf exports/records exports/scores && mkdir -p exports/records
	for name in w4 w3; do \
	  $(BIN)/qsun quantize configs/smollm2-135m-$$name.yaml --out exports/records/$$name && \
	  cp exports/records/$$name/records/quantization.json \
	    docs/records/smollm2-135m-$$name.json || exit 1; \
	done
	$(BIN)/qsun export configs/smollm2-135m-bundle.yaml --out exports/records/bundle \
	  --set export.decode=../exports/records/w4
	$(BIN)/qsun verify exports/records/bundle --served
	cp exports/records/bundle/records/verdict.json docs/records/smollm2-135m-verdict.json
	cp exports/records/bundle/bundle.json docs/records/smollm2-135m-bundle/bundle.json
	$(BIN)/qsun evaluate exports/records/bundle --tasks math.seen,tools.simple --limit 48 \
	  --out exports/scores --set 'evaluate.tpot_streams=[]'
	cp exports/scores/records/scorecard.json docs/records/smollm2-135m-scorecard.json
	$(MAKE) example
	$(BIN)/python -m tests.served_matrix docs/records/served-matrix.json exports/records/w4
	$(BIN)/qsun quantize configs/smollm2-135m-w3.yaml --set quantize.bits=2 --out exports/records/w2
	$(BIN)/python -m tests.served_matrix docs/records/served-bits.json exports/records/w4 \
	  exports/records/w3 exports/records/w2 --modules LoRA
	$(BIN)/python -m tests.chaos exports/records/bundle docs/records/serving-chaos.json
	$(BIN)/python -m tests.chaos.salt exports/records/bundle docs/records/serving-salt.json
	$(BIN)/python -m tests.length_drift_curve exports/records/bundle \
	  docs/records/length-drift.json exports/records/w4 exports/records/w3
	$(BIN)/python docs/readme_table.py

# Load on the three systems, on this machine's processors, after `make records`: what the tools show,
# and how near the simulator comes. Decode workers share the cores here, so that pooling gains nothing.
CURVES = --curves --decode 1 --set 'batches=[1,2,3,4]' --set 'contexts=[96]' \
  --set 'prompts=[16,56,96]' --set steps=24
LOAD = --rate 0.5 --alpha 0,3 --decode 2 --set seconds=20 --set repeats=2 \
  --set prompt_tokens=fixed:56 --set output_tokens=fixed:32 --set ttft_s=2 --set tpot_s=0.1
LOAD_RECORDS = $(addprefix docs/records/loads/,bench-isolated.json bench-sun.json bench-qsun.json \
  latency-sun.json latency-qsun.json fleet.json)
loads: setup
	rm -rf exports/loads && mkdir -p exports/loads
	[ -d exports/records/sun ] || { $(BIN)/qsun export configs/smollm2-135m-bundle.yaml \
	  --out exports/records/sun --set export.decode=../exports/records/bundle/base && \
	  $(BIN)/qsun verify exports/records/sun; }
	$(BIN)/python -m tests.simulator_check docs/records/simulator-check.json exports/records/sun \
	  --seconds 45 --rates 0.5,1 --users 1,3
	$(BIN)/qsun bench exports/records/sun $(CURVES) --out exports/loads/latency-sun.json
	$(BIN)/qsun bench exports/records/bundle $(CURVES) --out exports/loads/latency-qsun.json
	$(BIN)/qsun bench exports/records/sun $(LOAD) --policy isolated --out exports/loads/isolated
	$(BIN)/qsun bench exports/records/sun $(LOAD) --out exports/loads/sun
	$(BIN)/qsun bench exports/records/bundle $(LOAD) --out exports/loads/qsun
	$(BIN)/qsun simulate exports/loads/latency-sun.json exports/loads/latency-qsun.json \
	  --ask fleet --tasks 8 --rate 8 --prompt fixed:56 --output fixed:32 --ttft-p99 2 \
	  --tpot-p99 0.1 --set 'fleet.alphas=[0,1,3]' --out exports/loads/fleet.json
	mkdir -p docs/records/loads
	for system in isolated sun qsun; do \
	  cp exports/loads/$$system/bench.json docs/records/loads/bench-$$system.json || exit 1; \
	done
	cp exports/loads/latency-sun.json exports/loads/latency-qsun.json exports/loads/fleet.json \
	  docs/records/loads
	$(MAKE) example
	$(BIN)/python docs/readme_table.py

# What follows from the loads on a GPU, on any machine: simulated beside measured, and a fleet.
GPU_LOADS = docs/records/loads-gpu
gpu-simulation: setup
	rm -f $(GPU_LOADS)/fleet.json
	$(BIN)/python -m tests.gpu.simulate_systems docs/records/gpu-simulation.json $(GPU_LOADS)
	$(BIN)/qsun simulate $(GPU_LOADS)/latency-sun.json $(GPU_LOADS)/latency-qsun.json \
	  --ask fleet --tasks 8 --prompt fixed:128 --output fixed:256 --ttft-p99 1 --tpot-p99 0.02 \
	  --rate 40 --set 'fleet.alphas=[0,1,3]' --set 'fleet.rates=[10,40]' --out $(GPU_LOADS)/fleet.json
	$(MAKE) example
	$(BIN)/python docs/readme_table.py

# The example pages, from records alone: of SmolLM2's bundle, and of three systems on one GPU.
GPU_RECORDS = $(foreach system,isolated-4 sun-1 qsun-1,$(foreach alpha,0 1 2 3,\
  $(GPU_LOADS)/$(system)-alpha-$(alpha).json)) docs/records/decode-tpot.json \
  $(addprefix $(GPU_LOADS)/,latency-sun.json latency-qsun.json fleet.json)
GPU_NOTE = All decode workers of a system and its prefill worker share one GPU. \
  Weights are random, of Llama-3.1-8B's shape.
example: setup
	rm -f docs/example-report.html docs/example-report.md docs/gpu-report.html docs/gpu-report.md
	$(BIN)/qsun report docs/records/smollm2-135m-bundle docs/records/smollm2-135m-verdict.json \
	  docs/records/smollm2-135m-scorecard.json docs/records/smollm2-135m-w4.json \
	  docs/records/decode-tpot.json $(LOAD_RECORDS) \
	  --out docs/example-report.html --markdown docs/example-report.md
	$(BIN)/qsun report $(GPU_RECORDS) --note "$(GPU_NOTE)" \
	  --out docs/gpu-report.html --markdown docs/gpu-report.md

# New pins from pyproject.toml and requirements/serving.in.
# The local part of torch's version (+cpu) is left to each machine, CUDA's libraries to torch.
LOCK = $(UV) pip compile -q --python-version 3.11 --no-annotate --no-header \
  --upgrade-package torch $(SERVING_TORCH)
lock: setup
	$(LOCK) pyproject.toml --extra dev -o requirements/main.txt
	$(LOCK) --override requirements/serving-overrides.txt requirements/serving.in \
	  -o requirements/serving.txt
	sed -i 's/^torch==\(.*\)+cpu/torch==\1/' requirements/main.txt

clean:
	rm -rf .venv .venv-serving .venv-triton .venv-interop .venv-router .venv-gptqmodel .venv-autoround
