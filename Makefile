# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Nothing here reads from the Hub: models and texts are in the repository or in its test dependencies.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
TINY := examples/tiny_llama/model
DEMO := demo

.DEFAULT_GOAL := help
.PHONY: help install demo attack-demo fold-table test test-all lint format types bench train-example clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## make the virtual environment with the tested versions

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; set PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch -c constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test,lint]'
	touch $@

demo: install  ## harden the shipped model, attack it, say where the report is
	rm -rf $(DEMO)
	$(BIN)/specdef harden $(TINY) --method insert --alpha 1e4 --top-k 25 --out $(DEMO)/hardened
	$(BIN)/specdef attack $(DEMO)/hardened --control $(TINY) --expand 2x --out $(DEMO)/attack

attack-demo: install  ## the demo's attack at full length: every informed attack and a sweep below the hidden learning rate
	test -d $(DEMO)/hardened || $(BIN)/specdef harden $(TINY) --method insert --alpha 1e4 --out $(DEMO)/hardened
	$(BIN)/specdef attack $(DEMO)/hardened --control $(TINY) --steps 30 --expand 2x --expand depth:2x --expand inject \
	  --freeze-compensation --collapse --lr 1e-2 --lr 3e-3 --lr 1e-3 --lr 1e-4 --lr 1e-5 --lr 1e-6 --lr 1e-7 \
	  --out $(DEMO)/attack-full

test: install  ## the test suite (about ten minutes on two cores)
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile

test-all: install  ## the test suite with the long ones
	$(BIN)/pytest -n 2 --dist loadfile

lint: install  ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## rewrite the code as ruff formats it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## speed and memory, as ratios to cp, to torch.linalg.svd, and to a Trainer run by hand
	$(BIN)/python -m tests.benchmarks

train-example: install  ## train the shipped model again (about ten minutes)
	$(BIN)/python examples/tiny_llama/train.py --out $(DEMO)/tiny_llama

clean:  ## remove what the targets above made
	rm -rf $(DEMO) $(VENV)
