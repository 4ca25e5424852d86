# Every target does its own set-up in .venv; nothing needs to be installed by hand but Python >= 3.10.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1
RUN := runs/quickstart
SHARDS := shards/quickstart
ON_GPU := python -c 'import torch; raise SystemExit(not torch.cuda.is_available())'
# NCCL refuses two ranks on one GPU.
RANKS := import torch; print(min(2, torch.cuda.device_count() or 2))

SCRIPTS := .ci/run $(wildcard benchmarks/gpu/*.sh launchers/slurm/*)

# transformers by major version, for tests/unit/test_huggingface.py; beside .venv's packages, with whose torch they run.
TRANSFORMERS_4 := transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.2 requests urllib3 idna certifi charset-normalizer
TRANSFORMERS_5 := transformers==5.24.0 tokenizers==0.23.3 huggingface-hub==2.4.0
ACCELERATE := accelerate==1.12.0

.PHONY: help setup quickstart test test-all transformers gpu gpu-kernels lint types clean

help:
	@echo "make quickstart  set-up, shards from shards/sample, pretrain on 2 processes (1 with one GPU), report:"
	@echo "                 about four minutes on two CPU cores, set-up included"
	@echo "make test        set-up and the fast tests, where there is a GPU those on it too"
	@echo "make test-all    set-up and every test; takes long"
	@echo "make transformers  transformers 4 and 5 with what their Trainer wants, which test-all then tests with exports"
	@echo "make gpu         without set-up: all that only a GPU can answer, in 9 minutes (docs/gpu.md); ARGS=... are its options"
	@echo "make gpu-kernels the same of Triton's kernels (ops.backend=triton), in 5 minutes"
	@echo "make lint types  ruff, shellcheck and mypy"

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: setup
	@test ! -e $(RUN) || echo "$(RUN) is kept, and goes on from its newest checkpoint; 'rm -r $(RUN)' for a new run"
	test -e $(SHARDS) || python shards/build.py shards/sample/*.fa.gz --bed shards/sample/splits.bed --allow-copies 0.05 --out $(SHARDS)
	python shards/verify.py $(SHARDS) --fasta shards/sample/*.fa.gz
	deepspeed --num_gpus $$(python -c '$(RANKS)') launchers/pretrain.py --config configs/quickstart.yaml
	python launchers/evaluate.py $(RUN) --must-beat-order 5
	@echo "loss curve: $(RUN)/report.png"

# Two files at a time: tests of several ranks wait for one another about as long as they compute. Apart from those of one
# process, because they leave kinds of layers and processes behind that these would see.
test: setup
	python -m pytest -m "not slow" -n 2 --dist loadfile tests/unit
	python -m pytest -m "not slow" -n 2 --dist loadfile --ignore tests/unit
	if $(ON_GPU); then python -m pytest -m gpu; fi

test-all: setup
	python -m pytest
	if $(ON_GPU); then python -m pytest -m gpu; fi

transformers: setup
	pip install --quiet --no-deps --upgrade --target .venv/transformers-4 $(TRANSFORMERS_4) $(ACCELERATE)
	pip install --quiet --no-deps --upgrade --target .venv/transformers-5 $(TRANSFORMERS_5) $(ACCELERATE)

# With the Python that is there, .venv's or the machine's own: a GPU machine may have no network to set anything up.
gpu:
	$(PYTHON) launchers/gpu_check.py $(ARGS)

gpu-kernels:
	$(PYTHON) launchers/gpu_check.py --parts kernels around across --total 300 $(ARGS)

lint: setup
	ruff check .
	shellcheck --external-sources $(SCRIPTS)

types: setup
	mypy

clean:
	rm -rf .venv runs shards/quickstart
