"""Run the bars of docs/performance.md on this machine, in order of importance, within a time budget.

Every bar is one command in a process of its own. Results are written after each one to
benchmarks/results/<device>-<date>.json; the markdown table of all of them is printed at the end.

    python benchmarks/run_bars.py --models build/models --hf-python /path/to/torch/env/bin/python
    python benchmarks/run_bars.py --only continuous,host-16
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxinfer.perf.hardware import describe_device

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "llama-1b": "--hidden-size 2048 --layers 16 --heads 32 --kv-heads 8 --intermediate-size 8192 "
    "--vocab-size 128256 --tie",
    "llama-150m": "--hidden-size 1024 --layers 12 --heads 16 --kv-heads 4 --intermediate-size 2816 --vocab-size 32000",
}
TRACE = "--num-prompts 500 --input-len 16:512 --output-len lognormal:64:0.8 --seed 0"

Report = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """One bar: its command (see `expand`), what it must reach, and how a report reads as value and text."""

    name: str
    what: str
    must: str
    command: str
    value: Callable[[Report], float]
    text: Callable[[Report], str]
    reached: Callable[[float], bool]
    minutes: float  # expected, on two cores: a bar that does not fit the rest of the budget is skipped


def _throughput_bars() -> list[Bar]:
    """Continuous batching against the ideal, static and dynamic beside it."""
    bars = []
    for batching in ("continuous", "static", "dynamic"):
        judged = batching == "continuous"
        bars.append(
            Bar(
                batching,
                f"{batching} batching, 500 prompts, lognormal outputs, 16 slots",
                "≥ 0.9 of the ideal" if judged else "beside it",
                f"bench throughput {TRACE} --max-concurrency 16 --batching {batching}",
                lambda r: r["fraction_of_ideal"],
                lambda r: (
                    f"{r['fraction_of_ideal']:.3f} of the ideal ({r['output_throughput']:.0f} tok/s out, "
                    f"{r['input_throughput']:.0f} in; {r['duration']:.1f} s, ideal {r['ideal_duration']:.1f} s)"
                ),
                (lambda v: v >= 0.9) if judged else (lambda v: True),
                1.5,
            )
        )
    return bars


BARS: list[Bar] = [
    Bar(
        "decode-1b",
        "decode, batch 1, bf16, 1B shape, against Hugging Face generate",
        "faster; aim for MBU 0.60",
        "compare latency {llama-1b} --fixed-input-len 128 --fixed-output-len 64 --rounds 3",
        lambda r: r["decode_s_per_token"]["ratio"],
        lambda r: (
            f"{r['decode_s_per_token']['ratio']:.2f}x ({_ms(r, 'jaxinfer')} against {_ms(r, 'hugging_face')} "
            f"ms/token), MBU {r['mbu']:.2f}; prefill of 128 {r['prefill_s']['ratio']:.2f}x"
        ),
        lambda v: v > 1.0,
        4,
    ),
    Bar(
        "batches-150m",
        "150M shape, 32 requests, 16 at a time, against the better of Hugging Face's two",
        "≥ 3x tokens/s",
        "compare throughput {llama-150m} --num-prompts 32 --input-len 16:512 --output-len 8:128 --rounds 3",
        lambda r: r["ratio"],
        lambda r: (
            f"{r['ratio']:.2f}x ({_tps(r, 'jaxinfer')} tok/s; generate {_tps(r, 'hf_batches')}, "
            f"continuous {_tps(r, 'hf_continuous')})"
        ),
        lambda v: v >= 3.0,
        5,
    ),
    *_throughput_bars()[:1],
    Bar(
        "batch16-1b",
        "decode, 16 sequences, 1B shape",
        "MBU ≥ 0.85x of batch 1's",
        "bench latency {llama-1b} --batch-size 1,16 --input-len 128 --output-len 64 --num-iters 3",
        lambda r: r["mbu_ratio"],
        lambda r: (
            f"{r['mbu_ratio']:.2f}x (MBU {r['batches']['1']['mbu']:.2f} at 1, {r['batches']['16']['mbu']:.2f} at 16: "
            f"{r['batches']['16']['decode_tokens_per_s']:.1f} tok/s)"
        ),
        lambda v: v >= 0.85,
        4,
    ),
    Bar(
        "prefill-1b",
        "prefill of 512 tokens, 1B shape",
        "MFU ≥ 0.45",
        "bench latency {llama-1b} --input-len 512 --output-len 2 --num-iters 5",
        lambda r: r["mfu_prefill"],
        lambda r: f"MFU {r['mfu_prefill']:.2f} ({r['prefill_s']:.2f} s; {r['matmul_tflops']:.3f} TFLOP/s measured)",
        lambda v: v >= 0.45,
        2,
    ),
    Bar(
        "host-16",
        "host time per loop call, shipped model, 16 slots",
        "≤ 300 µs",
        f"bench throughput {TRACE} --max-concurrency 16 --batching continuous",
        lambda r: r["host_us_per_loop"],
        lambda r: f"{r['host_us_per_loop']:.0f} µs; {r['compiles_after_warmup']} compiles after warm-up",
        lambda v: v <= 300,
        1.5,
    ),
    Bar(
        "host-256",
        "host time per loop call, shipped model, 256 slots",
        "≤ 1 ms",
        "bench throughput --num-prompts 768 --input-len 16:64 --output-len 32:128 --seed 0 --max-concurrency 256",
        lambda r: r["host_us_per_loop"],
        lambda r: f"{r['host_us_per_loop']:.0f} µs",
        lambda v: v <= 1000,
        2,
    ),
    Bar(
        "top-p",
        "top-p 0.9 against greedy, 16 slots, 128k vocabulary (1B shape)",
        "≥ 0.95x tokens/s",
        "bench compare {llama-1b} --batch-size 16 --input-len 16 --output-len 48 --rounds 3",
        lambda r: r["ratio"],
        lambda r: f"{r['ratio']:.3f}x (decode alone {r['decode_ratio']:.3f}x)",
        lambda v: v >= 0.95,
        3,
    ),
    Bar(
        "compiles",
        "compiles after warm-up over 500 mixed requests",
        "0",
        f"bench throughput {TRACE} --max-concurrency 16 --temperature 1 --top-p 0.9 --queue-ahead 4",
        lambda r: r["compiles_after_warmup"],
        lambda r: f"{r['compiles_after_warmup']} ({r['completed']} requests)",
        lambda v: v == 0,
        1.5,
    ),
    Bar(
        "demo",
        "`make demo` on a fresh clone, packages downloaded: set-up and first token; second start",
        "≤ 60 s; ≤ 10 s",
        "demo",
        lambda r: r["fresh_s"],
        lambda r: (
            f"{r['fresh_s']:.1f} s (set-up {r['setup_s']:.1f}, first token {r['cold_s']:.1f}); "
            f"second {r['warm_s']:.1f} s"
        ),
        lambda v: v <= 60,
        4,
    ),
    Bar(
        "startup",
        "shipped model: new process to first token, empty cache and second start",
        "beside it",
        "bench startup",
        lambda r: r["avg_warm_first_token_time"],
        lambda r: f"{r['avg_cold_first_token_time']:.1f} s, then {r['avg_warm_first_token_time']:.1f} s",
        lambda v: True,
        2,
    ),
    *_throughput_bars()[1:],
]


def _ms(report: Report, side: str) -> str:
    return f"{1e3 * report['decode_s_per_token'][side]['median']:.0f}"


def _tps(report: Report, side: str) -> str:
    found = report["output_throughput"].get(side)
    return f"{found['median']:.1f}" if found else "does not run"


def expand(bar: Bar, args: argparse.Namespace) -> list[str]:
    """The bar's command line: `bench ..` is ours, `compare ..` is compare_hf.py, {name} a random-weight model."""
    words = [str(model_dir(args.models, word[1:-1])) if word.startswith("{") else word for word in bar.command.split()]
    if words[0] == "compare":
        script = str(ROOT / "benchmarks" / "compare_hf.py")
        return [sys.executable, script, *words[1:], "--hf-python", str(args.hf_python)]
    return [sys.executable, "-m", "serving.cli", *words, "--json"]


