# `make` alone shows what there is. Needed: git, make, Python 3.11 or newer with venv. Everything else is fetched into this folder.
#
# PYTHON=…       the Python to set up with (default: the last one, then /usr/bin/python3, then python3)
# ARGS=…         more arguments for pytest, e.g. make test ARGS='tests/unit -k money'
# INTERACTIVE=1  make run: you approve the consent yourself, in a browser
# STORE=…        make run: the database, sqlite (default) or postgresql
# PAYMENTS=…     make simulate: how many (default: 10000)
# SEED=…         make simulate: the run to play again, and CLASS=A, B or C where the failure names one

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PY := .venv/bin/python
# The client's folder also holds the generated stubs, which are not ours to check; mypy refuses a folder with nothing else in it.
CLIENT := $(if $(wildcard clients/python/src/custody/*.py),clients/python/src/custody)
CHECKED := $(wildcard sidecar sandbox softhsm tools tests benchmarks examples) $(CLIENT)
COMPILE := .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-annotate --no-header

export BUF_CACHE_DIR := $(CURDIR)/.cache/buf
export UV_CACHE_DIR := $(CURDIR)/.cache/uv

.PHONY: help
help: ## Show this help
	@printf 'Usage: make TARGET\n\n'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 12
	@printf '\n'; sed -n 's/^# \([A-Z]*=.*\)/  \1/p' Makefile

.PHONY: setup
setup: ## Set up this working copy (a moment when that is done)
	@tools/setup/start.sh

.PHONY: run
run: setup ## Run the main job: a consent goes into custody, and pays
	@STORE="$(STORE)" $(PY) -m tools.run

.PHONY: test
test: setup ## Run all tests
	@$(PY) -m pytest $(ARGS)

.PHONY: test-faults
test-faults: setup ## Run the kill and fault harness whole, and write its result table
	@$(PY) -m tests.faults run $(ARGS)

.PHONY: simulate
simulate: setup ## Simulate payments under faults (PAYMENTS=100000, or SEED= to play one run again)
	@$(PY) -m tests.simulation $(if $(SEED),--seed $(SEED)) $(if $(CLASS),--class $(CLASS)) $(if $(PAYMENTS),--payments $(PAYMENTS),$(if $(SEED),,--payments 10000))

.PHONY: check
check: lint types imports protos stubs ## Run everything that CI runs after the tests

.PHONY: lint
lint: setup ## Lint, and check the formatting
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check

.PHONY: format
format: setup ## Format, and correct what the linter can
	@$(PY) -m ruff check --fix
	@$(PY) -m ruff format

.PHONY: types
types: setup ## Check the types
	@$(PY) -m mypy $(CHECKED)

.PHONY: imports
imports: setup ## Check who imports whom
	@.venv/bin/lint-imports --cache-dir .import_linter_cache

.PHONY: protos
protos: setup ## Lint the contract
	@.venv/bin/buf lint

.PHONY: stubs
stubs: setup ## Check that the committed stubs are those of the contract
	@$(PY) tools/generate_stubs.py --check

.PHONY: lock
lock: setup ## Lock the dependencies again (UPGRADE=--upgrade takes the newest)
	@$(COMPILE) $(UPGRADE) --group sandbox --group dev --output-file requirements-dev.lock pyproject.toml
	@$(COMPILE) $(UPGRADE) --constraints requirements-dev.lock --output-file requirements.lock pyproject.toml
	@printf 'uv\n' | $(COMPILE) $(UPGRADE) --output-file requirements-setup.lock -

.PHONY: image
image: ## Build the container image (TARGET=runtime or dev, BASE=, TAG=)
	@tools/image.sh

.PHONY: bench
bench: setup ## Measure what custody costs (some eight minutes)
	@$(PY) -m benchmarks all

.PHONY: model
model: setup ## Explore the models of payment and refresh further than the tests do (some five minutes)
	@$(PY) -m tests.model

.PHONY: clean
clean: ## Remove everything that set-up, tests and runs have made, development keys included
	rm -rf .venv .cache var build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
