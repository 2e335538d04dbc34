# `make demo` and `make test` do all set-up by themselves; everything else does too.
# PYTHON=... chooses the interpreter (3.11 or newer), VENV=... the virtual environment, ARGS=... adds arguments.
SHELL := /bin/bash
VENV ?= .venv
ARGS ?=
# Tests wait for half of their time: three processes on two processors. (What pytest-benchmark would refuse is disabled.)
SPREAD ?= -n 3 --dist loadfile --benchmark-disable
BIN := $(VENV)/bin
export VENV PYTHON

.DEFAULT_GOAL := help
.PHONY: help demo test bench lint format docs build coverage asan conformance dist clean distclean

help:            ## this list
	@sed -n 's/^\([a-z]*\): *##/\1	/p' $(MAKEFILE_LIST) | expand -t 14

demo:            ## 1,000 connections at 1 Gbit/s for a while, with a live view
	@.ci/setup demo
	$(BIN)/headrace demo $(ARGS)

test:            ## the test suite, both engines
	@.ci/setup applications demo interop realm test
	$(BIN)/python -m pytest $(SPREAD) $(ARGS)

bench:           ## benchmarks against asyncio, uvloop, rloop, Twisted, .NET and C
	@.ci/setup applications bench demo realm test
	$(BIN)/python -m pytest bench $(ARGS)

lint:            ## ruff, cython-lint, mypy --strict, stubtest
	@.ci/setup demo lint test
	VENV=$(VENV) .ci/lint

format:          ## ruff's formatter and import order, in place
	@.ci/setup lint
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format .

docs:            ## the documentation as HTML, warnings as errors
	@.ci/setup docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

build:           ## the Cython modules, in place
	@.ci/setup

coverage:        ## line coverage of Python and Cython (a traced build in build/coverage)
	@.ci/setup demo test
	.ci/instrumented coverage $(ARGS)

asan:            ## the engine, pool and transport tests under AddressSanitizer (a build in build/asan)
	@.ci/setup demo test
	.ci/instrumented asan $(ARGS)

conformance:     ## CPython's own asyncio tests on both engines
	@WITH_CPYTHON_TESTS=1 .ci/setup
	@for engine in uring epoll; do \
		$(BIN)/python tests/conformance/run.py factories:$$engine --known tests/conformance/known.txt \
			--compare asyncio -j 2 --json conformance-$$engine.json $(ARGS) || failed=1; \
	done; [ -z "$$failed" ]

dist:            ## sdist and wheel in dist/
	@.ci/setup test
	$(BIN)/python -m build --outdir dist $(ARGS)

clean:           ## removes what was built; keeps the virtual environment
	rm -rf build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f python/headrace/*.so pyx/*.c pyx/*.html conformance-*.json demo.json demo.svg .coverage
	rm -f $(VENV)/.headrace-installed
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## and the virtual environment
	rm -rf $(VENV)
