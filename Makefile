# Everything a developer or the CI starts. Each target says in its ## comment what it does; `make` alone lists them.

SHELL := /bin/bash
PYTHON := .venv/bin/python
STAMP := .venv/installed
NODE_STAMP := .venv/installed-node
SOURCES := $(wildcard minipaas replicator images demo bench tests)

.DEFAULT_GOAL := help
.PHONY: help venv install demo test check format bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## make .venv from pyproject.toml, with the tools of development

$(STAMP): pyproject.toml scripts/python-venv
	@scripts/python-venv dev
	@touch $@

$(NODE_STAMP): pyproject.toml scripts/python-venv
	@scripts/python-venv node
	@touch $@

install: ## what a node needs: .venv without the tools of development, and Podman if there is neither Podman nor Docker (root, Debian 12)
	@scripts/system-packages node
	@$(MAKE) --no-print-directory $(NODE_STAMP)

demo: ## lose a host and get everything back, in front of your eyes (root, Debian 12)
	@scripts/system-packages demo
	@$(MAKE) --no-print-directory $(STAMP)
	@$(PYTHON) -m demo

test: ## install what is missing, then run all tests on real parts (root, Debian 12)
	@scripts/system-packages test
	@$(MAKE) --no-print-directory $(STAMP)
	@$(PYTHON) -m pytest

check: $(STAMP) ## the fast part: format, lint, types and the tests that need no real parts
	@$(PYTHON) -m ruff format --check $(SOURCES)
	@$(PYTHON) -m ruff check $(SOURCES)
	@$(PYTHON) -m mypy -p replicator -p minipaas -p demo
	@$(PYTHON) -m pytest -m "not real and not slow" -q

format: $(STAMP) ## format the code, and mend what the linter can mend
	@$(PYTHON) -m ruff check --fix $(SOURCES)
	@$(PYTHON) -m ruff format $(SOURCES)

bench: $(STAMP) ## measure speed
	@$(PYTHON) -m bench

clean: ## remove the virtual environment and everything that tools left
	@rm -rf .venv .cache build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
