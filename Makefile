# make demo: train a small hybrid language model on this machine and look at it.
# make test: lint, types, tests. Both create .venv and install first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 4 ] && echo 4 || echo $$n)
# The GPU check waits for compilers more than for the GPU.
GPU_JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 4); [ $$n -gt 12 ] && echo 12 || echo $$n)
EXTRAS := test,triton,train,hf
STAMP := $(VENV)/.installed

# Without an NVIDIA GPU: the versions tested together on a CPU. With one, torch and triton are
# left to the resolver, which knows the driver's builds.
ifeq ($(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes),yes)
TORCH := "torch>=2.11"
CONSTRAINTS :=
else
TORCH := torch
CONSTRAINTS := -c constraints.txt
endif

# One thread a worker: several workers with all cores each only wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
ASAN := SEQMODELS_ASAN=1

.PHONY: demo test install lint kernels gpu-test slow-test asan clean

demo: install
	$(BIN)/seqmodels demo

test: lint
	$(PYTEST) -n $(JOBS) --dist worksteal -m "not gpu and not slow"

slow-test: install
	$(PYTEST) -n $(JOBS) -m slow

gpu-test: install
	$(BIN)/python tests/gpu/warm_kernels.py
	TORCHINDUCTOR_COMPILE_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m gpu -n $(GPU_JOBS) --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

install: $(STAMP) kernels

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet $(TORCH) numpy $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[$(EXTRAS)]" $(CONSTRAINTS)
	touch $@

# Recompiles what changed in csrc/, nothing otherwise; without a compiler it says so and goes on.
kernels: $(STAMP)
	$(BIN)/python setup.py --quiet build_ext --inplace

# The kernel tests under the address sanitizer, on a copy so that the installed library stays as it is. Fresh
# memory is filled with NaN, so that a value that nobody wrote shows.
asan: $(STAMP)
	rm -rf build/asan && mkdir -p build/asan
	cp -r setup.py pyproject.toml LICENSE csrc seqmodels tests build/asan/
	rm -f build/asan/seqmodels/_C*.so
	cd build/asan && $(ASAN) $(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	cd build/asan && LD_PRELOAD="$$(cc -print-file-name=libasan.so) $$(cc -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=2000000000:malloc_fill_byte=255 PYTHONPATH=. OMP_NUM_THREADS=2 \
	  $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider -m "not gpu and not slow" \
	  -k "(cpu or token_linear) and not memory" tests/ops

clean:
	rm -rf build dist *.egg-info seqmodels/_C*.so seqmodels/_CUDA*.so
