# What a machine with Python >= 3.11, a C compiler and make can do here. `make help` lists it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TESTS := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest

# Empty files that say: this environment was installed from the lock files as they are now.
RUNTIME := $(VENV)/.loratune-runtime
DEV := $(VENV)/.loratune-dev

.DEFAULT_GOAL := help
.PHONY: help demo check test test-slow test-gpu fix docs lock wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(RUNTIME) ## the main job on the shipped models and data: no GPU, no network, minutes
	$(BIN)/loratune demo

check: $(DEV) ## format, lint, types, import layers, docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: check ## check, and the default tests
	$(TESTS) -n 2

test-slow: $(DEV) ## every proof at full size
	$(TESTS) -n 2 -m slow

test-gpu: $(DEV) ## what needs a CUDA device
	$(BIN)/python -m pytest -m gpu

fix: $(DEV) ## format, and repair what lint can repair
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(DEV) ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lock: $(DEV) ## write requirements/*.txt anew from what is installed
	$(BIN)/python requirements/lock.py

wheel: $(DEV) ## the package as a wheel, in dist/
	$(BIN)/python -m build --no-isolation --wheel

clean: ## remove the environment and all that was built
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "$(PYTHON) is no Python 3.11 to 3.13; name one: make PYTHON=python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): requirements/lock.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/lock.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --no-deps --no-build-isolation --editable .
	touch $@

$(DEV): requirements/dev-lock.txt $(RUNTIME)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/dev-lock.txt
	touch $@
