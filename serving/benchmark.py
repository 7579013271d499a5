"""`jaxinfer bench`: one subcommand per benchmark, each in a module of its own; docs/benchmarking.md explains them."""

from __future__ import annotations

import argparse

import serving.bench_compare
import serving.bench_latency
import serving.bench_startup
import serving.bench_throughput


def add_bench_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `bench` with its subcommands; each sets `func(args) -> exit code`."""
    bench = subparsers.add_parser("bench", help="measure latency, throughput, startup, or one sampling against another")
    kinds = bench.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    serving.bench_latency.add_parser(kinds)
    serving.bench_throughput.add_parser(kinds)
    serving.bench_startup.add_parser(kinds)
    serving.bench_compare.add_parser(kinds)
