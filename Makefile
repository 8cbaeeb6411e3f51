# everything runs in .venv, which is made on the first call and remade when the packages change
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo install test faults bench parity conversion recipes mutations check lint types clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP) ## tokenizer, pretraining, fine-tuning and from scratch on handwritten digits (4 minutes on 2 cores)
	$(BIN)/python scripts/demo.py

install: $(STAMP) ## make .venv with beit and all that the demo needs

test: $(STAMP)-dev ## the tests (ARGS="-k name" passes arguments to pytest)
	$(BIN)/python -m pytest $(ARGS)

faults: $(STAMP)-dev ## kill, starve, damage and attack runs (15 minutes; ARGS="kills" for one row)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m scripts.faults --write-docs $(ARGS)

bench: $(STAMP)-dev ## time ours beside its peers (20 minutes; ARGS="masks views" for some rows); writes docs/performance.md
	$(BIN)/python -m scripts.bench --write-docs $(ARGS)

parity: $(STAMP)-dev ## measure against timm, transformers, dall-e and Pillow; writes docs/parity.md
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/parity --write-docs $(ARGS)

conversion: $(STAMP)-dev ## weights to every layout and back, by each library's loader; writes docs/conversion.md
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/interop --write-docs $(ARGS)

recipes: $(STAMP)-dev ## the table of all hyper-parameters, from the configs; writes docs/recipes.md
	$(BIN)/python -m scripts.recipes

mutations: $(STAMP)-dev ## break the program on purpose, one fault at a time: some test must notice
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.mutations $(ARGS)

check: lint types test ## lint, type-check and test

lint: $(STAMP)-dev ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)-dev ## mypy
	$(BIN)/mypy

clean: ## remove .venv and caches; runs are kept
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
	find beit scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) was not found: install Python 3.10 or newer, or say make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$$($(PYTHON) --version) is too old: beit needs Python 3.10 or newer; say make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "$(PYTHON) cannot make virtual environments: install its venv module (Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install --quiet -c constraints.txt -e '.[demo,wandb]'
	@touch $@

$(STAMP)-dev: $(STAMP)
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
