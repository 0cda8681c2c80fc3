# Each target sets itself up: a fresh machine needs python3 (3.10+) with venv, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RANKS ?= 2
WORKERS ?= 2
# a file's tests stay in one worker, so that what they share is made once
PARALLEL = -n $(WORKERS) --dist loadfile
# tests of signals, of many processes and of what a crash leaves: they have the machine to themselves, one at a time
ALONE = tests/fault tests/slurm

.PHONY: quickstart check test lint bench clean

quickstart: $(VENV)/.installed  ## the main job on embedded data: two ranks, about a minute
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node $(RANKS) -m hpc_supcon run run_dir=runs/quickstart-$$(date +%Y%m%d-%H%M%S)

check: lint  ## before each commit: linters, types, and the unit tests as far as they need no training
	$(BIN)/python -m pytest $(PARALLEL) --no-training tests/unit --ignore=tests/unit/bench

test: lint $(VENV)/.installed-extras  ## the whole suite, with all that can be installed: ffcv, dali, DeepSpeed, a local Slurm
	$(BIN)/python -m pytest $(PARALLEL) $(ALONE:%=--ignore=%)
	$(BIN)/python -m pytest $(ALONE)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/loader.py

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-dev: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .[dev]
	touch $(VENV)/.installed $@

$(VENV)/.installed-extras: $(VENV)/.installed-dev tests/loaders/install-extras.sh tests/slurm/install-slurm.sh
	tests/loaders/install-extras.sh $(BIN)
	tests/slurm/install-slurm.sh
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
