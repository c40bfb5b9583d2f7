# Plain verbs; needs Python >= 3.11 and pip, nothing else. `make setup PYTHON=...` chooses the interpreter.

PYTHON ?= $(shell for name in python3.11 python3 python3.12 python3.13; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_RECORDS := out/demo.duckdb
DEMO_REPORT := out/demo

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test check check-slow bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install kvatlas with its developer tools

# Anew only when one of these files changes.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/native/*.* src/native/kernels/*.*)
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; install one, or name it: make setup PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is not a Python >= 3.11; name another one: make setup PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## compare all strategies on this machine in minutes: tables here, a page in out/demo
	$(BIN)/kvatlas characterize --preset quick --records $(DEMO_RECORDS)
	$(BIN)/kvatlas report --records $(DEMO_RECORDS) --out $(DEMO_REPORT)

test: setup ## run the fast tests, two at a time
	$(BIN)/python -m pytest -n 2

check: setup ## lint, check format, types and import layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

check-slow: setup ## run the slow tests
	$(BIN)/python -m pytest -m slow

bench: setup ## run the benchmarks
	@set -e; for script in benchmarks/*.py; do \
		test -e "$$script" || { echo "no benchmarks"; exit 0; }; \
		echo "$$script"; $(BIN)/python "$$script"; done

clean: ## remove what setup, tests and runs made
	rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