def model_dir(models: Path, name: str) -> Path:
    """The directory of a random-weight model, made when it is not there."""
    directory = models / name
    if not (directory / "config.json").exists():
        script = str(ROOT / "scripts" / "make_random_model.py")
        command = [sys.executable, script, "--arch", "llama", *SHAPES[name].split(), "--out", str(directory)]
        subprocess.run(command, check=True, stdout=sys.stderr, cwd=ROOT)
    return directory


def run_json(command: list[str], timeout_s: float, cwd: Path = ROOT, **environment: str) -> Report:
    """Run a command and parse its stdout. RuntimeError with the end of its stderr when it fails."""
    environment = {**os.environ, **environment}
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr.strip()[-600:]}")
    return json.loads(done.stdout)


def run_demo(timeout_s: float) -> Report:
    """Clone, set up and start as a newcomer does, then start again: seconds to the first token each time."""
    with tempfile.TemporaryDirectory(prefix="jaxinfer-demo-") as root:
        clone, cache = Path(root) / "clone", Path(root) / "cache"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        began = time.monotonic()
        subprocess.run(["make", "setup"], cwd=clone, check=True, stdout=sys.stderr, timeout=timeout_s)
        setup_s = time.monotonic() - began
        command = [str(clone / ".venv" / "bin" / "jaxinfer"), "demo", "--json"]
        cold = run_json(command, timeout_s, clone, XDG_CACHE_HOME=str(cache))
        warm = run_json(command, timeout_s, clone, XDG_CACHE_HOME=str(cache))
    cold_s, warm_s = cold["first_token_s"], warm["first_token_s"]
    return {"setup_s": setup_s, "cold_s": cold_s, "warm_s": warm_s, "fresh_s": setup_s + cold_s}


