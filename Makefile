# Every target sets up what it needs in .venv, from constraints.txt; nothing but Python, make and a C++ compiler is
# expected on the machine. `make help` lists the targets.
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
# the tests that `make test` runs; `make test MARKS=` runs the slow ones too, as .ci/run does
MARKS  ?= not slow

BIN    := $(VENV)/bin
STAMPS := $(VENV)/stamps
CMAKE  := build/cmake
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
BUILD  := PURIFY_FAST_BUILD=cpu
# a test process per core: threads that wait for work must not spin, or each would take the others' core
PARALLEL = OMP_WAIT_POLICY=PASSIVE OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest
SOURCES := $(wildcard csrc/core/* csrc/cpu/*)
CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'tests/cpp/*.h' 'tests/cpp/*.cpp')
# the oldest versions that are supported, and the newest numpy that the interpreter of that Triton works with
OLDEST := torch==2.11.0 torchvision==0.26.0 triton==3.6.0 numpy==2.3.5
COMPAT := build/compat
ASIDE   = PYTHONPATH=$(abspath $(COMPAT)/site):$(CURDIR) PURIFY_FAST_EXTENSION=$(abspath $(COMPAT)/lib/purify_fast/_C.abi3.so)
# Python.h may be missing; then the property tests of the core say so, and are skipped
HEADERS = $(shell $(BIN)/python -c "import os, sysconfig; print('ON' if os.path.exists(sysconfig.get_path('include') + '/Python.h') else 'OFF')")

.DEFAULT_GOAL := help
.PHONY: help demo test test-python test-interpreter test-cpp lint format docs bench cuda-check compat wheel clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(STAMPS)/package  ## train and attack on digits, minutes on 2 cores; ARGS=--quick for a minute or two
	$(BIN)/purify-fast demo $(ARGS)

test: test-cpp test-python test-interpreter  ## C++, Python, Triton in its interpreter; MARKS= for the slow tests too

test-cpp: $(STAMPS)/cmake
	@echo "== C++ tests of csrc/core"
	$(BIN)/cmake -S . -B $(CMAKE) -G Ninja --log-level=WARNING -DPF_BUILD_PYTHON=$(HEADERS) \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
	$(BIN)/cmake --build $(CMAKE) -- --quiet
	$(BIN)/ctest --test-dir $(CMAKE) --output-on-failure

test-python: $(STAMPS)/package test-cpp
	@echo "== Python tests"
	PURIFY_FAST_TEST_COMPLETE=1 $(PARALLEL) -n auto --dist worksteal -m "$(MARKS)" $(ARGS)

# Triton's interpreter is chosen when Triton is imported: a process of its own
test-interpreter: $(STAMPS)/package
	@echo "== Triton kernels in the interpreter"
	TRITON_INTERPRET=1 $(PARALLEL) -n auto --dist worksteal tests/interpreter

EXAMPLES ?= 1000
fuzz: $(STAMPS)/package  ## arguments of any kind, at random: EXAMPLES=1000 for each of about 70 tests
	FUZZ_EXAMPLES=$(EXAMPLES) $(PARALLEL) -n auto --dist worksteal tests/fuzz $(ARGS)

lint: $(STAMPS)/lint $(STAMPS)/package  ## ruff, clang-format, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMPS)/lint  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

docs: $(STAMPS)/docs $(STAMPS)/package  ## the documentation in build/docs, every warning an error; no network
	$(BIN)/python -m sphinx -b html -W --keep-going -q -d build/doctrees docs build/docs
	$(BIN)/python -m benchmarks report --check
	@echo "== build/docs/index.html"

bench: $(STAMPS)/package  ## every op: eager, torch.compile, ours
	$(BIN)/python -m benchmarks ops --device cpu $(ARGS)

cuda-check: $(STAMPS)/package  ## compile the Triton kernels for sm_80, 90, 100, 120 and look at their code; no GPU
	PURIFY_FAST_TEST_ARCHITECTURES=all $(PARALLEL) -n auto --dist worksteal tests/aot

compat: $(COMPAT)/site/.done $(STAMPS)/package  ## build and test with the oldest torch and triton
	@echo "== the extension with $(OLDEST)"
	$(ASIDE) $(BUILD) PATH="$(abspath $(BIN)):$$PATH" \
	  $(BIN)/python setup.py --quiet build_ext --build-lib $(COMPAT)/lib --build-temp $(COMPAT)/objects
	$(ASIDE) $(BIN)/python tests/oldest.py $(OLDEST)
	@echo "== the Triton kernels' budgets, then every op"
	$(ASIDE) PURIFY_FAST_TEST_ARCHITECTURES=all $(PARALLEL) -n auto --dist worksteal tests/aot
	$(ASIDE) $(PARALLEL) -n auto --dist worksteal tests/ops
	$(ASIDE) TRITON_INTERPRET=1 $(PARALLEL) -n auto --dist worksteal tests/interpreter

wheel: $(STAMPS)/base  ## a wheel with the CPU kernels in dist/, for every Python from 3.10 and torch from 2.11
	@rm -rf build/lib* build/bdist*  # what an earlier build left would be packed
	$(BUILD) $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps -w dist .
	@ls dist/*.whl

clean:  ## remove what was built; .venv stays
	rm -rf build dist docs/api docs/generated purify_fast/_C*.so purify_fast/_build.json $(STAMPS)/package *.egg-info

$(BIN)/python:
	@echo "== $(VENV): a virtual environment of $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)

$(STAMPS)/base: constraints.txt | $(BIN)/python
	@mkdir -p $(STAMPS)
	@echo "== PyTorch and the build tools (the first time this downloads a lot)"
	$(PIP) torch torchvision setuptools wheel ninja
	@touch $@

$(COMPAT)/site/.done: Makefile | $(STAMPS)/base
	@echo "== $(OLDEST) aside, in $(COMPAT) (the first time this downloads a lot)"
	rm -rf $(COMPAT)/site
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(COMPAT)/site $(OLDEST)
	@touch $@

$(STAMPS)/package: $(STAMPS)/base pyproject.toml setup.py $(SOURCES)
	@echo "== purify_fast with its CPU kernels"
	$(BUILD) $(PIP) --no-build-isolation -e '.[demo,test,diffusion]'
	# RobustBench runs AutoAttack's class, and has a network that tests compare with
	$(PIP) robustbench
	# AttackBench runs attacks, and PGD of torchattacks is a row; what else the two ask for is not needed
	$(PIP) --no-deps attackbenchlib torchattacks
	# torchattacks' wheel replaces files of robustbench
	$(PIP) --no-deps --force-reinstall robustbench
	# RobustBench imports pkg_resources, which later setuptools lack: a test finds it in a folder of its own
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/setuptools-80 \
	  setuptools==80.10.2
	# their attacks run on this package's defences, and inside its reports
	$(PIP) foolbox adversarial-robustness-toolbox
	@touch $@

$(STAMPS)/cmake: $(STAMPS)/base
	@echo "== CMake and pybind11"
	$(PIP) cmake pybind11
	@touch $@

$(STAMPS)/docs: $(STAMPS)/base
	@echo "== Sphinx, MyST and the theme"
	$(PIP) sphinx myst-parser furo sphinx-copybutton
	@touch $@

$(STAMPS)/lint: $(STAMPS)/base
	@echo "== the linters"
	$(PIP) ruff mypy import-linter clang-format
	@touch $@
