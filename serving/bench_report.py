"""What every benchmark reports: the machine's ceilings, versions and device; as one JSON document or a table.

Hides where output goes: the document or table alone on stdout, progress on stderr.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxinfer.engine import Engine
from jaxinfer.perf import hardware

# Rows of the table, in sections: key -> (label, format). Keys that a report lacks are left out.
SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "run": {
        "completed": ("Completed requests", "{:d}"),
        "failed": ("Failed requests", "{:d}"),
        "duration": ("Duration", "{:.2f} s"),
        "total_input_tokens": ("Input tokens", "{:,d}"),
        "total_output_tokens": ("Output tokens", "{:,d}"),
        "request_throughput": ("Requests", "{:.2f} /s"),
        "request_goodput": ("Requests within limits", "{:.2f} /s"),
        "input_throughput": ("Input throughput", "{:,.1f} tok/s"),
        "output_throughput": ("Output throughput", "{:,.1f} tok/s"),
        "ideal_duration": ("Ideal duration", "{:.2f} s"),
        "fraction_of_ideal": ("Fraction of ideal", "{:.3f}"),
        "avg_latency": ("Mean latency", "{:.3f} s"),
        "prefill_s": ("Prefill", "{:.4f} s"),
        "decode_step_ms": ("Decode step", "{:.3f} ms"),
        "mbu_ratio": ("MBU, last batch size over first", "{:.3f}"),
        "ratio": ("Ratio of tokens/s", "{:.3f}"),
        "decode_ratio": ("Ratio of decode tokens/s", "{:.3f}"),
    },
    "machine": {
        "mbu": ("Decode MBU", "{:.3f}"),
        "mfu_prefill": ("Prefill MFU", "{:.3f}"),
        "read_bandwidth_gbps": ("Read bandwidth", "{:.1f} GB/s"),
        "matmul_tflops": ("Matmul rate", "{:.3f} TFLOP/s"),
        "host_us_per_loop": ("Host time per loop", "{:.0f} µs"),
        "compiles_after_warmup": ("Compiles after warm-up", "{:d}"),
        "pipeline_bubble": ("Pipeline bubble, of stages' ticks", "{:.3f}"),
    },
}


class Reporter:
    """Progress on stderr, the result on stdout."""

    def __init__(self, *, as_json: bool):
        self.as_json = as_json
        self.stderr = Console(stderr=True, highlight=False)

    def note(self, text: str) -> None:
        """One line of progress; in place of the last one on a terminal."""
        if self.stderr.is_terminal:
            self.stderr.print(text[: self.stderr.width - 1].ljust(self.stderr.width - 1), end="\r")

    def finish(self, title: str, report: Mapping[str, Any]) -> None:
        """Print the whole result."""
        if self.as_json:
            sys.stdout.write(json.dumps(report, indent=2, default=_plain) + "\n")
            sys.stdout.flush()
            return
        Console(highlight=False).print(_table(title, report))


class Ceilings:
    """The machine's limits, measured when the benchmark begins and again when it ends; the better one counts."""

    def __init__(self, dtype: str):
        self._dtype = dtype
        self._first = hardware.measure(dtype)

    def report(self) -> dict[str, Any]:
        last = hardware.measure(self._dtype)
        return {
            "read_bandwidth_gbps": max(self._first.read_bandwidth_gbps, last.read_bandwidth_gbps),
            "matmul_tflops": max(self._first.matmul_tflops, last.matmul_tflops),
            "ceilings": {"before": vars(self._first), "after": vars(last)},
        }


def common_report(engine: Engine) -> dict[str, Any]:
    """Fields that every report of a run engine has, but for the ceilings."""
    stats = engine.stats()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model_id": engine.model_dir.name,
        "dtype": engine.config.dtype,
        "seed": engine.config.seed,
        "host_us_per_loop": stats.host_us_per_loop,
        "num_loops": stats.num_calls,
        "num_preemptions": stats.num_preemptions,
        "compiles_after_warmup": stats.compiles_after_warmup,
        **({"pipeline_bubble": stats.pipeline_bubble} if engine.blueprint.parallel.stages > 1 else {}),
        "device": hardware.describe_device(),
        "versions": versions(),
        "engine": engine.info(),
        "config": {**vars(engine.config), "compilation_cache_dir": None},  # a path of this machine, of no interest
    }


def versions() -> dict[str, str]:
    return {
        "jaxinfer": importlib.metadata.version("jaxinfer"),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _table(title: str, report: Mapping[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for rows in SECTIONS.values():
        for key, (label, form) in rows.items():
            if report.get(key) is not None:
                table.add_row(label, form.format(report[key]))
    for name, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2el", "End to end")):
        if report.get(f"median_{name}_ms") is not None:
            numbers = [report[f"{kind}_{name}_ms"] for kind in ("median", "p90", "p99")]
            table.add_row(f"{label} median / p90 / p99", " / ".join(f"{n:.2f}" for n in numbers) + " ms")
    for name, row in (report.get("variants") or {}).items():
        table.add_row(f"{name}", f"{row['output_throughput']:.1f} tok/s ({row['lowest']:.1f} to {row['highest']:.1f})")
    for name, start in (report.get("starts") or {}).items():
        phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in start["phases_s"].items())
        table.add_row(f"{name} start: first token", f"{start['first_token_s']:.2f} s ({phases})")
    device, version = report["device"], report["versions"]
    table.add_row("Device", f"{device['processor']} · {device['platform']} · jax {version['jax']}")
    return table


def _plain(value: Any) -> Any:
    """numpy numbers and paths as JSON has them."""
    if isinstance(value, np.generic):
        return value.item()
    return str(value)
