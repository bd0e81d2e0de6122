# make demo   prepares a small corpus, trains on it, shows the result: about five minutes on two cores
# make test   lint, format and type checks, then every test
# Both make the environment in .venv first, and reuse it the next time.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# the first of these that is Python 3.11 or 3.12
PYTHON := $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
RUN := runs/demo

.PHONY: demo test lint types clean

$(READY): requirements.lock setup.py pyproject.toml $(wildcard csrc/*)
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one, or name it: make PYTHON=/path/to/python"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# kernels/ is imported as megaflow.kernels: the type checker is shown a tree in which it stands there
types: $(READY)
	rm -rf build/types && mkdir -p build/types
	cp -rs $(CURDIR)/megaflow build/types/megaflow && cp -rs $(CURDIR)/kernels build/types/megaflow/kernels
	MYPYPATH=build/types $(BIN)/mypy -p megaflow
	MYPYPATH=build/types $(BIN)/mypy --explicit-package-bases benchmarks

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

clean:
	rm -rf $(VENV) build runs *.egg-info
