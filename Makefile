# Everything happens in a virtual environment of this checkout's own; nothing outside it is changed.
#   PYTHON=python3.12       the interpreter to make it with
#   PIP_CONSTRAINT=FILE     pip's own variable: versions to stay within
#   PYFASTPEFT_CUDA=0|1     a CPU build | CUDA or an error (default: CUDA where there is an nvcc)
#   PYFASTPEFT_CUDA_ARCHS   such as "80;90a"
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN = $(VENV)/bin
# the build's own requirements, read from pyproject.toml so that they are written once
BUILD_REQUIRES = $(shell sed -n 's/^requires = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d ',')
# the same releases as in .pre-commit-config.yaml
TOOLS = ruff==0.17.5 clang-format==23.1.5 typos==1.52.0
CPP = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help build test mutate sanitize valgrind resources demo bench fmt lint wheel wheel-all check-aarch64 clean

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

$(BIN)/python:
	@sh build_support/check_prerequisites.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(BUILD_REQUIRES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --no-build-isolation --editable '.[test]'
	@touch $@

$(VENV)/.tools: Makefile | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(TOOLS)
	@touch $@

build: $(VENV)/.installed ## compile in place; only what changed
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace

test: build ## the test suite; ARGS="tests/ops -k nf4" for a part of it
	$(BIN)/python -m pytest $(ARGS)

mutate: build ## take each barrier and bounds guard out of the CUDA kernels in turn: a test must notice (tests/emu/mutate.py)
	$(BIN)/python tests/emu/mutate.py $(ARGS)

sanitize: $(VENV)/.installed ## the CPU kernels under AddressSanitizer, UBSan and ThreadSanitizer (tests/native)
	PATH="$(abspath $(BIN)):$$PATH" sh build_support/check_memory.sh address build/address
	PATH="$(abspath $(BIN)):$$PATH" sh build_support/check_memory.sh thread build/thread

valgrind: $(VENV)/.installed ## the CPU kernels up to AVX2 under memcheck (needs valgrind)
	PATH="$(abspath $(BIN)):$$PATH" sh build_support/check_memory.sh valgrind build/valgrind

resources: $(VENV)/.installed ## registers and shared memory of every CUDA kernel on every architecture, into csrc/README.md
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python build_support/resources.py

demo: build ## fine-tune a small language model on this machine, offline, in about 3 minutes
	$(BIN)/pyfastpeft finetune --demo $(ARGS)

bench: build ## measure this machine beside the installed peers; ARGS=--quick for two minutes (bench/README.md)
	$(BIN)/pyfastpeft bench $(ARGS)

fmt: $(VENV)/.tools ## format C++, CUDA and Python
	$(BIN)/clang-format -i $(CPP)
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .

lint: $(VENV)/.tools ## what `fmt` would change, ruff's findings, spelling
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/typos

wheel: | $(BIN)/python ## a wheel in dist/, built in isolation (CUDA where there is an nvcc or a CUDA 13 torch)
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

wheel-all: | $(BIN)/python ## the wheel with CUDA for every architecture; the compiler comes from PyPI if there is none
	PYFASTPEFT_CUDA=1 PYFASTPEFT_CUDA_ARCHS= $(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

check-aarch64: $(VENV)/.installed ## compile the kernels for 64-bit Arm (needs g++-aarch64-linux-gnu)
	PATH="$(abspath $(BIN)):$$PATH" sh build_support/check_aarch64.sh build/aarch64

clean: ## remove what was built; the virtual environment stays (rm -r $(VENV))
	rm -rf build dist *.egg-info pyfastpeft/_C.*.so
