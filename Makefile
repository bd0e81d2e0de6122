# make demo   prepares a small corpus, trains on it, shows the result: about five minutes on two cores
# make test   lint, format and type checks, then every test but the slow ones
# make test-all   those too
# make kernels-report   what the compiler makes of every GPU kernel: registers, spills, memory accesses
# All make the environment in .venv first, and reuse it the next time.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# the first of these that is Python 3.11 or 3.12
PYTHON := $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
RUN := runs/demo
TOKENIZER := --tokenizer configs/demo/tokenizer.model

.PHONY: demo test test-all kernels-report lint types clean

$(READY): requirements.lock setup.py pyproject.toml $(wildcard csrc/*/*)
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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow"

test-all: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

kernels-report: $(READY)
	TRITON_CACHE_DIR=build/triton $(BIN)/python -m benchmarks.kernels_aot

demo: $(READY)
	rm -rf $(RUN) $(RUN)-data
	$(BIN)/megaflow prepare $(RUN)-data/en configs/demo/en.jsonl.zst $(TOKENIZER) --language en
	$(BIN)/megaflow prepare $(RUN)-data/zh configs/demo/zh.jsonl.zst $(TOKENIZER) --language zh
	$(BIN)/megaflow prepare $(RUN)-data/parallel configs/demo/parallel.jsonl.zst $(TOKENIZER) --language en-zh \
		--kind parallel --seq-length 256
	$(BIN)/megaflow prepare $(RUN)-data/instruction configs/demo/instruction.jsonl.zst $(TOKENIZER) --language en-zh \
		--kind instruction --seq-length 256 --loss response
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 megaflow/pretrain.py --config configs/demo.yaml
	$(BIN)/megaflow generate $(RUN) --prompt "The old man looked at"
	$(BIN)/megaflow generate $(RUN) --prompt "中国的"
	$(BIN)/megaflow plot $(RUN)

clean:
	rm -rf $(VENV) build runs *.egg-info
