# `make demo` and `make test` are all a fresh machine needs; both install first.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: install demo test lint format bench clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/pathcli demo --out demo
	$(BIN)/pathcli models pull minilm
	$(BIN)/pathcli models pull minilm-tokenizer
	$(BIN)/pathcli models pull smollm2-135m

# three at once on two cores: one or another waits for a lease or a process. Bytecode is kept, or
# each of the processes that tests start would compile all anew.
test: install
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n 3 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/python -m pathcli.cli.reference README.md

bench: install
	$(BIN)/python benchmarks/reading.py
	$(BIN)/python benchmarks/tissue.py
	$(BIN)/python benchmarks/embedding.py --network micro
	$(BIN)/python benchmarks/embedding.py --network micro --step 42
	$(BIN)/python benchmarks/embedding.py --network vit-b16
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/faults.py
	$(BIN)/python benchmarks/workers.py
	$(BIN)/python benchmarks/mil_training.py
	$(BIN)/python benchmarks/training.py

clean:
	rm -rf .venv build dist demo .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
