# One command a line: `make` lists them. Everything runs in .venv, which `make setup` keeps up to date.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 4
# Plugins whose tests `make test` runs, where there are more: those that changed and a draw of the commit.
PLUGINS ?= 100
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format ci bench dist docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## create or update .venv with everything that is needed
	@$(PYTHON) tools/dev_install.py

demo: setup ## LoRA, then 4-bit weights, on the bundled model, into demo-out/
	$(BIN)/peftx apply --plugin lora --plugin nf4 --output demo-out

# The models in the tests are tiny, and the tests run side by side.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses $(JOBS) --dist worksteal

test: setup ## run the tests; JOBS=1 for one process, ARGS="-k lora" for some
	PEFTX_ARCHITECTURES=draw PEFTX_PLUGINS=$(PLUGINS) $(PYTEST) -m "not slow" $(ARGS)

test-all: setup ## run every test, and the kit on all architectures
	$(PYTEST) $(ARGS)

lint: setup ## style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## write the style that `lint` checks
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ci: lint test ## what a change must pass

bench: ## measure against the peers; results under benchmarks/results/
	@$(PYTHON) tools/dev_install.py --extra bench
	$(BIN)/python benchmarks/run.py $(ARGS)

dist: setup ## build wheels and sdists of the framework, every plugin and the bundles into dist/
	$(BIN)/python tools/dist.py $(ARGS)

docs: ## build the site into site/
	@$(PYTHON) tools/dev_install.py --extra docs
	$(BIN)/mkdocs build --strict

clean: ## remove caches and outputs; .venv stays
	rm -rf demo-out site dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find core spec cli plugins tests tools benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +
