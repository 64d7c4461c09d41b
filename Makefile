# One way to run each thing. Every target sets up what it needs in .venv, or beside it.

SHELL := /bin/bash
# A Python 3.11 or 3.12 that runs; `make PYTHON=...` chooses another.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
# The version of SGLang that everything runs with; `make SGLANG=0.5.17 ...` chooses the other one that there is a patch
# for. Each has an environment of its own.
SGLANG ?= 0.5.23
VENV := .venv$(if $(filter-out 0.5.23,$(SGLANG)),-$(SGLANG))
LOCK := requirements-$(SGLANG).lock
BIN := $(VENV)/bin
# Bytecode is kept, also where the environment says otherwise: each process that a test starts would compile SGLang and
# what it imports anew, for 20 s.
unexport PYTHONDONTWRITEBYTECODE
SETUP := $(VENV)/.setup-done

# Two halves of about equal length: these run beside the rest of tests/e2e, behind the core.
BEHIND_CORE := $(addprefix tests/e2e/test_,server.py benchmarks.py neighbours.py shortage.py elastic.py leaks.py admission.py ranks.py)

.PHONY: demo test test-e2e test-core test-behind-core test-gpu test-gpu-kernels test-gpu-tokens test-gpu-scale test-gpu-memory lint bench lock setup clean

demo: $(SETUP)  ## a server, two users, four turns: make demo [MODEL=path-or-hub-id]
	$(BIN)/sglang-vtensor demo $(if $(MODEL),--model $(MODEL))

# Many small tensors in several processes: threads within an operation would only wait for each other.
test: export OMP_NUM_THREADS := 1
test: lint  ## everything that runs without a GPU
	$(MAKE) -j2 --output-sync=target test-e2e test-behind-core

test-e2e: $(SETUP)  ## SGLang's scheduler on the host backend, token for token
	$(BIN)/python -m pytest tests/e2e -q $(addprefix --ignore=,$(BEHIND_CORE)) $(ARGS)

test-behind-core: test-core  ## whole servers, and memory that comes and goes
	$(BIN)/python -m pytest $(BEHIND_CORE) -q $(ARGS)

test-core: $(SETUP)  ## kernels in a process of their own: Triton interprets, or does not, from its import on
	$(BIN)/python -m pytest tests/kernels -q $(ARGS)
	$(BIN)/python -m pytest tests/unit tests/property -q $(ARGS)

# Kernels are compiled on many cores beside servers that leave most of the GPU's memory. What is left, tests of memory
# that is shared and short, has the GPU to itself.
GPU_KERNELS := tests/gpu/test_kernels.py tests/gpu/test_vmm_cuda.py
GPU_TOKENS := tests/gpu/test_same_tokens.py tests/gpu/test_flashinfer.py
GPU_SCALE := tests/gpu/test_scale.py tests/gpu/test_shared_decode.py tests/gpu/test_deterministic.py

test-gpu:  ## on a machine with an NVIDIA GPU, in the environment at hand
	$(MAKE) -j3 --output-sync=target test-gpu-kernels test-gpu-tokens test-gpu-scale
	$(MAKE) test-gpu-memory

test-gpu-kernels:
	python3 -m pytest tests/kernels $(GPU_KERNELS) -q -n 8 $(ARGS)

test-gpu-tokens:
	python3 -m pytest $(GPU_TOKENS) -q $(ARGS)

test-gpu-scale:
	python3 -m pytest $(GPU_SCALE) -q $(ARGS)

test-gpu-memory:
	python3 -m pytest tests/gpu $(addprefix --ignore=,$(GPU_KERNELS) $(GPU_TOKENS) $(GPU_SCALE)) -q $(ARGS)

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(SETUP)  ## what needs no GPU
	$(BIN)/python -m benchmarks.host

setup: $(SETUP)

$(SETUP): pyproject.toml $(LOCK)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install -q uv
	$(BIN)/python -m uv pip install -q --python $(BIN)/python -r $(LOCK)
	$(BIN)/python -m uv pip install -q --python $(BIN)/python --no-deps --editable .
	touch $@

lock: $(SETUP)  ## resolve the versions anew: make lock, make SGLANG=0.5.17 lock
	echo 'sglang==$(SGLANG)' | $(BIN)/python -m uv pip compile -q --universal --python-version 3.11 \
		--extra test --extra bench --no-emit-index-url --no-annotate --no-header pyproject.toml - -o $(LOCK)
	sed -i '1i # Every package of a working set-up with SGLang $(SGLANG), resolved for Python 3.11 and 3.12. Made by `make lock`.' $(LOCK)

clean:
	rm -rf .venv .venv-* build dist *.egg-info
