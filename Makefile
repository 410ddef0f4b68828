# `make test` and `make bench` are all that a fresh clone needs. Everything is installed into .venv;
# PYTHON= chooses the Python it is made with, CXX= the compiler, PYTEST= adds options for pytest.
PYTHON ?= python3
BIN := .venv/bin
CPP_FOLDERS := benchmarks benchmarks/micro csrc csrc/cpu csrc/cuda tests tests/emulator tests/emulator/cases \
    tests/emulator/cuda tests/emulator/host tests/emulator/ops tests/fake_cuda tests/fake_cuda/torch/csrc/stable
CPP_SOURCES = $(wildcard $(foreach kind,h cpp cu cuh,$(CPP_FOLDERS:=/*.$(kind))))
SANITIZED := build/sanitized
SANITIZED_TESTS := -m op
# One process a core; PYTEST="-n 0 ..." runs all tests in one, as a debugger wants it.
PYTEST_OPTIONS := --durations=20 -n auto --maxprocesses 8 --dist loadgroup

.PHONY: help bench sentinel test full sanitize cuda gpu-check dist docs lint format build compiled clean
help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

bench: build  ## check against torch.nn, time against it, train a small language model
	$(BIN)/python benchmarks/suite.py

sentinel: build  ## whether speed against torch.nn was lost since the rows that are kept
	$(BIN)/python benchmarks/sentinel.py

test: build  ## run the tests
	$(BIN)/pytest $(PYTEST_OPTIONS) $(PYTEST)

full: build  ## run the tests on their complete grids, large ones sampled (PYTEST=--most=0: all)
	$(BIN)/pytest $(PYTEST_OPTIONS) --full $(PYTEST)

# Python and torch keep memory to the end, so leaks are not looked for. The C++ run time must be
# loaded with the sanitizer's, or the sanitizer does not find the throw that it intercepts. Memory
# that is not there is null, as without the sanitizer: a test asks for too much.
sanitize: .venv/installed  ## run the op tests on a build with the address and UB sanitizers
	FUSED_RNN_SANITIZE=address,undefined $(BIN)/python setup.py -q build --build-lib $(SANITIZED)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED) \
	$(BIN)/pytest $(PYTEST_OPTIONS) $(SANITIZED_TESTS) $(PYTEST)

cuda: .venv/installed  ## compile the CUDA library for every architecture; needs no GPU
	FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST= $(BIN)/python setup.py -q build --build-lib build/cuda
	$(BIN)/python csrc/check_cuda.py docs/kernels.md

# Offline, with the torch and pytest of PYTHON, not .venv. OUT= is the folder for results, CPU_BUILT=
# a CUDA library that was built beside a torch without CUDA.
gpu-check:  ## on a machine with a GPU: build, test, sanitize, micro, bench (PIECE= for one)
	$(PYTHON) benchmarks/gpu_check.py $(if $(PIECE),--piece $(PIECE)) $(if $(OUT),--out "$(OUT)") \
	    $(if $(CPU_BUILT),--cpu-built "$(CPU_BUILT)") --pytest='$(PYTEST)'

# From each a fresh environment, where it has to run.
dist: .venv/installed  ## the sdist and this Python's wheel, in dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/python tests/fresh_install.py

docs: build  ## the documents as a site in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: .venv/installed  ## ruff, mypy, clang-format: what pre-commit and CI run
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

format: .venv/installed  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP_SOURCES)

build: .venv/editable  ## compile what changed, in place

clean:  ## remove what was built, and .venv
	rm -rf .venv build dist fused_rnn.egg-info fused_rnn/*.so

# $(call need,command,sentence): the sentence is printed when the command fails.
need = @$(1) >/dev/null 2>&1 || { echo "fused_rnn: $(strip $(2))" >&2; exit 1; }

.venv/installed: requirements-dev.txt
	$(call need,command -v $(PYTHON),$(PYTHON) was not found: apt install python3)
	$(call need,$(PYTHON) -c 'import sys; sys.exit(not 0x30b <= sys.hexversion >> 16 <= 0x30e)',\
	    developing needs Python 3.11 to 3.14 and $(PYTHON) is another: name one with PYTHON=)
	$(call need,$(PYTHON) -c 'import ensurepip',\
	    $(PYTHON) cannot make a virtual environment: apt install python3-venv)
	$(call need,test -e "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h",\
	    the headers of $(PYTHON) are missing: apt install python3-dev)
	$(call need,command -v $(CXX),there is no C++ compiler ($(CXX) was not found): apt install g++)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# ninja knows what has to be compiled again.
compiled: .venv/installed
	@$(BIN)/python setup.py -q build_ext --inplace

# Once: an editable installation is the metadata and a pointer to this folder.
.venv/editable: .venv/installed pyproject.toml | compiled
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@touch $@
