# make demo | test | lint | bench | prove | gpu: each works from a fresh clone. The first call installs into .venv, later
# ones do not.

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip
TORCH := $(shell grep ^torch== constraints.txt)
TRITON := $(shell grep ^triton== constraints.txt)
DEV := .venv/.installed-dev

# Keeps the working directory off sys.path: there, kernels/ would shadow the package of that name that others publish.
export PYTHONSAFEPATH := 1

.PHONY: test demo lint bench prove gpu
.DELETE_ON_ERROR:

test: $(DEV)
	$(BIN)/pytest

demo: $(DEV)
	$(BIN)/python examples/tiny_pair.py train .demo
	$(BIN)/arcmerge plan examples/tiny-pair.yml --plot .demo/curve.png
	$(BIN)/arcmerge inspect .demo/first .demo/second --plot .demo/angles.png
	$(BIN)/arcmerge merge examples/tiny-pair.yml .demo/merged
	$(BIN)/python examples/tiny_pair.py loss .demo/first .demo/second .demo/merged

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h')

# The benchmarks import each other from their own folder, which a safe path would leave out.
bench prove gpu: export PYTHONSAFEPATH :=
bench: $(DEV)
	$(BIN)/python benchmarks/gram.py
	$(BIN)/python benchmarks/combine.py
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/table.py

# What can be proved about the kernels without a GPU: docs/proof.md.
prove: $(DEV)
	$(BIN)/python benchmarks/prove.py

# On a machine with a GPU: tests and times everything. DRY=--dry tries that out on one without.
gpu: $(DEV)
	$(BIN)/python -m benchmarks.gpu $(DRY)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "arcmerge needs Python 3.10 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv

# torch goes first and alone: a CUDA build brings the triton that it needs, a CPU build none, and then it is ours.
$(DEV): pyproject.toml setup.py constraints.txt $(shell find csrc -type f) | $(BIN)/python
	$(PIP) install '$(TORCH)'
	$(PIP) show --quiet triton || $(PIP) install '$(TRITON)'
	$(PIP) install '$(TORCH)' -e '.[dev]'
	touch $@
