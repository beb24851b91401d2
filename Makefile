# `make demo` and `make test` do all their own set-up: a virtual environment, pinned versions, the build.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find csrc vitkernels/_native* -name '*' -type f 2>/dev/null) setup.py pyproject.toml CMakeLists.txt
export VITKERNELS_BUILD_DIR ?= $(CURDIR)/build/cmake
# Where this is set, each of the many processes that tests start compiles all of PyTorch's Python again.
unexport PYTHONDONTWRITEBYTECODE
# Without a GPU the build only has to show that every kernel compiles: for one target, since each costs as much again.
ifeq ($(shell command -v nvidia-smi),)
export VITKERNELS_CUDA_ARCHS ?= 90a-real
endif
# Nor do instruction sets have to be fast that are not the processor's own. AVX-512 is emulated where it is missing, so
# that the tests run its kernels everywhere.
ifneq ($(shell grep -m 1 -o avx2 /proc/cpuinfo 2>/dev/null),)
export VITKERNELS_CMAKE_ARGS ?= -DVITKERNELS_OPTIMIZE_baseline=-Og \
  $(if $(shell grep -m 1 -o avx512f /proc/cpuinfo),,-DVITKERNELS_EMULATE_AVX512=ON -DVITKERNELS_OPTIMIZE_avx512=-O1)
endif
# One process a core, of one thread where a test asks for no more: two threads each would wait for each other's.
# Files keep the order of tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# What needs no other (the build, the other packages, the linters) is done side by side.
MAKEFLAGS += --jobs=3

.PHONY: install test test-thorough demo bench lint format kernels clean

install: $(VENV)/.installed $(VENV)/.packages

$(VENV)/.tools: constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel pybind11 cmake ninja
	touch $@

# All that is tested with, linters included: the extension needs none of it to build.
$(VENV)/.packages: $(VENV)/.tools constraints.txt
	$(PIP) --no-compile -r constraints.txt
	touch $@

$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

test: install
	$(PYTEST) tests -m "not thorough"
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels/test_*_triton.py -m "not thorough"

test-thorough: install
	$(PYTEST) tests
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels/test_*_triton.py

demo: install
	$(PY) -m vitkernels demo

bench: install
	$(PY) -m vitkernels bench --op window_attention

kernels: install
	$(PY) scripts/kernel_report.py

lint: $(VENV)/.packages
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	find csrc \( -name '*.cu' -o -name '*.h' -o -name '*.cpp' \) | xargs $(VENV)/bin/clang-format --dry-run --Werror

format: $(VENV)/.packages
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	find csrc \( -name '*.cu' -o -name '*.h' -o -name '*.cpp' \) | xargs $(VENV)/bin/clang-format -i

clean:
	rm -rf build $(VENV) vitkernels.egg-info vitkernels/_native*.so
