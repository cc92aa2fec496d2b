# Everything needs only Python (3.11 to 3.13) and make; the virtual environment is made on first use.
PYTHON ?= python3
VENV   ?= .venv
DATA   ?= data/smoke
RUN    ?= runs/smoke
BIN    := $(VENV)/bin
# Torch only checks what we export; the build for CPUs is enough, and this version is the tested one.
TORCH  := torch==2.13.0

# Only what is imported is compiled, when it is: compiling all of it takes longer than the rest.
INSTALL := python -m pip install --quiet --no-compile

# On Linux with glibc, large allocations in huge pages make training on a CPU a fifth faster.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# Tests side by side, a file at a time; each process needs up to 3 GB.
PARALLEL := --numprocesses=auto --maxprocesses=4 --dist=loadfile

.DEFAULT_GOAL := help
.PHONY: help run recipe ladder distillation pruning mixing-demo test test-slow test-executorch lint format bench clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

PREPARE = $(BIN)/python -m mobilellm_jax.prepare --embedded --row_length=256 \
  --weights=code=0.4,prose=0.4,math=0.2

TRAIN = $(BIN)/python -m mobilellm_jax.train --config=configs/smoke.py \
  --config.plan=$(DATA)/mixture.json --workdir=$(RUN)

run: $(VENV)/.installed ## text -> tokenizer -> trained, resumed, sampled, exported model and its report
	$(PREPARE) --out=$(DATA) --vocab_size=2048
	$(TRAIN) --stop_at=300
	$(TRAIN)
	test -d $(RUN)/hf || $(BIN)/python -m mobilellm_jax.convert --checkpoint=$(RUN) --to=hf --out=$(RUN)/hf
	$(BIN)/python -m mobilellm_jax.generate --checkpoint=$(RUN) --prompt="def __init__(self,"
	$(BIN)/python -m mobilellm_jax.report $(RUN)

recipe: $(VENV)/.installed ## MobileLLM-R1's six stages in small: pre-training, distillation, SFT; minutes on 2 cores
	PYTHON=$(BIN)/python launch/r1_recipe.sh --size=tiny

ladder: $(VENV)/.installed ## MobileLLM's architecture ladder at small scale: about 140 runs, 90 minutes on 2 cores
	$(PREPARE) --out=data/ladder --vocab_size=512
	$(BIN)/python -m mobilellm_jax.sweep --sweep=configs/ladder.py --workdir=runs/ladder --parallel=2

distillation: $(VENV)/.installed ## does a teacher help? (MobileLLM table 16 in small): 24 runs, half an hour on 2 cores
	$(PREPARE) --out=data/ladder --vocab_size=512
	$(BIN)/python -m mobilellm_jax.train --config=configs/distillation.py:teacher --workdir=runs/distillation/teacher
	$(BIN)/python -m mobilellm_jax.teach --teacher=runs/distillation/teacher --plan=data/ladder/mixture.json \
	  --row_length=256 --top_k=16 --name=distillation --dtype=float32 --loss_chunks=2
	$(BIN)/python -m mobilellm_jax.sweep --sweep=configs/distillation.py --workdir=runs/distillation/students --parallel=2

PRUNE = $(BIN)/python -m mobilellm_jax.prune --checkpoint=runs/pruning/source --plan=data/pruning/mixture.json \
  --row_length=256 --rounds=20 --target_params=50%

pruning: $(VENV)/.installed ## pruning inside of training against its rivals, in small: 50 runs, two hours on 2 cores
	$(PREPARE) --out=data/pruning --vocab_size=2048
	$(BIN)/python -m mobilellm_jax.train --config=configs/pruning_study.py:source --workdir=runs/pruning/source \
	  --config.plan=data/pruning/mixture.json
	test -d runs/pruning/adapt || $(PRUNE) --strategy=adapt --out=runs/pruning/adapt
	test -d runs/pruning/llm_pruner || $(PRUNE) --strategy='llm_pruner:protect=(1,1)' --out=runs/pruning/llm_pruner
	test -d runs/pruning/random || $(PRUNE) --strategy=random --out=runs/pruning/random
	test -d runs/pruning/efficient || $(PRUNE) --strategy=efficient --out=runs/pruning/efficient
	$(BIN)/python -m mobilellm_jax.sweep --sweep=configs/pruning_study.py --workdir=runs/pruning/arms --parallel=2
	$(BIN)/python -m mobilellm_jax.sweep --sweep=configs/pruning_study.py:shapes --workdir=runs/pruning/shapes --parallel=2

mixing-demo: $(VENV)/.installed ## sources -> probes -> influence, leave-one-out, RegMix -> mixtures -> trained comparison and report
	$(BIN)/$(INSTALL) --constraint constraints.txt --editable '.[mixing]'
	$(PREPARE) --out=data/mixing --vocab_size=2048
	$(BIN)/python -m data_mixing.probes --embedded --out=data/mixing_probes --per_source=100 \
	  --capability=code=code --capability=language=prose --capability=math=math
	$(BIN)/python -m data_mixing.pipeline --config=configs/mixing.py --plan=data/mixing/mixture.json \
	  --probes=data/mixing_probes --out=runs/mixing

test: $(VENV)/.installed-test ## the tests, in minutes
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: $(VENV)/.installed-test ## the long tests as well: whole runs, kills, full sizes
	$(BIN)/python -m pytest -m "slow or not slow"  # one by one: some measure time and memory

test-executorch: $(VENV)-executorch/.installed ## compile and run programs for phones, in an environment of its own
	$(VENV)-executorch/bin/python -m pytest -m "slow or not slow" tests/interop/test_executorch.py

lint: $(VENV)/.installed-test ## style, types and formatting, changing nothing
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(VENV)/.installed-test ## mend style and formatting
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: $(VENV)/.installed ## speed of the stream, and time and quality of `make run`, on this machine
	$(BIN)/python -m benchmarks.stream
	$(BIN)/python -m benchmarks.smoke

clean: ## remove the environment, the prepared data and the run that `make run` made
	rm -rf $(VENV) $(VENV)-executorch $(DATA) $(RUN) build *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(VENV)/.installed: setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) --upgrade pip
	$(BIN)/$(INSTALL) --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/$(INSTALL) --constraint constraints.txt $(TORCH)
	$(BIN)/$(INSTALL) --constraint constraints.txt --editable '.[torch,gguf,onnx,eval,quantization,dev]'
	touch $@

# Of its own, because executorch and lm-eval need different versions of antlr4.
$(VENV)-executorch/.installed: setup.cfg constraints.txt
	test -x $(VENV)-executorch/bin/python || $(PYTHON) -m venv $(VENV)-executorch
	grep -v antlr4 constraints.txt > $(VENV)-executorch/constraints.txt
	$(VENV)-executorch/bin/$(INSTALL) --constraint $(VENV)-executorch/constraints.txt \
	  --editable '.[executorch,quantization]' $(TORCH) pytest
	touch $@
