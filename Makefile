# make demo    watch a deformable network learn on real data
# make test    lint, types, half a minute of fuzzing, tests: of those with many parameters a sample, another at every commit
# make test-all  all tests, and no fuzzing
# make bench   time every operator against the peers that are installed
# make fuzz    MINUTES=10: random problems of every operator against the float64 oracles, fresh seeds
# make mutants SAMPLE=10: plant that many small faults in each part of the source and see whether the tests notice; long
# make gpu     on a machine with a GPU: tests, measurements, sanitizers, benchmarks; installs nothing, takes PYTHON as is
# make clean   remove the environment and whatever was built
#
# Each but gpu makes .venv when it is missing and installs into it only when setup.cfg or pyproject.toml changed.

PYTHON ?= python3
VENV ?= .venv
MINUTES ?= 1
SAMPLE ?= 10
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

# What a commit's sample of tests and random problems are drawn from: the same for all who test it.
COMMIT := $(or $(shell git rev-parse --short=12 HEAD 2>/dev/null),0)

# Tests start some hundred processes, each of which would compile all modules again where this is set.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all bench fuzz mutants gpu clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	$(BIN)/pydeform demo

# A core is one worker's of pytest: there several threads of PyTorch or BLAS would only wait for each other. Our own, which
# NUMBA_NUM_THREADS counts, are what is tested.
test test-all: export OMP_NUM_THREADS := 1
test test-all: export NUMBA_NUM_THREADS := $(shell getconf _NPROCESSORS_ONLN)

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror pydeform/cuda/*/*.cu pydeform/cuda/*/*.cuh benchmarks/*.cu
	$(BIN)/mypy
	PYDEFORM_TEST_DRAW=$(COMMIT) $(BIN)/python -m pytest --numprocesses=auto
	$(BIN)/python -m tests.fuzz --minutes 0.5 --first $$((0x$(COMMIT)))

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses=auto

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/bench_deform_conv2d.py
	$(BIN)/python benchmarks/bench_conv.py
	$(BIN)/python benchmarks/bench_gather.py
	$(BIN)/python benchmarks/bench_grid.py
	$(BIN)/python benchmarks/bench_roi.py

fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

mutants: $(VENV)/.installed-dev
	$(BIN)/python -m tests.mutants --sample $(SAMPLE)

# The CuPy that fits the driver, and the PyTorch to compare with, are the machine's.
gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and \
	  f"pydeform needs Python 3.10 or newer, and $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip  # that of Python 3.11 takes 20 seconds longer

# Editable, so that the next edit of a source needs no further install; setuptools warns that this mode, which type checkers
# can follow, may go one day. pip would compile all modules, of which tests read one in four: each is when it is first imported.
$(VENV)/.installed-%: setup.cfg pyproject.toml | $(BIN)/python
	@echo "installing pydeform[$*] into $(VENV) ..."
	@PYTHONWARNINGS=ignore $(PIP) --no-compile --config-settings editable_mode=compat --editable '.[$*]'
	@touch $@
