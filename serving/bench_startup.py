"""`bench startup`: seconds from a fresh process to a ready engine and its first token, cold and warm.

Hides the processes: each start is a new one, timed from before it exists; cold means an empty compilation cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.config import EngineConfig
from serving.bench_options import add_model, model_of, positive
from serving.bench_report import Reporter
from serving.flags import config_from

CHILD = "serving.bench_startup_child"
PHASES = ("import", "load", "compile", "first_token")
PERCENTAGES = (10, 25, 50, 75, 90, 99)


def add_parser(kinds: argparse._SubParsersAction) -> None:
    parser = kinds.add_parser(
        "startup", allow_abbrev=False, help="time a fresh process to its first token, cold and warm"
    )
    add_model(parser, skip={"compilation_cache_dir"})
    parser.add_argument("--num-iters-cold", type=positive, default=1, help="starts with an empty cache (default: 1)")
    parser.add_argument("--num-iters-warm", type=positive, default=1, help="starts with the cache (default: 1)")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    reporter = Reporter(as_json=args.json)
    directory, _ = model_of(args)
    config = config_from(args, EngineConfig, max_num_seqs=args.max_num_seqs or EngineConfig().max_num_seqs)
    starts: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory(prefix="jaxinfer-startup-") as root:
        counts = {"cold": args.num_iters_cold, "warm": args.num_iters_warm}
        for kind, count in counts.items():
            for number in range(count):
                reporter.note(f"{kind} start {number + 1} of {count}")
                # a cold start gets a directory of its own; warm ones find what the last cold one left
                cache = Path(root) / str(number if kind == "cold" else args.num_iters_cold - 1)
                last = kind == "warm" and number == count - 1
                starts[kind].append(start_once(directory, {**vars(config), "compilation_cache_dir": str(cache)}, last))
    report = {
        **starts["warm"][-1].pop("report"),
        **summarize_starts(starts),
        "failed": 0,
    }
    reporter.finish(f"Startup: {directory.name}", report)
    return 0


def start_once(directory: Path, config: dict[str, Any], measure: bool) -> dict[str, Any]:
    """Start an engine in a new process. {"phases_s", "ready_s", "first_token_s", ...}; RuntimeError with its stderr."""
    order = json.dumps({"model": str(directory), "config": config, "measure": measure})
    began = time.time()
    done = subprocess.run([sys.executable, "-m", CHILD], input=order, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the started process failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    answer = json.loads(done.stdout)
    return {**phases(began, answer.pop("ends")), **answer}


def phases(began_s: float, ends: dict[str, float]) -> dict[str, Any]:
    """Seconds of each phase from the moment each one ended, on one clock."""
    times = [began_s, *(ends[phase] for phase in PHASES)]
    lasted = {phase: times[i + 1] - times[i] for i, phase in enumerate(PHASES)}
    return {"phases_s": lasted, "ready_s": ends["compile"] - began_s, "first_token_s": ends["first_token"] - began_s}


def summarize_starts(starts: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """vLLM's startup keys (startup: process start to ready; compilation: the compile phase), and the median start."""
    report: dict[str, Any] = {"starts": {}}
    for kind, each in starts.items():
        for name, values in (
            ("startup", [s["ready_s"] for s in each]),
            ("compilation", [s["phases_s"]["compile"] for s in each]),
            ("first_token", [s["first_token_s"] for s in each]),
        ):
            report[f"avg_{kind}_{name}_time"] = statistics.fmean(values)
            report[f"{kind}_{name}_times"] = values
            report[f"{kind}_{name}_percentiles"] = {str(q): float(np.percentile(values, q)) for q in PERCENTAGES}
        report["starts"][kind] = sorted(each, key=lambda s: s["first_token_s"])[len(each) // 2]
    report["compiles_after_warmup"] = max(s["compiles_after_warmup"] for each in starts.values() for s in each)
    return report
