# Two commands: `make demo` trains and reports, `make test` runs the tests. Both set up what they need in .venv.
PYTHON ?= python3
VENV ?= .venv
# Plain `torch` brings several GB of CUDA packages. Override to keep or pick a build: make TORCH=torch demo
TORCH ?= torch==2.13.0
# Everything else comes by sha256: pip install --require-hashes --no-deps -r requirements/dev.lock (see requirements/install).
# Where the lock does not fit the platform, or to try newer packages: make LOCK= test
LOCK ?= requirements/dev.lock
# What the demo times: losses of these, and of so many hidden states x vocabulary.
KERNELS ?= token logits
HEAD ?= 4096x8000
# Test processes side by side.
JOBS ?= 2
BIN := $(VENV)/bin
# Most of what is installed is never imported: bytecode is made at the first import. A shell that forbids that (the
# variable is set in many images) would have every process of tests and demo compile torch anew.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip install -q --no-compile
STAMP := $(VENV)/.installed
SOURCES := setup.py pyproject.toml $(LOCK) $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.h csrc/*/*.cpp)

.PHONY: demo test lint bench docs study release clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(BIN)/python $(SOURCES)
	$(BIN)/python -c "import torch" 2>/dev/null || $(INSTALL) "$(TORCH)"
ifneq ($(LOCK),)
	requirements/install $(BIN)/python $(LOCK)
	$(INSTALL) --no-build-isolation --no-deps -e .
else
	$(INSTALL) "setuptools>=78.1.1" wheel
	$(INSTALL) --no-build-isolation -e ".[dev]"
endif
	@touch $@

demo: $(STAMP)
	rm -rf runs/demo
	$(BIN)/python -m gac_kernels.train.demo --output runs/demo $(DEMO_ARGS)
	$(BIN)/gac-kernels bench --kernel $(KERNELS) --modes full --seconds 2 --providers gac-cpu,eager,eager-loss --backend cpu
	$(BIN)/gac-kernels bench --kernel hidden --shape $(HEAD) --seconds 2 --providers eager --backend cpu

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile  # whole files, whose fixtures compile kernels and start processes

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(STAMP)
	$(BIN)/gac-kernels bench

docs: $(STAMP)
	$(BIN)/python -m mkdocs build --strict

study: $(STAMP)
	$(BIN)/python benchmarks/study.py

release: $(STAMP)
	RELEASE=dist .ci/packaging

clean:
	rm -rf $(VENV) build dist *.egg-info gac_kernels/*.so
