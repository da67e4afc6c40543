# make setup | demo | test | test-slow | fuzz | lint | clean.  PYTHON=python3.12 make setup  chooses the interpreter (3.10 to 3.12).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo
COUNT ?= 100000
SEED ?= 0

.PHONY: setup demo test test-slow fuzz lint clean
.DELETE_ON_ERROR:

setup: $(VENV)/.installed

# Runs again only if the requirements, the C sources or the list of system packages change.
$(VENV)/.installed: setup.py pyproject.toml .ci/system-packages $(wildcard vitlocal/data/native/*.[ch])
	@sh .ci/system-packages $(PYTHON)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "Installing vitlocal and its requirements (PyTorch is large: this takes some minutes the first time) ..."
	@# setuptools warns that an editable package lies in the working directory, as intended.
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

demo: setup
	$(BIN)/python write_dataset.py --source sample --split train --sides 96 --format raw --out data/sample
	$(BIN)/python write_dataset.py --source sample --split val --sides 96 --format raw --out data/sample
	$(BIN)/python train_imagenet.py --config-file rcfg/demo.yaml --run.folder=$(DEMO)
	@echo "The curve is in $(DEMO)/curve.png, the report in $(DEMO)/report.html."

test: setup
	$(BIN)/python -m pytest

test-slow: setup
	$(BIN)/python -m pytest -m slow

fuzz: setup
	$(BIN)/python tests/fuzz/fuzz.py $(COUNT) $(SEED)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
