# Every target sets up what it needs in .venv; PYTHON names the interpreter, whose torch is used if it has one.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= out
READY := .venv/.ready
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo test lint format clean

help:
	@echo "make demo    accelerate a small FLUX on handwritten digits; writes $(OUT)/"
	@echo "make test    run the tests"
	@echo "make lint    formatting, lint and types"
	@echo "make format  let ruff format and fix what it can"
	@echo "make clean   remove .venv and $(OUT)/"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lesa needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $$($(PYTHON) -c 'import importlib.util as u; print("--system-site-packages" * bool(u.find_spec("torch")))') .venv
	@# an installed torch stays what it is; otherwise the tested one, and first, so that nothing pulls in another
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/python -c 'import torch; print("torch==" + torch.__version__.split("+")[0])' > .venv/constraints.txt
	grep -v '^torch==' constraints.txt >> .venv/constraints.txt
	$(BIN)/pip install -q -c .venv/constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/lesa demo --out $(OUT)

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv $(OUT)
