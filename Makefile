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
# Of a hundred random examples, how many the longest tests try (tests/effort.py); 100 before a release.
EXAMPLES ?= 30
export VTENSOR_TEST_EXAMPLES = $(EXAMPLES)

# What runs with SGLang is in four parts of about equal length; two of them run at once. A new file is in the last one.
e2e = $(addprefix tests/e2e/test_,$(addsuffix .py,$(1)))
QUICK := $(call e2e,same_tokens inert)
BEHIND_CORE := $(call e2e,server page refusals settings admission fp8 shared_decode real_model)
LONG := $(call e2e,elastic history neighbours rank_histories begun states large_states linear_host)
# Each benchmark once, small and on the host: a quarter of an hour by itself, for who changes one.
BENCHMARKS := $(call e2e,benchmarks)
LONGER := $(filter-out $(QUICK) $(BEHIND_CORE) $(LONG) $(BENCHMARKS),$(wildcard tests/e2e/test_*.py))
# The other version of SGLang: the same answers, a server, its neighbours, what is refused, its table of seams, its tree.
OTHER := 0.5.17
OTHERS := $(call e2e,server page refusals settings inert neighbours fp8) tests/unit/test_seams.py tests/unit/test_patches.py tests/property/test_tree_machine.py

.PHONY: browser demo test test-long test-e2e test-core test-behind-core test-long-1 test-long-2 test-benchmarks test-other-1 test-other-2 test-gpu test-gpu-kernels test-gpu-tokens test-gpu-scale test-gpu-memory test-gpu-sanitizer lint bench lock setup clean

demo: $(SETUP)  ## a server, two users, four turns: make demo [MODEL=path-or-hub-id]
	$(BIN)/sglang-vtensor demo $(if $(MODEL),--model $(MODEL))

# Many small tensors in several processes: threads within an operation would only wait for each other.
test test-long: export OMP_NUM_THREADS := 1
test: lint  ## what runs without a GPU, in a quarter of an hour
	$(MAKE) -j2 --output-sync=target test-e2e test-behind-core

test-long: $(SETUP)  ## the rest of it, long histories, and the other version of SGLang
	$(MAKE) -j2 --output-sync=target test-long-1 test-long-2
	$(MAKE) -j2 --output-sync=target SGLANG=$(OTHER) test-other-1 test-other-2

test-e2e: $(SETUP)  ## SGLang's scheduler on the host backend, token for token
	$(BIN)/python -m pytest $(QUICK) -q $(ARGS)

test-behind-core: test-core browser  ## whole servers
	$(BIN)/python -m pytest $(BEHIND_CORE) -q $(ARGS)

test-core: $(SETUP)  ## kernels in a process of their own: Triton interprets, or does not, from its import on
	$(BIN)/python -m pytest tests/kernels -q $(ARGS)
	$(BIN)/python -m pytest tests/unit tests/property -q $(ARGS)

test-long-1: $(SETUP)
	$(BIN)/python -m pytest $(LONG) -q $(ARGS)

test-long-2: $(SETUP)
	$(BIN)/python -m pytest $(LONGER) -q $(ARGS)

test-benchmarks: $(SETUP)  ## each benchmark, small, on the host
	$(BIN)/python -m pytest $(BENCHMARKS) -q $(ARGS)

test-other-1: $(SETUP)
	$(BIN)/python -m pytest $(call e2e,same_tokens) -q $(ARGS)

test-other-2: $(SETUP) browser
	$(BIN)/python -m pytest $(OTHERS) -q $(ARGS)

# Kernels are compiled on many cores beside servers that leave most of the GPU's memory. What is left, tests of memory
# that is shared and short, has the GPU to itself.
GPU_KERNELS := tests/gpu/test_kernels.py tests/gpu/test_vmm_cuda.py
GPU_TOKENS := tests/gpu/test_same_tokens.py tests/gpu/test_flashinfer.py tests/gpu/test_features.py
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

# Every kernel under compute-sanitizer, each in a few launches: it makes them a hundred times slower.
SANITIZED := (products_of_fp8 or contexts_in_runs or divided_and_merged or head_dim or own_runs_alone or shared_run_is_read_once
SANITIZED += or requests_come_and_leave or two_kinds_of_layers or behind_one_run or reads_nothing_behind or no_number_stays)
# Calls of CUDA that fail are not reported: PyTorch makes some on purpose.
test-gpu-sanitizer:  ## reads and writes out of bounds, on a GPU
	compute-sanitizer --error-exitcode 9 --print-limit 10 --report-api-errors no \
		python3 -m pytest tests/kernels tests/gpu/test_windows.py -k "$(SANITIZED)" -q $(ARGS)

# Asserts what all processes hold of the GPU, of which pytest's own is one: it has run no other test before.
GPU_ALONE := tests/gpu/test_occupation.py
test-gpu-memory:
	python3 -m pytest tests/gpu $(addprefix --ignore=,$(GPU_KERNELS) $(GPU_TOKENS) $(GPU_SCALE) $(GPU_ALONE)) -q $(ARGS)
	python3 -m pytest $(GPU_ALONE) -q $(ARGS)

# A Chromium for the test of the page, under any name that `tests/browser.py` looks for. Where none can be had, that
# test fails, and says so.
browser:  ## what the test of the page needs
	@for name in chromium-headless-shell chromium chromium-browser google-chrome google-chrome-stable; do \
		command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		export DEBIAN_FRONTEND=noninteractive; apt-get update -qq; \
		for name in chromium-headless-shell chromium; do \
			apt-get install -y -qq --no-install-recommends $$name >/dev/null && exit 0; done; \
	fi; echo "no Chromium here: install one for tests/e2e/test_page.py"

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(SETUP)  ## what needs no GPU
	$(BIN)/python -m benchmarks.host

setup: $(SETUP)

# An environment that has uv, which installs the rest.
define with_uv
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install -q uv
endef

$(SETUP): pyproject.toml $(LOCK)
	$(with_uv)
	$(BIN)/python -m uv pip install -q --python $(BIN)/python -r $(LOCK)
	$(BIN)/python -m uv pip install -q --python $(BIN)/python --no-deps --editable .
	touch $@

# It needs no set-up: a version that is new has no lock that one could be made from.
lock:  ## resolve the versions anew: make lock, make SGLANG=0.5.17 lock
	$(with_uv)
	echo 'sglang==$(SGLANG)' | $(BIN)/python -m uv pip compile -q --universal --python-version 3.11 \
		--extra test --extra bench --no-emit-index-url --no-annotate --no-header pyproject.toml - -o $(LOCK)
	sed -i '1i # Every package of a working set-up with SGLang $(SGLANG), resolved for Python 3.11 and 3.12. Made by `make lock`.' $(LOCK)

clean:
	rm -rf .venv .venv-* build dist *.egg-info
