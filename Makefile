# Two commands do all the set-up: `make demo` (the main job) and `make test` (everything the tests need, then the tests).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NTKDASK := $(abspath $(BIN))/ntkdask
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# What Numba compiles for the tests is kept with the environment, for the processes of one run and for the next run.
TEST := NUMBA_CACHE_DIR=$(abspath $(VENV))/numba-cache $(BIN)/python -m pytest

.PHONY: demo test test-slow lint bench clean

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ntkdask needs Python 3.11 or later: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# The constraint takes a CPU build of torch where one is provided; a plain one pulls several GB of CUDA.
$(VENV)/.installed-test: pyproject.toml tests/constraints.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt --editable '.[test]'
	touch $@

demo: $(VENV)/.installed
	@$(NTKDASK) data import sklearn:digits data/digits.zarr --overwrite
	@$(NTKDASK) run jobs/quickstart.toml --overwrite

test: $(VENV)/.installed-test
	$(TEST) -m "not slow" --numprocesses 2 --dist loadfile

test-slow: $(VENV)/.installed-test
	$(TEST) -m slow

lint: $(VENV)/.installed-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

bench: $(VENV)/.installed
	@$(NTKDASK) bench

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
