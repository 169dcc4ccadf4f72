# make train: sets everything up and trains a GPT with look-up blocks on embedded text.   make test: sets everything up and tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/quick
CONFIG ?= experiments/configs/gpt_char.py:quick

HARDWARE ?= runs/hardware

COMPILERS := build/compilers

.PHONY: train hardware test lint format types docs colabs compilers clean
.DELETE_ON_ERROR:

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "quweit_jax needs Python 3.11 or newer; try make PYTHON=python3.12"; exit 1)
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: requirements.txt | $(BIN)/python
	@echo "installing requirements.txt into $(VENV) (a minute or two, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.development: requirements-dev.txt $(VENV)/.runtime
	@echo "installing requirements-dev.txt into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/.docs: requirements-docs.txt | $(BIN)/python
	@echo "installing requirements-docs.txt into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $@

# Goes on with an interrupted run; a finished one says how to train longer.
train: $(VENV)/.runtime
	$(BIN)/python -m quweit_jax train --config=$(CONFIG) --workdir=$(WORKDIR)

# Trains a classifier of look-up tables, writes it as Verilog, and checks and synthesizes that by the
# tools that are installed; says what to install where there are none.
hardware: $(VENV)/.runtime
	$(BIN)/python -m quweit_jax train --config=experiments/configs/dwn_digits.py --workdir=$(HARDWARE)
	$(BIN)/python -m quweit_jax export --to=verilog --workdir=$(HARDWARE) --overwrite --verify --synthesize

test: $(VENV)/.development
	$(BIN)/python -m pytest -q -n auto --maxprocesses=4 --dist=loadfile

# For the tests that compile for TPUs and GPUs, which skip without (900 MB).
compilers: $(COMPILERS)/.done

$(COMPILERS)/.done: requirements-compilers.txt $(VENV)/.runtime
	@echo "installing compilers for chips that are not here into $(COMPILERS) (900 MB, once)"
	@version=$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)') && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	    --target $(COMPILERS) -r requirements-compilers.txt jax-cuda13-plugin==$$version \
	    jax-cuda13-pjrt==$$version
	@touch $@

lint: $(VENV)/.development
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.development
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(VENV)/.development
	$(BIN)/pyright

# The notebooks at a small size, from a wheel in a fresh environment.
colabs: $(VENV)/.runtime
	$(BIN)/python colabs/check.py

# build/docs/index.html; every warning is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The environment and what tools leave behind; runs are kept.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
