# Everything runs in .venv, which the first target makes; PYTHON chooses its interpreter.
PYTHON ?= python3
BIN := .venv/bin
TINY := build/tiny-llama-ternary

.PHONY: venv demo test test-oldest lint types audit docs clean

venv: .venv/.stamp

# Editable: Python sources are used where they are; the compiled core is built again when its own
# sources change.
.venv/.stamp: pyproject.toml constraints.txt CMakeLists.txt $(wildcard ternarize/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The example model: packed, shown, checked against its source, measured, and made to write.
demo: venv
	rm -rf $(TINY)
	mkdir -p build
	$(BIN)/ternarize convert examples/tiny-llama $(TINY) --method itf
	$(BIN)/ternarize inspect $(TINY)
	$(BIN)/ternarize verify $(TINY) --source examples/tiny-llama
	$(BIN)/ternarize eval $(TINY) --source examples/tiny-llama --text examples/eval.txt --seq-len 64
	$(BIN)/ternarize generate $(TINY) --prompt "The function returns"

# A process on each core, and in each one thread: two teams of threads on the same cores would wait for
# one another.
test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# Loading and the Hub (converting with it) with the oldest versions that pyproject.toml takes, and on torch
# alone, without the compiled core. What those versions warn of is theirs.
OLDEST := .venv-oldest
test-oldest: $(OLDEST)/.stamp
	HF_HUB_OFFLINE=1 PYTHONPATH=. OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n auto \
		--dist worksteal -W default -k "not deepseek and not compile and not two_processes" \
		tests/test_load.py tests/test_hub.py

$(OLDEST)/.stamp: pyproject.toml constraints.txt constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-c constraints-oldest.txt accelerate filelock hypothesis huggingface_hub numpy pyarrow \
		pytest pytest-xdist rich safetensors torch transformers typer
	touch $@

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv
	$(BIN)/mypy

# Known faults of the dependencies. The list of them is on the network.
audit: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --local --skip-editable --progress-spinner off

# CLI.md, from the program itself.
docs: venv
	$(BIN)/typer ternarize.cli utils docs --name ternarize --title "The command line" --output CLI.md

clean:
	rm -rf .venv $(OLDEST) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
