# One set of verbs for people and CI. Each makes what it needs: after a clone `make demo` or `make test` is enough.
PYTHON ?= python3
PYTEST_ARGS ?=

V := .venv
BIN := $(V)/bin
# The editable install links file by file (pyproject.toml says why): a module added, renamed or deleted means linking anew,
# so the stamp bears a checksum of the names. It costs 2 s then, and nothing otherwise.
NAMES := $(shell find framework brokers middleware \( -name '*.py' -o -name '*.sql' -o -name py.typed \) | LC_ALL=C sort | cksum | tr -d ' ')
RUNTIME := $(V)/stamp-runtime-$(NAMES)
DEV := $(V)/stamp-dev
TESTS := $(V)/stamp-tests
PYTHONS := 3.11 3.12 3.13 3.14
.PRECIOUS: %/bin/python

ifneq ($(shell command -v uv),)
  MAKE_VENV = uv venv -q --seed --python "$$(command -v $(PYTHON))" $(1)
  INSTALL = uv pip install -q --python $(1)/bin/python
else
  MAKE_VENV = $(PYTHON) -m venv $(1) || { rm -rf $(1); echo "make: $(PYTHON) can't make a virtual environment; on Debian: apt install python3-venv" >&2; exit 1; }
  INSTALL = $(1)/bin/python -m pip install -q --disable-pip-version-check
endif

# setuptools warns of what pyproject.toml has chosen (strict editable); errors are still shown.
LINK = PYTHONWARNINGS=ignore

.PHONY: help install demo check lint types test test-python test-pythons fault test-matrix fuzz transactions scale-postgres soak examples bench bench-peers clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

install: $(DEV)  ## .venv with leveret (editable) and the tools of its developers

demo: $(RUNTIME)  ## index a folder of text through queues, on SQLite or on what LEVERET_BROKER names
	$(BIN)/python examples/index_files/try_out.py

check: $(DEV)  ## ruff (format and rules), mypy and pyright
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright

test: $(DEV)  ## all tests but the fault tests, on real servers
	@echo "all tests but the fault tests and most cases through PgBouncer and on a Redis cluster: about 4 minutes, in two processes with servers of their own (in one: PYTEST_ARGS=\"-n 0\")"
	PYTEST_XDIST_AUTO_NUM_WORKERS=2 $(BIN)/pytest -m "not fault and not pooler and not matrix" -n auto --dist worksteal $(PYTEST_ARGS)

test-pythons:  ## unit, property and memory/SQLite contract tests on each Python from 3.11 on that this machine has
	@passed=; failed=; absent=; \
	for version in $(PYTHONS); do \
	  python=$$(uv python find $$version 2>/dev/null || command -v python$$version) \
	    && "$$python" -c '' 2>/dev/null || { absent="$$absent $$version"; continue; }; \
	  echo "== Python $$version: $$python"; \
	  $(MAKE) --no-print-directory test-python V=$(V)-$$version PYTHON="$$python" \
	    && passed="$$passed $$version" || failed="$$failed $$version"; \
	done; \
	echo "passed:$${passed:- none}; failed:$${failed:- none}; skipped, because this machine doesn't have them:$${absent:- none}"; \
	test -n "$$passed" && test -z "$$failed"

test-python: $(TESTS)
	$(BIN)/pytest tests/unit tests/property tests/contract -m "not fault and not rabbit and not postgres and not redis" -q $(PYTEST_ARGS)

fault: $(DEV)  ## the tests that kill workers, links and brokers: about 15 minutes, in two processes
	PYTEST_XDIST_AUTO_NUM_WORKERS=2 $(BIN)/pytest -m "fault and not cluster and not matrix" -n auto --dist worksteal $(PYTEST_ARGS)

test-matrix: $(DEV)  ## contract and faults on RabbitMQ 3.10, 4.0 and 4.3 (and a cluster), PostgreSQL 15 and 17 (and PgBouncer), Redis 7.0 and Valkey 8 (and a cluster): a table, also in build/matrix.md; over an hour
	$(BIN)/python -m tests.matrix $(MATRIX_ARGS)

transactions: $(DEV)  ## 100 000 random transactions that publish jobs, with each library, against a model; half an hour
	$(BIN)/python -m tests.transactions.model $(TRANSACTIONS_ARGS)

