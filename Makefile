# Every target sets up what it needs in .venv; PYTHON names the interpreter, whose torch is used if it has one.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= out
READY := .venv/.ready
TESTS := -m pytest -n auto --dist loadfile --no-loadscope-reorder
RELEASES := $(patsubst tests/versions/%.txt,.venv-versions/%,$(wildcard tests/versions/*.txt))
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo test test-full test-versions support bench bench-check bench-expect gate gate-3.6 lint format docs report clean

help:
	@echo "make demo    accelerate a small FLUX on handwritten digits; writes $(OUT)/"
	@echo "make test    run the tests and report which lines did not run; make test-full also runs the slow ones"
	@echo "make test-versions  run the tests of the adapters with older releases of diffusers"
	@echo "make support check every transformer of diffusers; writes benchmarks/results/models.json"
	@echo "make lint    formatting, lint and types"
	@echo "make bench   measure the kernels on this machine; bench-check fails where something became slower"
	@echo "make gate    compile the kernels for sm_80, sm_90 and sm_100 and look at the machine code"
	@echo "make gate-3.6  the same for sm_90 with Triton 3.6, which comes with torch 2.11"
	@echo "make docs    build the guide and the API reference into site/"
	@echo "make report  write the documents' tables and pictures from benchmarks/results/"
	@echo "make format  let ruff format and fix what it can"
	@echo "make clean   remove .venv, .venv-versions and $(OUT)/"

setup: $(READY)

# The tested versions, but torch and triton as they are installed.
define PINS
import sys
from importlib.metadata import PackageNotFoundError, version
for line in sys.stdin:
    name = line.split("==")[0]
    try:
        print(f"{name}=={version(name).split('+')[0]}" if name in ("torch", "triton") else line.strip())
    except PackageNotFoundError:
        print(line.strip())
endef
export PINS

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lesa needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $$($(PYTHON) -c 'import importlib.util as u; print("--system-site-packages" * bool(u.find_spec("torch")))') .venv
	@# an installed torch stays what it is; otherwise the tested one comes first, so that nothing pulls in another
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/python -c "$$PINS" < constraints.txt > .venv/constraints.txt
	$(BIN)/pip install -q -c .venv/constraints.txt -e '.[dev]'
	touch $@

bench: $(READY)
	mkdir -p $(OUT)
	$(BIN)/python -m pytest benchmarks --condensed $(OUT)/bench.json

bench-check: $(READY)
	$(BIN)/python -m benchmarks.check

bench-expect: $(READY)
	$(BIN)/python -m benchmarks.check --write

demo: $(READY)
	$(BIN)/lesa demo --out $(OUT)

# A process of one thread for each core. No test measures time, so that a busy machine fails none; bench-check does.
# Coverage is only reported: the files of which less than 80 % ran, and the total.
test: $(READY)
	$(BIN)/python -m coverage erase
	OMP_NUM_THREADS=1 $(BIN)/python -m coverage run $(TESTS) -m "not full"; status=$$?; \
	$(BIN)/python -m coverage combine -q; \
	$(BIN)/python -m coverage report | awk '!/%$$/ || /^TOTAL/ || $$NF + 0 < 80'; \
	exit $$status

test-full: $(READY)
	LESA_GATE=90 OMP_NUM_THREADS=1 $(BIN)/python $(TESTS) -m ""

# Each older release lies in a folder before .venv on the path, with what was released beside it and nothing else: no
# torch comes with it.
.venv-versions/%/.ready: tests/versions/%.txt $(READY)
	rm -rf $(@D)
	$(BIN)/pip install -q --no-deps --target $(@D) -r $<
	touch $@

test-versions: $(READY) $(RELEASES:=/.ready)
	set -e; for release in "" $(RELEASES); do \
		echo "== $${release:-.venv}"; PYTHONPATH=$${release:+$(CURDIR)/$$release} $(BIN)/python -m pytest tests/lesa/adapters tests/lesa/api; \
	done

support: $(READY)
	LESA_SUPPORT=benchmarks/results/models.json $(BIN)/python -m pytest -m "" tests/lesa/adapters/diffusers/models

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

gate: $(READY)
	LESA_GATE=80,90,100 $(BIN)/python -m pytest tests/gate

# Triton 3.6, which comes with torch 2.11, in a folder before .venv on the path.
.venv-versions/triton-3.6/.ready: $(READY)
	rm -rf $(@D)
	$(BIN)/pip install -q --no-deps --target $(@D) triton==3.6.0
	touch $@

gate-3.6: .venv-versions/triton-3.6/.ready
	PYTHONPATH=$(CURDIR)/.venv-versions/triton-3.6 $(BIN)/python -m pytest tests/gate

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

report: $(READY)
	$(BIN)/python -m benchmarks.report

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-versions $(OUT)
