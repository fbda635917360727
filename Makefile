# Every target installs what it needs into .venv, in the versions of constraints.txt. The machine must have Python, make
# and a C++ compiler. `make help` lists the targets.
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
# `make test` runs the tests with these marks. `make test MARKS=` also runs the slow tests.
MARKS  ?= not slow
# With SHARE="--slow-share K/N", they run one of N shares of the slow tests.
SHARE  ?=

BIN    := $(VENV)/bin
STAMPS := $(VENV)/stamps
CMAKE  := build/cmake
# `make test VERSIONS=/dev/null` in a fresh clone takes the newest versions.
VERSIONS ?= constraints.txt
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VERSIONS)
BUILD  := PURIFY_FAST_BUILD=cpu
# There is a test process for each core. Threads that wait for work must not spin, because they would slow down the
# other processes.
PARALLEL = OMP_WAIT_POLICY=PASSIVE OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest
SOURCES := $(wildcard csrc/core/* csrc/cpu/*)
# These are the package's requirements beside PyTorch.
REQUIRED := numpy pillow safetensors filelock tqdm tyro pyyaml jinja2 scipy
CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'tests/cpp/*.h' 'tests/cpp/*.cpp')
# These are the oldest supported versions, and the newest numpy with which the interpreter of this Triton works.
OLDEST := torch==2.11.0 torchvision==0.26.0 triton==3.6.0 numpy==2.3.5
COMPAT := build/compat
ASIDE   = PYTHONPATH=$(abspath $(COMPAT)/site):$(CURDIR) PURIFY_FAST_EXTENSION=$(abspath $(COMPAT)/lib/purify_fast/_C.abi3.so)
# Without Python.h, the property tests of the C++ core are skipped with a message.
HEADERS = $(shell $(BIN)/python -c "import os, sysconfig; print('ON' if os.path.exists(sysconfig.get_path('include') + '/Python.h') else 'OFF')")

.DEFAULT_GOAL := help
.PHONY: help demo test test-python test-avx2 test-interpreter test-cpp quick lint format docs bench cuda-check compat wheel rehearse fuzz clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(STAMPS)/package  ## train a network of each method on digits, and attack it; ARGS=--whole trains ten
	$(BIN)/python -m examples.demo $(ARGS)

test: test-cpp test-python test-interpreter  ## test C++, Python, and Triton in its interpreter; MARKS= adds slow tests

test-cpp: $(STAMPS)/cmake
	@echo "== C++ tests of csrc/core"
	$(BIN)/cmake -S . -B $(CMAKE) -G Ninja --log-level=WARNING -DPF_BUILD_PYTHON=$(HEADERS) \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
	$(BIN)/cmake --build $(CMAKE) -- --quiet
	$(BIN)/ctest --test-dir $(CMAKE) --output-on-failure

test-python: $(STAMPS)/tests test-cpp
	@echo "== Python tests"
	PURIFY_FAST_TEST_COMPLETE=1 $(PARALLEL) -n auto --dist worksteal -m "$(MARKS)" $(SHARE) $(ARGS)

# The variables let PyTorch, oneDNN and this package use a CPU as one that has AVX2 alone. The compiler's cache does not
# know of them: code for one kind of CPU would run on the other and give wrong numbers, so this run has its own cache.
test-avx2: $(STAMPS)/tests  ## run the tests that depend on the processor as on a CPU with AVX2 alone
	@echo "== Python tests with AVX2 alone"
	TORCHINDUCTOR_CACHE_DIR=$(abspath build/inductor-avx2) \
	  ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PARALLEL) -n auto --dist worksteal -m "not slow" \
	  tests/speed tests/attacks tests/methods $(ARGS)

# Triton's interpreter must be chosen before Triton is imported, so these tests run in a separate process.
test-interpreter: $(STAMPS)/tests
	@echo "== Triton kernels in the interpreter"
	TRITON_INTERPRET=1 $(PARALLEL) -n auto --dist worksteal -m "$(MARKS)" $(SHARE) tests/interpreter

BASE ?=
quick: $(STAMPS)/tests  ## run the tests of the folders that differ from the main branch, or from BASE=COMMIT
	@echo "== tests of changed folders"
	$(BIN)/python .ci/quick.py $(BASE)

EXAMPLES ?= 1000
fuzz: $(STAMPS)/tests  ## run the tests with random arguments, each EXAMPLES=1000 times
	FUZZ_EXAMPLES=$(EXAMPLES) $(PARALLEL) -n auto --dist worksteal tests/fuzz $(ARGS)

lint: $(STAMPS)/lint  ## run ruff, clang-format, mypy, import-linter and the budgets of code lines; builds nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/promises.py

format: $(STAMPS)/lint  ## rewrite the sources in the format that the linters require
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

docs: $(STAMPS)/docs  ## build the documentation in build/docs; warnings are errors; needs no network
	$(BIN)/python -m sphinx -b html -W --keep-going -q -d build/doctrees docs build/docs
	$(BIN)/python -m benchmarks report --check
	@echo "== build/docs/index.html"

bench: $(STAMPS)/package  ## time every op: eager PyTorch, torch.compile, and this package's kernel
	$(BIN)/python -m benchmarks ops --device cpu $(ARGS)

# Captures are tested where a function stands for a CUDA graph.
cuda-check: $(STAMPS)/tests  ## check the way to a GPU without one: kernels, waits, launches, captures, the GPU check
	@echo "== Triton kernels for sm_80, 90, 100 and 120"
	PURIFY_FAST_TEST_ARCHITECTURES=all $(PARALLEL) -n auto --dist worksteal tests/aot
	@echo "== Triton kernels in the interpreter: addresses, and programs in another order"
	TRITON_INTERPRET=1 $(PARALLEL) -n auto --dist worksteal tests/interpreter/test_program_order.py
	@echo "== steps on fake CUDA tensors, launches, captures, and memory that ends in a capture"
	$(PARALLEL) -n auto --dist worksteal tests/card tests/test_cuda_rules.py tests/speed/test_stand_in.py \
	  tests/speed/test_step_graphs.py tests/speed/test_direct_attacks.py tests/attacks/test_captured.py \
	  tests/training/test_captured_attacks.py
	@echo "== both calls of the GPU check, rehearsed"
	$(BIN)/python -m benchmarks gpu_check --rehearse --out build/rehearsal

compat: $(COMPAT)/site/.done $(STAMPS)/tests  ## build and test with the oldest torch and triton
	@echo "== the extension with $(OLDEST)"
	$(ASIDE) $(BUILD) PATH="$(abspath $(BIN)):$$PATH" \
	  $(BIN)/python setup.py --quiet build_ext --build-lib $(COMPAT)/lib --build-temp $(COMPAT)/objects
	$(ASIDE) $(BIN)/python tests/oldest.py $(OLDEST)
	@echo "== the Triton kernels' budgets, then every op"
	$(ASIDE) PURIFY_FAST_TEST_ARCHITECTURES=all $(PARALLEL) -n auto --dist worksteal tests/aot
	$(ASIDE) $(PARALLEL) -n auto --dist worksteal tests/ops tests/speed
	$(ASIDE) TRITON_INTERPRET=1 $(PARALLEL) -n auto --dist worksteal -m "$(MARKS)" tests/interpreter

# Files of an earlier build would be packed into the wheel, so they are removed first.
wheel: $(STAMPS)/base  ## build a wheel with the CPU kernels in dist/, for every Python from 3.10 and torch from 2.11
	@rm -rf build/lib* build/bdist*
	$(BUILD) $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps -w dist .
	@ls dist/*.whl

KERNELS ?= --kernels
rehearse: $(STAMPS)/tests  ## do what a tag does, without uploading: build, check and install the files, in build/rehearse
	rm -rf build/rehearse
	@mkdir -p build/rehearse
	$(BIN)/python .ci/release.py rehearse $(KERNELS) build/rehearse

clean:  ## remove the results of builds, except .venv
	rm -rf build dist docs/api docs/generated purify_fast/_C*.so $(STAMPS)/package *.egg-info

$(BIN)/python:
	@echo "== $(VENV): a virtual environment of $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)

# `make -j2` builds the C++ tests while PyTorch is installed. Two runs of pip at once could disturb each other.
$(STAMPS)/base: constraints.txt | $(STAMPS)/cmake
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
	$(BUILD) $(PIP) --no-build-isolation -e '.[demo]'
	@touch $@

$(STAMPS)/tests: $(STAMPS)/package
	@echo "== the packages of the tests"
	# Tests run AutoAttack's class from RobustBench, and compare a network with RobustBench's.
	# They also build a release and check its files.
	$(PIP) pytest pytest-timeout pytest-xdist hypothesis diffusers robustbench build twine 'readme-renderer[md]'
	# Tests run attacks in AttackBench, and PGD of torchattacks in a report. The other requirements of these two
	# packages are not needed.
	$(PIP) --no-deps attackbenchlib torchattacks
	# The wheel of torchattacks overwrites files of robustbench, so install robustbench again.
	$(PIP) --no-deps --force-reinstall robustbench
	# RobustBench imports pkg_resources, which later versions of setuptools do not have. A test finds this older version
	# in a separate folder.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/setuptools-80 \
	  setuptools==80.10.2
	# Tests run the attacks of these packages on this package's defences and inside its reports.
	$(PIP) foolbox adversarial-robustness-toolbox
	@touch $@

$(STAMPS)/cmake: constraints.txt | $(BIN)/python
	@mkdir -p $(STAMPS)
	@echo "== CMake and pybind11"
	$(PIP) cmake pybind11 ninja
	@touch $@

$(STAMPS)/docs: $(STAMPS)/base
	@echo "== Sphinx, MyST and the theme, and two packages that the check of the pages imports"
	$(PIP) $(REQUIRED) pyautoattack sphinx myst-parser furo sphinx-copybutton
	@touch $@

# mypy reads the types of PyTorch and of the other requirements, and runs none of them. So PyTorch's own requirements,
# which are three times as large as PyTorch, can be missing. A later target installs them.
$(STAMPS)/lint: constraints.txt | $(BIN)/python
	@mkdir -p $(STAMPS)
	@echo "== the linters, and packages whose types mypy reads"
	$(PIP) $(REQUIRED) ruff mypy import-linter clang-format
	$(PIP) --no-deps torch torchvision
	@touch $@
