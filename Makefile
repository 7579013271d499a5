# Every target makes .venv first (scripts/setup.sh); an up-to-date one costs a few milliseconds.
PYTEST := .venv/bin/python -m pytest
CPU := JAX_PLATFORMS=cpu

.PHONY: help setup demo test test-slow lint format bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1: /p' Makefile

setup:  ## make .venv, or bring it up to date
	@sh scripts/setup.sh </dev/null

demo: setup  ## serve the shipped model over gRPC and stream to eight clients at once
	@.venv/bin/jaxinfer demo

test: setup  ## the default test suite
	@$(CPU) $(PYTEST) $(PYTEST_ARGS)

test-slow: setup  ## the longer cases
	@$(CPU) $(PYTEST) -m slow $(PYTEST_ARGS)

lint: setup  ## ruff and mypy
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

format: setup  ## let ruff rewrite what it can
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

bench: setup  ## latency, throughput and start-up of the shipped model
	@.venv/bin/jaxinfer bench latency
	@.venv/bin/jaxinfer bench throughput
	@.venv/bin/jaxinfer bench startup

clean:  ## remove what was made here: .venv, caches, build output
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
