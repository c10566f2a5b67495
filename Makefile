# make demo    set up and train          make test    set up and test
# make check   ruff, types, floors       make gate    the recipe's full learning gate (a quarter of an hour)
# Your own pip settings are honoured (PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf). PYTHON=… chooses the interpreter.

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
  "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt

.PHONY: demo test slow check gate clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.ready
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no recipes/ppo_gpt2.py $(ARGS)

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n 2 -m "not slow and not learning" $(ARGS)

slow: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m "slow or learning" $(ARGS)

check: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

gate: $(VENV)/.ready-test
	$(BIN)/python tests/learning/gate.py --full

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "hfpg needs Python 3.11 or newer with its venv module (on Debian: apt-get install python3-venv); none was found. Name one with: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.ready-test: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
