# engineshed: `make serve` and `make test` are all that is needed; the work is in the command `engineshed`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?=
RECIPE ?=
TARGET ?=
PRECISION ?=
INSTALLED := $(VENV)/.installed

EXPORT_FLAGS := $(if $(RECIPE),--recipe $(RECIPE)) $(if $(TARGET),--target $(TARGET)) $(if $(PRECISION),--precision $(PRECISION))

.PHONY: help serve export test check unit e2e sweep bench clean
.DEFAULT_GOAL := help

help:  ## show this
	@echo "make serve   [HOST=127.0.0.1] [PORT=8000]   set up, export the default model if need be, serve it"
	@echo "make export  [MODEL=hub-id|folder|file.gguf] [RECIPE=engines/x.toml] [TARGET=cpu] [PRECISION='int4 fp32']"
	@echo "make test    set up, lint, types, and every test on the real model"
	@echo "make check   lint and types          make unit   the quick tests          make e2e   the real model and server"
	@echo "make bench   latency and throughput of the default model's engine"
	@echo "make sweep   try every causal LM type that transformers knows; writes docs/architectures.md (an hour)"
	@echo "make clean   remove .venv, caches and built engines"

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "engineshed needs Python 3.11 or newer; set PYTHON=")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[export,test]'
	touch $@

serve: $(INSTALLED)  ## the default model, over HTTP
	@$(BIN)/engineshed export --if-missing
	$(BIN)/engineshed serve --host $(HOST) --port $(PORT) --model smollm2-135m-instruct

export: $(INSTALLED)
	$(BIN)/engineshed export $(EXPORT_FLAGS) $(MODEL)

test: check unit e2e

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(INSTALLED)
	$(BIN)/pytest tests/unit

e2e: $(INSTALLED)
	$(BIN)/engineshed export --if-missing --precision int4 fp32
	$(BIN)/pytest tests/e2e

sweep: $(INSTALLED)
	$(BIN)/python -m tests.sweep

bench: $(INSTALLED)
	@$(BIN)/engineshed export --if-missing
	$(BIN)/engineshed bench

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache build *.egg-info
	find engines -mindepth 1 -maxdepth 1 -type d -exec rm -rf {} +
