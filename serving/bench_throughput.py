"""`bench throughput`: a trace of requests through an engine in this process, beside the ideal time for that trace.

Hides who queues: by default requests wait in the engine, as an offline job's do; `--queue-ahead 0` is a closed loop.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jaxinfer.engine import Engine
from jaxinfer.perf.metrics import parse_goodput, request_goodput, serving_metrics
from jaxinfer.perf.roofline import decode_step_bytes, mbu, mfu, prefill_flops
from jaxinfer.perf.simulate import StepCosts, TraceItem, ideal_duration_s
from serving.bench_drive import Calibration, calibrate, drive
from serving.bench_options import (
    add_hosts,
    add_lengths,
    add_model,
    add_sampling,
    flag_type,
    model_of,
    open_engine,
    positive,
    sampling_from,
)
from serving.bench_report import Ceilings, Reporter, common_report
from serving.bench_trace import TraceRequest, draw_trace, save_trace
from serving.several_hosts import team_of


def add_parser(kinds: argparse._SubParsersAction) -> None:
    parser = kinds.add_parser(
        "throughput", allow_abbrev=False, help="run a trace of requests; compare with the ideal for that trace"
    )
    add_model(parser)
    add_hosts(parser)
    add_sampling(parser)
    add_lengths(parser, input_len="128", output_len="64")
    parser.add_argument("--num-prompts", type=positive, default=100, help="requests (default: 100)")
    parser.add_argument(
        "--max-concurrency", type=positive, default=None, help="requests that run at once (default: the slots)"
    )
    parser.add_argument(
        "--queue-ahead",
        type=flag_type(_whole),
        default=None,
        metavar="N",
        help="requests that wait in the engine beyond those that run (default: all; 0: a closed loop)",
    )
    parser.add_argument(
        "--request-rate",
        type=flag_type(_rate),
        default=math.inf,
        metavar="PER_S",
        help="arrivals per second (default: inf, all at once)",
    )
    parser.add_argument(
        "--burstiness", type=flag_type(_rate), default=1.0, help="gamma shape of the gaps; 1 is Poisson (default: 1)"
    )
    parser.add_argument(
        "--goodput", type=flag_type(parse_goodput), default=None, help="limits in ms, as in ttft:200,tpot:50"
    )
    parser.add_argument(
        "--repeats", type=positive, default=1, help="runs of the same trace; the median one counts (default: 1)"
    )
    parser.add_argument("--save-trace", type=Path, default=None, help="write the trace as JSON to this file")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    reporter = Reporter(as_json=args.json)
    slots = args.max_num_seqs or args.max_concurrency or 16
    _, model = model_of(args)
    trace = draw_trace(
        num_prompts=args.num_prompts,
        input_len=args.input_len,
        output_len=args.output_len,
        vocab_size=model.vocab_size,
        max_model_len=args.max_model_len or model.max_position,
        seed=args.seed,
        request_rate=args.request_rate,
        burstiness=args.burstiness,
    )
    if args.save_trace is not None and not team_of(args).follows:
        save_trace(trace, args.save_trace)
    ceilings = Ceilings(args.dtype)
    longest = max(len(item.prompt_token_ids) + item.output_len for item in trace)
    engine = open_engine(args, reporter, num_seqs=slots, longest=longest)
    measured = measure(args, engine, trace, reporter)
    limits = ceilings.report()
    report = {**_head(args), **measured, **common_report(engine), **limits}
    report |= _use_of_machine(engine, measured["calibration"], limits)
    engine.check()
    engine.close()
    reporter.finish(f"Throughput: {args.num_prompts} prompts, {args.batching} batching, {slots} slots", report)
    return 0 if report["failed"] == 0 else 1


def measure(args: argparse.Namespace, engine: Engine, trace: list[TraceRequest], reporter: Reporter) -> dict[str, Any]:
    """Calibrate, run the trace `repeats` times, calibrate again; the run of median output throughput, and the ideal."""
    params = sampling_from(args)
    slots = engine.config.max_num_seqs
    running = min(slots, args.max_concurrency or slots)
    kv_rows = round(float(np.mean([len(item.prompt_token_ids) + item.output_len / 2 for item in trace])))
    reporter.note("measuring step times")
    calibrations = [calibrate(engine, params, kv_rows=kv_rows, num_slots=running, seed=args.seed)]
    runs = []
    for repeat in range(args.repeats):
        with _progress(reporter, len(trace), f"run {repeat + 1} of {args.repeats}") as update:
            runs.append(
                drive(
                    engine,
                    trace,
                    params,
                    max_outstanding=_max_outstanding(args, slots),
                    label=f"run{repeat}",
                    progress=update,
                )
            )
    reporter.note("measuring step times again")
    calibrations.append(calibrate(engine, params, kv_rows=kv_rows, num_slots=running, seed=args.seed + 1))
    costs = _mean_costs(calibrations)
    median_run = sorted(runs, key=lambda one: one.duration_s)[len(runs) // 2]
    items = [TraceItem(item.arrival_s, len(item.prompt_token_ids), item.output_len) for item in trace]
    ideal_s = ideal_duration_s(items, running, costs)
    report = serving_metrics(median_run.records, median_run.duration_s)
    if args.goodput is not None:
        report["request_goodput"] = request_goodput(median_run.records, args.goodput, median_run.duration_s)
    return {
        **report,
        "durations": [one.duration_s for one in runs],
        "cached_input_tokens": sum(record.num_cached_tokens for record in median_run.records),
        "ideal_duration": ideal_s,
        "fraction_of_ideal": ideal_s / median_run.duration_s,
        "calibration": {
            "decode_step_ms": {str(n): 1e3 * s for n, s in costs.decode_step_s.items()},
            "prefill_us_per_token": 1e6 * costs.prefill_token_s,
            "full_prefill_step_ms": 1e3 * float(np.mean([c.prefill_step_s for c in calibrations])),
            "full_prefill_step_tokens": calibrations[0].prefill_step_tokens,
            "kv_rows": calibrations[0].kv_rows,
            "running": running,
        },
    }


def _mean_costs(calibrations: list[Calibration]) -> StepCosts:
    """The mean of the calibrations before and after the run: the machine may have drifted in between."""
    sizes = calibrations[0].costs.decode_step_s
    decode_s = {n: float(np.mean([c.costs.decode_step_s[n] for c in calibrations])) for n in sizes}
    return StepCosts(decode_s, float(np.mean([c.costs.prefill_token_s for c in calibrations])))


def _use_of_machine(engine: Engine, calibration: dict[str, Any], limits: dict[str, Any]) -> dict[str, float]:
    """MBU of a decode step with every slot running, and MFU of a full prefill step, both as calibrated."""
    running = calibration["running"]
    dtype_bytes = jnp.dtype(engine.config.dtype).itemsize
    num_bytes = decode_step_bytes(engine.model, [calibration["kv_rows"]] * running, dtype_bytes)
    step_s = calibration["decode_step_ms"][str(running)] / 1e3
    tokens = calibration["full_prefill_step_tokens"]
    prefill_s = calibration["full_prefill_step_ms"] / 1e3
    return {
        "decode_step_ms": 1e3 * step_s,
        "mbu": mbu(num_bytes, step_s, limits["read_bandwidth_gbps"]),
        "mfu_prefill": mfu(prefill_flops(engine.model, tokens), prefill_s, limits["matmul_tflops"]),
    }


def _max_outstanding(args: argparse.Namespace, slots: int) -> float:
    """Unfinished requests the engine may hold. Its slots bound what runs only where there are no more than allowed."""
    if args.max_concurrency is None:
        return math.inf
    if slots > args.max_concurrency:
        return args.max_concurrency
    return math.inf if args.queue_ahead is None else args.max_concurrency + args.queue_ahead


def _head(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "num_prompts": args.num_prompts,
        "max_concurrency": args.max_concurrency,
        "queue_ahead": args.queue_ahead,
        "request_rate": args.request_rate if math.isfinite(args.request_rate) else "inf",
        "burstiness": args.burstiness,
        "batching": args.batching,
        "input_len": args.input_len.text,
        "output_len": args.output_len.text,
        "sampling": {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p},
    }


@contextmanager
def _progress(reporter: Reporter, total: int, text: str) -> Iterator[Callable[[int], None]]:
    """A progress bar of finished requests on stderr, on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = reporter.stderr
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=total)
        yield lambda finished: bar.update(task, completed=finished)


def _whole(text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"{text!r} must be a whole number of at least 0")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise ValueError(f"{text!r} must be a number above 0")
    return value
