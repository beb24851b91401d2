# `make demo` and `make test` do all their own set-up: a virtual environment, pinned versions, the build.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find csrc vitkernels/_native* -name '*' -type f 2>/dev/null) setup.py pyproject.toml CMakeLists.txt
export VITKERNELS_BUILD_DIR ?= $(CURDIR)/build/cmake
# Without a GPU the build only has to show that every kernel compiles: for one target, since each costs as much again.
ifeq ($(shell command -v nvidia-smi),)
export VITKERNELS_CUDA_ARCHS ?= 90a-real
endif
# One process a core; waiting OpenMP threads must not take the other's.
PYTEST := OMP_WAIT_POLICY=passive $(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile

.PHONY: install test test-thorough demo bench lint format kernels clean

install: $(VENV)/.installed

$(VENV)/.tools: constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel pybind11 cmake ninja numpy
	$(PIP) torch
	touch $@

$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	$(PIP) --no-build-isolation -e '.[test]'
	touch $@

test: install
	$(PYTEST) tests -m "not thorough"
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels -k triton -m "not thorough"

test-thorough: install
	$(PYTEST) tests
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels -k triton

demo: install
	$(PY) -m vitkernels demo

bench: install
	$(PY) -m vitkernels bench --op window_attention

kernels: install
	$(PY) scripts/kernel_report.py

$(VENV)/.lint: $(VENV)/.tools
	$(PIP) ruff clang-format mypy
	touch $@

lint: install $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	find csrc \( -name '*.cu' -o -name '*.h' -o -name '*.cpp' \) | xargs $(VENV)/bin/clang-format --dry-run --Werror

format: $(VENV)/.lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	find csrc \( -name '*.cu' -o -name '*.h' -o -name '*.cpp' \) | xargs $(VENV)/bin/clang-format -i

clean:
	rm -rf build $(VENV) vitkernels.egg-info vitkernels/_native*.so
