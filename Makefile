# `make demo` and `make test` set everything up themselves, in .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test test-full lint format bench info gpu-check install clean

demo: install
	$(PY) -m askew_kernels demo

test: install
	$(PY) -m pytest -m "not slow"

test-full: install
	$(PY) -m pytest

lint: install
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inl')

format: install
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/clang-format -i $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inl')

bench: install
	$(PY) -m askew_kernels bench

info: install
	$(PY) -m askew_kernels info

# With the Python that runs it: no virtual environment, no network, whatever torch >= 2.11 is there.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

install: $(VENV)/.installed

# torch first: anything that asks for torch would otherwise bring in another build of it.
$(VENV)/.requirements: constraints.txt requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-dev.txt
	touch $@

$(VENV)/.installed: $(VENV)/.requirements $(SOURCES)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info askew_kernels/_build.json askew_kernels/*.so demo-results