def run_bar(bar: Bar, args: argparse.Namespace, timeout_s: float, done: dict[str, Report]) -> Report:
    """One row of the results: the report, or why there is none. `done`: reports of this run by command, reused."""
    began = time.monotonic()
    row: Report = {"name": bar.name, "what": bar.what, "must": bar.must, "load_before": os.getloadavg()[0]}
    try:
        if bar.command in done:
            row["report"] = done[bar.command]
        elif bar.command == "demo":
            row["report"] = run_demo(timeout_s)
        else:
            row["command"] = bar.command  # as written above: results hold no path of the machine
            row["report"] = run_json(expand(bar, args), timeout_s)
    except (RuntimeError, ValueError, subprocess.SubprocessError, OSError) as error:
        row |= {"measured": f"failed: {str(error).splitlines()[-1][:160]}", "error": str(error), "reached": None}
    else:
        done[bar.command] = row["report"]
        value = float(bar.value(row["report"]))
        row |= {"value": value, "measured": bar.text(row["report"]), "reached": bar.reached(value)}
    return row | {"took_s": time.monotonic() - began}


def table(rows: list[Report]) -> str:
    """The rows as markdown."""
    lines = ["| Bar | What | Must reach | Measured | Reached |", "|---|---|---|---|---|"]
    for row in rows:
        verdict = {True: "yes", False: "**no**", None: "–"}[row["reached"]]
        lines.append(f"| {row['name']} | {row['what']} | {row['must']} | {row['measured']} | {verdict} |")
    return "\n".join(lines)


def chosen_bars(args: argparse.Namespace) -> list[Bar]:
    names = [bar.name for bar in BARS]
    wanted = args.only.split(",") if args.only else names
    for name in wanted:
        if name not in names:
            raise SystemExit(f"--only {name!r} is not one of {', '.join(names)}")
    chosen = [bar for bar in BARS if bar.name in wanted]
    if args.hf_python is None:
        left_out = [bar.name for bar in chosen if bar.command.startswith("compare")]
        if left_out:
            print(f"without --hf-python: {', '.join(left_out)} left out", file=sys.stderr)
        chosen = [bar for bar in chosen if bar.name not in left_out]
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", type=Path, default=ROOT / "build" / "models", help="random-weight models, made there when missing"
    )
    parser.add_argument(
        "--hf-python", type=Path, default=None, help="python of the environment with torch and transformers"
    )
    parser.add_argument("--only", default=None, metavar="NAME,..", help="only these bars")
    parser.add_argument(
        "--budget-minutes", type=float, default=25.0, help="start no bar that would go over (default: 25)"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="results file (default: benchmarks/results/<device>-<date>.json)"
    )
    parser.add_argument("--list", action="store_true", help="print the bars and their commands")
    args = parser.parse_args()
    if args.list:
        for bar in BARS:
            print(f"{bar.name:14} {bar.must:24} {bar.command}")
        return 0
    device = describe_device()
    slug = re.sub(r"[^a-z0-9]+", "-", f"{device['platform']}-{device['processor']}-{os.cpu_count()}-cores".lower())
    now = datetime.now(UTC)
    out = args.out or ROOT / "benchmarks" / "results" / f"{slug}-{now:%Y-%m-%d}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    earlier = {row["name"]: row for row in json.loads(out.read_text())["bars"]} if out.exists() else {}
    deadline = time.monotonic() + 60 * args.budget_minutes
    done: dict[str, Report] = {}
    for bar in chosen_bars(args):
        left_s = deadline - time.monotonic()
        if left_s < 60 * bar.minutes:
            print(f"{bar.name}: skipped, {left_s / 60:.1f} of its {bar.minutes:g} minutes are left", file=sys.stderr)
            continue
        row = run_bar(bar, args, max(60.0, left_s), done)
        print(f"{bar.name}: {row['measured']}  [{row['took_s']:.0f} s]", file=sys.stderr, flush=True)
        earlier[bar.name] = row
        rows = [earlier[each.name] for each in BARS if each.name in earlier]
        document = {"date": now.isoformat(timespec="seconds"), "device": device, "cores": os.cpu_count(), "bars": rows}
        out.write_text(json.dumps(document, indent=1) + "\n")
    print(table([earlier[bar.name] for bar in BARS if bar.name in earlier]))
    print(f"\nwritten to {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
