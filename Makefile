# Two commands do everything on a fresh machine (Python 3.11+, a C++ compiler, CMake):
#   make quickstart   the main job on the embedded default model
#   make test         the tests
# Both create .venv from requirements.lock and are quick when it is already there.

PYTHON ?= python3
# Without AMX: this llama.cpp dies there of an illegal instruction when gcc has optimised (llama.cpp pull request 26954).
export CMAKE_ARGS := $(CMAKE_ARGS) -DCMAKE_C_FLAGS=-U__AMX_INT8__ -DCMAKE_CXX_FLAGS=-U__AMX_INT8__
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
# GPTQModel stands apart: peft imports it wherever it is installed. PYTHONPATH=$(GPTQ) adds it to a command.
GPTQ := $(VENV)/gptq
# inspect-ai wants older libraries than the lock's: `PYTHONPATH=$(INSPECT) pipeline report --inspect-log DIR`.
INSPECT := $(VENV)/inspect

.PHONY: help quickstart test lint types setup gptq inspect lock clean

help:            ## show the targets
	@grep -E '^[a-z]+: .*##' Makefile | sed 's/:.*##/  -/'

setup: $(READY)  ## create .venv from the lock

$(READY): requirements.lock pyproject.toml
	@command -v cmake >/dev/null || { echo "CMake is missing: llama.cpp is built from source (Debian: apt-get install cmake g++)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

gptq: $(GPTQ)/.ready  ## what the stage gptq needs, in .venv/gptq

$(GPTQ)/.ready: $(READY) requirements-gptq.lock
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(GPTQ) --requirement requirements-gptq.lock
	touch $@

inspect: $(INSPECT)/.ready  ## what logs for inspect_ai's viewer need, in .venv/inspect

$(INSPECT)/.ready: $(READY) requirements-inspect.lock
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(INSPECT) --requirement requirements-inspect.lock
	touch $@

quickstart: $(READY)  ## compress, harden, quantize and verify the demo model; ends with a report and an OCI layout
	$(BIN)/pipeline run recipes/quickstart.yaml

test: $(READY) $(GPTQ)/.ready $(INSPECT)/.ready  ## the whole test suite with coverage
	$(BIN)/python -m pytest --cov --cov-report= --ignore=tests/test_gptq.py --ignore=tests/test_inspect_log.py
	PYTHONPATH=$(INSPECT) $(BIN)/python -m pytest tests/test_inspect_log.py --cov --cov-append --cov-report=
	PYTHONPATH=$(GPTQ) $(BIN)/python -m pytest tests/test_gptq.py --cov --cov-append --cov-report=term:skip-covered

lint: $(READY)   ## ruff and the one-way arrows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(READY)  ## mypy --strict on our packages
	$(BIN)/mypy

lock: $(READY)   ## write requirements.lock from what is installed
	$(BIN)/python -m pip freeze --exclude-editable | sed -E "s/\+cpu$$//" > requirements.lock

clean:           ## remove the environment and caches of tools (never the store or runs)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
