# Each target sets itself up: a fresh machine needs python3 (3.10+) with venv, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install -q --disable-pip-version-check
# of quickstart: one for each GPU, at most two; two on a CPU
RANKS ?= $(shell $(BIN)/python -c "import torch; print(min(2, torch.cuda.device_count()) or 2)")
# twice two cores: tests of ranks, workers and locks wait for much of their time; some 3 GB of memory for each
WORKERS ?= 4
# a file's tests stay in one worker, so that what they share is made once; in the order of tests/conftest.py
PARALLEL = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# tests marked `alone` are run apart, one of each folder at a time; no others are in these folders but a few
ALONE = tests/fault tests/slurm

.PHONY: quickstart check unit test lint docs notebooks bench dist image oldest gpu wheels clean

quickstart: $(VENV)/.installed  ## the main job on embedded data, about a minute
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node $(RANKS) -m hpc_supcon run run_dir=runs/quickstart-$$(date +%Y%m%d-%H%M%S)

check: lint unit  ## before each commit: linters, types, and the unit tests as far as they need no training

unit: $(VENV)/.installed-dev  ## with another Python: make unit VENV=.venv-3.13 PYTHON=python3.13
	$(BIN)/python -m pytest $(PARALLEL) --no-training tests/unit --ignore=tests/unit/bench

oldest:  ## the same with the oldest versions that setup.cfg allows: make oldest PYTHON=python3.10
	$(MAKE) unit VENV=.venv-oldest INSTALL='$$(BIN)/python -m pip install -q --disable-pip-version-check uv \
		&& $$(BIN)/uv pip install -q --python $$(BIN)/python --resolution lowest-direct'

test: lint $(VENV)/.installed-extras  ## the whole suite, with all that can be installed: ffcv, dali, DeepSpeed, a local Slurm
	rm -rf build/coverage && mkdir -p build/coverage
	$(BIN)/coverage run -m pytest $(PARALLEL) -m "not alone"
	$(BIN)/coverage combine -q
	@echo "percent of the package's lines that ran (more: $(BIN)/coverage report --skip-covered --sort=cover):"
	$(BIN)/coverage report --format=total
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m alone $(ALONE)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/python -m tests.tidy

docs: $(VENV)/.installed-dev  ## the documentation as a site: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

notebooks: $(VENV)/.installed-dev  ## examples/*.ipynb, executed as printed: some minutes
	$(BIN)/python -m tests.notebooks

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/loader.py

dist: $(VENV)/.installed-dev  ## source archive, and from it the wheel, both checked
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

image: dist  ## the container of the wheel, where docker is
	docker build -t hpc-supcon .

# where there is no environment here: the Python that has PyTorch, and the wheels that were copied along
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,PYTHONPATH=$(CURDIR)/wheels/site $(PYTHON))

gpu: $(if $(wildcard $(BIN)/python),,wheels/site)  ## all tests and measurements on a GPU: see benchmarks/gpu.md
	$(GPU_PYTHON) -m hpc_supcon bench gpu $(if $(DATA),--data $(DATA)) --out benchmarks/results/gpu-$$(date +%Y-%m-%d)

wheels/site: $(wildcard wheels/*.whl)
	mkdir -p $@
	$(if $^,$(PYTHON) -m pip install -q --no-index --no-deps --upgrade --target $@ $^)

WHEELS_FOR ?= 3.12
DOWNLOAD = $(PYTHON) -m pip download -q --disable-pip-version-check --dest wheels --only-binary :all: \
	--python-version $(WHEELS_FOR) --implementation cp --platform manylinux2014_x86_64 --platform any

wheels:  ## what a machine with PyTorch and no package index lacks, for its Python, WHEELS_FOR
	rm -rf wheels
	$(DOWNLOAD) pydantic
	$(DOWNLOAD) --no-deps submitit pytorch-metric-learning

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .[dev]
	touch $(VENV)/.installed $@

$(VENV)/.installed-extras: $(VENV)/.installed-dev tests/loaders/install-extras.sh tests/slurm/install-slurm.sh \
		tests/browser/install-browser.sh
	tests/loaders/install-extras.sh $(BIN)
	tests/slurm/install-slurm.sh
	tests/browser/install-browser.sh
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
