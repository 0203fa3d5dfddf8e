# From a fresh clone, `make demo` and `make test` do all set-up themselves; the second time they start at once.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
# Python compiles what is imported, a small part of what is installed, and keeps it.
PIP_INSTALL := $(BIN)/pip install -q --no-compile
export PYTHONDONTWRITEBYTECODE :=
SOURCES := setup.py $(wildcard csrc/*.h csrc/cpu/* csrc/cuda/*)

.PHONY: help demo experiments test test-all bench sanitize sanitize-cpu sanitize-cuda docs lint format clean
help:
	@echo "make demo   train a small model on real text and print its likelihood, about 5 minutes on two cores"
	@echo "make experiments   the papers' experiments in small and a page of them, some 90 minutes on two cores; it goes on if stopped"
	@echo "make test   run the tests; make test-all  those that take long too: ranks, 20000 repeats, kernels interpreted and compiled"
	@echo "make bench  measure the kernels against the published formulas"
	@echo "make sanitize   run the random cases, and the CUDA kernels emulated, under AddressSanitizer and UBSan"
	@echo "make docs   build the documentation into build/docs"
	@echo "make lint   check style and types;  make format  mends the style"

demo: $(VENV)/built
	$(BIN)/python examples/demo.py

experiments: $(VENV)/built
	$(BIN)/python -m examples.experiments all
	$(BIN)/python -m examples.experiments page --to runs/experiments/README.md

# Two workers of two threads each on two cores: a thread that waits must not spin.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal
test: $(VENV)/built
	$(PYTEST) -m "not slow"

test-all: $(VENV)/built
	$(PYTEST)

bench: $(VENV)/built
	$(BIN)/python -m pytest benchmarks --benchmark-only

# The fuzz tests, and the CUDA kernels in their emulator, under AddressSanitizer and UndefinedBehaviorSanitizer, on builds
# of their own, which -j2 does side by side. The emulator is two machines, whose threads run in other orders.
SANITIZED := build/sanitized
UNDER_SANITIZERS = LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 FASTDIFF_SANITIZE=1
EMULATED = EMULATE_CUDA=1 $(UNDER_SANITIZERS) $(BIN)/pytest -q -p no:cacheprovider
sanitize: sanitize-cpu sanitize-cuda
sanitize-cpu: $(VENV)/built
	FASTDIFF_SANITIZE=1 LDFLAGS=-fsanitize=address,undefined \
		$(BIN)/python setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	$(UNDER_SANITIZERS) PYTHONSAFEPATH=1 PYTHONPATH=$(SANITIZED)/lib FASTDIFF_FUZZ_CASES=150 \
		$(BIN)/pytest -q -p no:cacheprovider tests/test_fuzz.py

sanitize-cuda: $(VENV)/built
	FASTDIFF_SANITIZE=1 $(BIN)/python tests/cuda/emulated.py
	EMULATED_CAPABILITY=90 EMULATED_ORDER=shuffled $(EMULATED) tests/kernels/test_[cg]*.py
	EMULATED_CAPABILITY=80 EMULATED_ORDER=backward $(EMULATED) tests/kernels/test_gpu_fuzz.py tests/kernels/test_gpu_row_sample.py

docs: $(VENV)/built
	$(BIN)/mkdocs build --strict --site-dir build/docs

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*' 'tests/cuda/*.h')
	$(BIN)/mypy

format: $(VENV)/built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*' 'tests/cuda/*.h')

clean:
	rm -rf $(VENV) build *.egg-info fastdiff/*.so

# An installed torch >= 2.10 is reused; otherwise $(TORCH) goes into the environment.
HAS_TORCH := import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)

$(VENV)/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2])' \
		|| { echo "fastdiff needs Python 3.10 or newer; name one with PYTHON=..."; exit 1; }
	@echo "Setting up $(VENV): torch, the tools, then the CPU kernels. A few minutes, once."
	@if $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then \
		echo "Reusing the torch of $(PYTHON)."; $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
		$(PYTHON) -m venv $(VENV) && echo "Installing $(TORCH)." && $(PIP_INSTALL) "$(TORCH)"; \
	fi
	@echo "Installing the tools."
	@$(PIP_INSTALL) 'setuptools>=77' wheel ninja
	@touch $@

$(VENV)/built: $(VENV)/ready $(SOURCES)
	@command -v $${CXX:-c++} >/dev/null || { echo "fastdiff needs a C++17 compiler (g++ or clang++)."; exit 1; }
	@echo "Building the kernels."
	@$(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@
