# `make` lists what there is. Two commands set everything up on a fresh machine: `make demo` and `make test`.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Nothing here reads from the Hub: models and texts are in the repository or in its test dependencies.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
TINY := examples/tiny_llama/model
DEMO := demo
JOBS ?= 2
PYTEST := $(BIN)/pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install demo check lint format test test-all test-newest wheel docs schema size build clean

help:
	@awk -F ':.*## ' '/^##@ / {print "\n" substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-23s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##@ Try it, work on it
install: $(VENV)/.installed  ## make the virtual environment, tested versions

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; set PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch -c constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test,lint]'
	touch $@

# What `make demo` hardens: any directory with a checkpoint; TIME=20m for a larger one.
MODEL ?= $(TINY)
TIME ?=
# Short runs of short texts: the demo is a first impression.
SHORT := --steps 20 --batch-size 8 --sequence-length 64 --eval-every 10 --eval-sequences 32

demo: install  ## harden the shipped model and attack it (three minutes)
	rm -rf $(DEMO)/hardened $(DEMO)/attack
	$(BIN)/specdef harden $(MODEL) --out $(DEMO)/hardened
	$(BIN)/specdef attack $(DEMO)/hardened --control $(MODEL) --expand 2x $(SHORT) --jobs $(JOBS) $(addprefix --time-limit ,$(TIME)) --out $(DEMO)/attack

# Tests that need neither training nor a process of their own.
QUICK := tests/test_schemas.py tests/spectral tests/report tests/architectures tests/documentation tests/checkpoint

check: lint  ## lint and the quick tests: before every commit
	$(PYTEST) -q -m "not slow" $(QUICK)

lint: install  ## style of code and prose, and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/proselint check README.md CONTRIBUTING.md SECURITY.md CHANGELOG.md docs/*.md examples/*/README.md

format: install  ## rewrite the code as ruff formats it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: install  ## the tests (six minutes on two idle cores)
	$(PYTEST) -m "not slow"

test-all: install  ## the tests with the slow ones
	$(PYTEST)

test-newest:  ## the tests that the newest transformers may break
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/pip install --quiet torch -c constraints.txt
	$(VENV)-newest/bin/pip install --quiet --upgrade transformers -e '.[test]'
	$(VENV)-newest/bin/python -m pytest -q -m "not slow" -n 2 --dist loadfile tests/runtime tests/architectures tests/hardening

wheel: install  ## the wheel in an empty environment
	$(BIN)/pytest -q -m slow tests/packaging

docs: install  ## the pages, in build/site
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open build/site/index.html"

schema: install  ## the JSON Schemas, from their definitions
	$(BIN)/python docs/generators/json_schemas.py

size:  ## lines of the package; LIMITS=1 holds limits
	$(PYTHON) docs/generators/size.py $(if $(LIMITS),--limits)

build: install  ## source distribution and wheel, in dist/
	$(BIN)/python -m build

clean:  ## remove what was made, but not models/
	rm -rf $(DEMO) $(VENV) $(VENV)-newest build dist

include examples/measure.mk
