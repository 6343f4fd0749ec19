# `make demo` and `make test` need nothing but Python 3.11 or newer, make and this checkout.
.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast chaos lint format bench docs clean

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

help: ## Show what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(INSTALLED) ## Set up .venv with everything, once

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "FedChord needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	@echo "Installing FedChord and its servers into .venv (once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: install ## Train on handwritten digits over ten sites, with live progress
	$(BIN)/fedchord demo

test: install ## Run every test, against real servers
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile

test-fast: install ## Run the tests that need no server, in seconds
	$(BIN)/python -m pytest tests/unit

chaos: install ## Break everything on purpose, and write what came of it into docs/reliability.md; about half an hour
	rm -rf build/chaos
	$(BIN)/python -m pytest tests/chaos --chaos full --chaos-table build/chaos --numprocesses 3 --dist loadfile -o faulthandler_timeout=0
	$(BIN)/python -m tests.chaos.campaign --minutes 5 --table build/chaos
	$(BIN)/python -m tests.chaos.campaign --minutes 5 --services --table build/chaos
	$(BIN)/python -m tests.chaos.table build/chaos

lint: install ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## Write the code as `make lint` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## Measure speed and memory beside the floor; some minutes
	$(BIN)/python -m benchmarks.round_overhead
	$(BIN)/python -m benchmarks.large_model
	$(BIN)/python -m benchmarks.aggregate
	$(BIN)/python -m benchmarks.model_store
	$(BIN)/python -m benchmarks.deaths

docs: install ## Write the reference pages that are made from the code
	$(BIN)/python -m docs.generate

clean: ## Remove what the other targets made
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis demo-output
