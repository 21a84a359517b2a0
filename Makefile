# `make help` lists the targets.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
UV     ?= $(if $(wildcard $(VENV)/bin/uv),$(VENV)/bin/uv,uv)
ARGS   ?=
# Processes of pytest side by side. On two cores a third gains nothing: starting Ray is computing too.
WORKERS ?= 2

NEED_310 := import sys; sys.exit(sys.version_info < (3, 10))

.DEFAULT_GOAL := help
.PHONY: help setup train check test lint types unit format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  ARGS='...' goes to train, to check and test (pytest), and to lock; PYTHON=... picks setup's interpreter,"
	@echo "  LDM_RAY_CUDA=… torch for NVIDIA's drivers before 580 (docs/running.md)."

setup: $(STAMP) ## create .venv and install the locked packages and the project

$(STAMP): requirements.txt pyproject.toml
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
	  "$(PYTHON)" -c '$(NEED_310)' 2>/dev/null \
	    || { echo "make setup: '$(PYTHON)' is not Python 3.10 or newer; name one: make setup PYTHON=python3.11" >&2; exit 1; }; \
	  "$(PYTHON)" -m venv $(VENV); }
	@$(PY) -c '$(NEED_310)' \
	  || { echo "make setup: $(VENV) has a Python older than 3.10; remove it (make clean) and run this again" >&2; exit 1; }
	sh deploy/install.sh $(PY) requirements.txt
	$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	@touch $@

train: setup ## train: make train ARGS='--help'
	$(PY) -m ldm_ray.train $(ARGS)

check: setup ## lint, types and the tests that start no Ray, server or browser: the loop while working
	@$(MAKE) --no-print-directory -j 2 lint types unit

test: setup ## lint, types and all tests: make test ARGS='-k name'
	@$(MAKE) --no-print-directory lint types
	$(PY) -m pytest -n $(WORKERS) $(ARGS)

lint: setup ## ruff and the format check
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: setup ## mypy
	$(PY) -m mypy

unit: setup
	$(PY) -m pytest -n 2 tests/unit $(ARGS)

format: setup ## fix what ruff can and format the code
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Needs uv (any recent release). The pins of the torch family and Ray are in pyproject.toml, [tool.uv].
COMPILE = $(UV) pip compile pyproject.toml --universal --python-version 3.10 --quiet \
  --no-header --no-emit-index-url --no-emit-find-links
lock: ## rewrite requirements.txt and deploy/'s part of it from pyproject.toml: make lock ARGS=--upgrade
	@command -v $(UV) >/dev/null || { echo "make lock: uv not found; install it with: pip install uv" >&2; exit 1; }
	$(COMPILE) --extra dev --output-file requirements.txt $(ARGS)
	$(COMPILE) --constraint requirements.txt --no-annotate --output-file deploy/requirements.txt

clean: ## remove .venv, caches and build products (outputs/ and hf_cache/ stay)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