scale-postgres: $(DEV)  ## PostgreSQL with 10 million jobs waiting, a held snapshot, a day's jobs: figures, also in build/scale.json; about an hour
	$(BIN)/python -m tests.scale $(SCALE_ARGS)

soak: $(V)/stamp-plot  ## 20 minutes of load on three nodes while all that can break does: counts in build/soak.json, a chart in build/soak.svg
	$(BIN)/python -m tests.soak $(SOAK_ARGS)

fuzz: $(DEV)  ## ten million octets of noise and of damaged frames into the parser
	$(BIN)/python -m tests.property.fuzz $(FUZZ_ARGS)

examples: $(V)-examples/stamp  ## each example, in an environment with what the examples need
	$(V)-examples/bin/python examples/run_all.py

bench: $(V)/stamp-plot  ## leveret on RabbitMQ, PostgreSQL, Redis and SQLite beside raw aio-pika: tables, and a plot in build/bench.svg
	$(BIN)/python -m benchmarks.peers --only leveret,aio-pika --measure publish,consume,latency,sqlite --out build/bench.json $(BENCH_ARGS)

bench-peers: $(V)-peers/stamp  ## leveret beside Celery, Dramatiq, Taskiq, FastStream, Node and C, on PostgreSQL Procrastinate, PgQueuer and SAQ, on Redis SAQ, arq and streaq; results in benchmarks/results
	$(V)-peers/bin/python -m benchmarks.peers $(BENCH_ARGS)

clean:  ## remove what the verbs made
	rm -rf $(V) $(V)-examples $(V)-peers $(PYTHONS:%=$(V)-%) build dist .demo .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find framework brokers middleware tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(V)/stamp-plot: benchmarks/peers/requirements.txt | $(DEV)
	@$(call INSTALL,$(V)) $$(grep ^matplotlib= benchmarks/peers/requirements.txt)
	@touch $@

$(V)-examples/stamp: pyproject.toml examples/requirements.txt | $(V)-examples/bin/python $(RUNTIME)
	@echo "installing leveret and what the examples need into $(V)-examples"
	@$(call INSTALL,$(V)-examples) "setuptools>=80"
	@$(LINK) $(call INSTALL,$(V)-examples) --no-build-isolation -e . -r examples/requirements.txt
	@touch $@

$(V)-peers/stamp: pyproject.toml benchmarks/peers/requirements.txt benchmarks/peers/requirements-arq.txt | $(V)-peers/bin/python $(RUNTIME)
	@echo "installing leveret and its peers into $(V)-peers"
	@$(call INSTALL,$(V)-peers) "setuptools>=80"
	@$(LINK) $(call INSTALL,$(V)-peers) --no-build-isolation -e . -r benchmarks/peers/requirements.txt
	@# pip would warn that arq and the rest don't fit together, and reads that variable the wrong way round
	@PIP_NO_WARN_CONFLICTS=0 $(call INSTALL,$(V)-peers) --upgrade --target $(V)-peers/arq -r benchmarks/peers/requirements-arq.txt
	@touch $@

%/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON); set PYTHON to a Python of 3.11 or later" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $$($(PYTHON) --version) is too old; set PYTHON to a Python of 3.11 or later" >&2; exit 1; }
	@$(call MAKE_VENV,$*)

$(RUNTIME): pyproject.toml | $(BIN)/python
	@echo "installing leveret into $(V)"
	@$(call INSTALL,$(V)) "setuptools>=80"
	@$(LINK) $(call INSTALL,$(V)) --no-build-isolation -e .
	@rm -f $(V)/stamp-runtime-*; touch $@

$(DEV): pyproject.toml | $(RUNTIME)
	@echo "installing the development tools into $(V)"
	@$(call INSTALL,$(V)) "pip>=25.1"    # the first with dependency groups
	@$(call INSTALL,$(V)) --group dev
	@touch $@

$(TESTS): pyproject.toml | $(RUNTIME)
	@echo "installing what the tests need into $(V)"
	@$(call INSTALL,$(V)) "pip>=25.1"
	@$(call INSTALL,$(V)) --group tests
	@touch $@
