# `make train`: from a bare machine to a training run. `make test`: the tests, in the same environment; `make test-fast`: those
# that need no simulator, no process and no compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: train test test-fast lint types install clean

train: $(VENV)/.installed
	$(BIN)/torchrl-vla train --preset tiny $(ARGS)

test-fast: $(VENV)/.installed
	$(BIN)/python -m pytest -m fast tests $(ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(VENV)/.installed
	$(BIN)/mypy

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml scripts/install.sh
	PYTHON="$(PYTHON)" bash scripts/install.sh "$(VENV)"
	touch $@

clean:
	rm -rf $(VENV)
