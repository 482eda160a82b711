# `make train`: from a bare machine to a training run. `make test`: the tests, in the same environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: train test lint install clean

train: $(VENV)/.installed
	$(BIN)/torchrl-vla train --preset tiny $(ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml scripts/install.sh
	PYTHON="$(PYTHON)" bash scripts/install.sh "$(VENV)"
	touch $@

clean:
	rm -rf $(VENV)
