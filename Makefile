# Every target makes .venv first (scripts/setup.sh); an up-to-date one costs a few milliseconds.
PYTEST := .venv/bin/python -m pytest
CPU := JAX_PLATFORMS=cpu
# tests of kernels and engines compile most of the time, on one core each; those of servers share the machine badly
IN_PARALLEL := tests/pallas_kernels tests/jaxinfer
# compilers of accelerators that are not here; no asking the network which TPU this is, no lock on one that is not
ACCELERATORS := PYTHONPATH=$(CURDIR)/.venv/accelerators TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 $(CPU)

.PHONY: help setup accelerators demo test test-kernels test-slow lint format bench kernels scale models clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1: /p' Makefile

setup:  ## make .venv, or bring it up to date
	@sh scripts/setup.sh </dev/null

accelerators: setup
	@sh scripts/setup_accelerators.sh </dev/null

demo: setup  ## serve the shipped model over gRPC and stream to eight clients at once
	@.venv/bin/jaxinfer demo

test: setup  ## the default test suite
	@$(CPU) $(PYTEST) $(IN_PARALLEL) -n 2 --dist loadfile $(PYTEST_ARGS)
	@$(CPU) $(PYTEST) $(addprefix --ignore ,$(IN_PARALLEL)) $(PYTEST_ARGS)

test-kernels: accelerators  ## kernels compiled for TPUs and GPUs that are not here, Triton's through its interpreter
	@$(ACCELERATORS) $(PYTEST) -m "accelerators and not slow" -n 2 $(PYTEST_ARGS)

test-slow: accelerators  ## the longer cases
	@$(ACCELERATORS) $(PYTEST) $(IN_PARALLEL) -m slow -n 2 --dist worksteal $(PYTEST_ARGS)
	@$(ACCELERATORS) $(PYTEST) $(addprefix --ignore ,$(IN_PARALLEL)) -m slow $(PYTEST_ARGS)

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

kernels: accelerators  ## compile every kernel for every accelerator and write the table of docs/kernels.md
	@$(ACCELERATORS) .venv/bin/python scripts/kernel_table.py

scale: accelerators  ## compile large models for TPU slices and write the tables of docs/scale.md
	@$(ACCELERATORS) .venv/bin/python scripts/scale_table.py $(SCALE_ARGS)

models: setup  ## run every golden model and write the table of docs/models.md
	@$(CPU) .venv/bin/python scripts/model_table.py

clean:  ## remove what was made here: .venv, caches, build output
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
