# Every target sets up what it needs on its first use only. ARGS is passed on: make test ARGS=tests/core
SHELL := /bin/bash
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-gpu bench check clean

help:  ## show the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

setup: .venv/.ready  ## make .venv with the pinned dependencies (PYTHON= names the interpreter)

demo: .venv/.ready  ## 25 clients fine-tune the embedded model with Fed-SB, on this machine, in minutes
	@$(BIN)/fedsim run $(ARGS)

test: .venv/.ready  ## the tests that take seconds
	@$(BIN)/pytest -q -n auto --maxprocesses 4 $(ARGS)

test-slow: .venv/.ready-slow  ## real processes, many kills, Ray: minutes
	@$(BIN)/pytest -q -m slow $(ARGS)

test-gpu: .venv/.ready  ## the tests that need a GPU; skipped without one
	@$(BIN)/pytest -q -m gpu $(ARGS)

bench: .venv/.ready-bench  ## measure fedsim beside its peers and write the tables of docs/performance.md (ARGS=--quick: 6 minutes)
	@$(BIN)/python -m experiments.benchmarks $(ARGS)

check: .venv/.ready  ## format, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

clean:  ## remove caches and build products; runs and .venv stay
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

.venv/.ready: pyproject.toml requirements.lock
	@.ci/setup dev
	@touch $@

.venv/.ready-slow: .venv/.ready
	@.ci/setup dev,simulation
	@touch $@

.venv/.ready-bench: .venv/.ready
	@.ci/setup dev,simulation,bench
	@touch $@
