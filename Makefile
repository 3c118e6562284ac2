# `make demo` and `make test` set everything up themselves, in .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CONSTRAINTS := constraints.txt
SOURCES := setup.py pyproject.toml build_tools/backend.py askew_kernels/library.py $(shell find csrc -type f)

.PHONY: demo docs test test-full test-oldest lint format bench sass sass-check peers paper evidence readme info wheel try-wheel gpu-check install clean

# The folder of the committed rows that README.md and docs/notes.md are made from.
RESULTS := benchmarks/results/amd-zen4

demo: install
	$(PY) -m askew_kernels demo

test: install
	$(PY) -m pytest -m "not slow"

test-full: install
	$(PY) -m pytest

# With the oldest torch that is served; pip takes its CUDA build, several GB.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

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
	$(PY) -m askew_kernels bench --json bench-results/rows.json --csv bench-results/rows.csv --plot bench-results \
	    --page bench-results/README.md

# Counted without a GPU; the table in benchmarks/results/sass is made anew.
sass: install
	$(PY) -m askew_kernels sass --write

# Against that table, the architecture that most are measured on; `pytest -m slow` checks the others.
sass-check: install
	$(PY) -m askew_kernels sass --check --arch sm_90

# The libraries that bench compares with; it names those that are missing.
peers: install
	$(PY) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[peers]' --no-build-isolation

paper: install
	$(PY) -m askew_kernels paper

# Three tasks beside straight-through, LSQ and PARQ: for a GPU (days on two cores); it goes on where it was stopped.
evidence: peers
	$(PY) -m askew_kernels accuracy

readme: install
	$(PY) -m askew_kernels bench --plain --from $(RESULTS)/rows.json --plot $(RESULTS) --page $(RESULTS)/README.md \
	    --fill README.md docs/notes.md --reasons $(RESULTS)/reasons.json

# The site, in build/site: warnings, dead links and public names without a description are errors. No network.
docs: install
	rm -rf build/site
	$(PY) -m sphinx -q -b html -W --keep-going -c docs -d build/doctrees . build/site
	@echo "build/site/index.html"

info: install
	$(PY) -m askew_kernels info

# One wheel for every Python and every Linux from glibc 2.28 on, in dist/, checked; its tools live in .venv-wheel.
wheel: install
	$(PY) build_tools/make_wheel.py build

# That wheel and the source distribution in fresh environments of each Python at hand, by pip and by uv (gigabytes).
try-wheel: wheel
	$(PY) build_tools/make_wheel.py try
	$(PY) build_tools/make_wheel.py sdist

# With the Python that runs it: no virtual environment, no network, whatever torch >= 2.11 is there.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

install: $(VENV)/.installed

# torch first: anything that asks for torch would otherwise bring in another build of it.
$(VENV)/.requirements: $(CONSTRAINTS) requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -r requirements-dev.txt
	touch $@

$(VENV)/.installed: $(VENV)/.requirements $(SOURCES)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-wheel build dist *.egg-info askew_kernels/_build.json askew_kernels/*.so demo-results bench-results paper-results search-results evidence-results
