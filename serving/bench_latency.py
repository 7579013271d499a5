"""`bench latency`: one batch of equal requests at a time on an engine in this process; several sizes interleave.

Hides how prefill and decode are told apart: TTFT of the whole batch, and the step time while all of it decodes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.engine import Engine
from jaxinfer.perf.metrics import RequestTimes, serving_metrics
from jaxinfer.perf.roofline import decode_step_bytes, mbu, mfu, prefill_flops
from jaxinfer.request import SamplingParams
from serving.bench_drive import Run, all_running_step_s, drive, equal_prompts
from serving.bench_options import (
    SAMPLING_FIELDS,
    add_hosts,
    add_model,
    add_sampling,
    flag_type,
    open_engine,
    positive,
    sampling_from,
)
from serving.bench_report import Ceilings, Reporter, common_report

GREEDY = SamplingParams(temperature=0.0)
PERCENTAGES = (10, 25, 50, 75, 90, 99)


def add_parser(kinds: argparse._SubParsersAction) -> None:
    parser = kinds.add_parser("latency", allow_abbrev=False, help="time one batch: prefill, then decode")
    add_model(parser)
    add_hosts(parser)
    add_sampling(parser)
    parser.add_argument(
        "--batch-size",
        type=flag_type(_sizes),
        default=(1,),
        metavar="N[,N..]",
        help="requests at once; several sizes run interleaved on one engine (default: 1)",
    )
    parser.add_argument("--input-len", type=positive, default=128, help="prompt tokens (default: 128)")
    parser.add_argument("--output-len", type=positive, default=64, help="output tokens (default: 64)")
    parser.add_argument("--num-iters-warmup", type=positive, default=1, help="iterations left out (default: 1)")
    parser.add_argument("--num-iters", type=positive, default=3, help="iterations that count (default: 3)")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    reporter = Reporter(as_json=args.json)
    limits = Ceilings(args.dtype)
    engine = open_engine(args, reporter, num_seqs=max(args.batch_size), longest=args.input_len + args.output_len)
    report = measure_latency(
        engine,
        sampling_from(args),
        batch_sizes=args.batch_size,
        input_len=args.input_len,
        output_len=args.output_len,
        warm_up=args.num_iters_warmup,
        iterations=args.num_iters,
        limits=limits,
        note=reporter.note,
    )
    engine.close()
    reporter.finish(f"Latency: batch {report['batch_size']}, {args.input_len} in, {args.output_len} out", report)
    return 0 if report["failed"] == 0 else 1


def measure_latency(
    engine: Engine,
    sampling: SamplingParams = GREEDY,
    *,
    batch_sizes: Sequence[int] = (1,),
    input_len: int = 128,
    output_len: int = 64,
    warm_up: int = 1,
    iterations: int = 3,
    limits: Ceilings | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The whole report of `warm_up + iterations` rounds of equal batches on an idle engine; the first do not count.

    The top level is the first batch size's; with more than one, "batches" has all and "mbu_ratio" last over first.
    """
    limits = limits or Ceilings(engine.config.dtype)
    runs: dict[int, list[Run]] = {size: [] for size in batch_sizes}
    for number in range(warm_up + iterations):
        for size in runs:
            note(f"round {number + 1} of {warm_up + iterations}: batch {size}")
            prompts = equal_prompts(engine, size, input_len, output_len, number)
            done = drive(engine, prompts, sampling, label=f"round{number}-batch{size}")
            if number >= warm_up:
                runs[size].append(done)
    ceilings = limits.report()
    batches = {
        size: {
            "batch_size": size,
            **summarize_latency(each, engine.model, input_len, output_len, engine.config.dtype, ceilings),
        }
        for size, each in runs.items()
    }
    report = {
        **batches[batch_sizes[0]],
        "sampling": {name: getattr(sampling, name) for name in SAMPLING_FIELDS},
        **common_report(engine),
    }
    if len(batches) > 1:
        report["batches"] = {str(size): each for size, each in batches.items()}
        report["failed"] = sum(each["failed"] for each in batches.values())
        if output_len > 1:
            report["mbu_ratio"] = batches[batch_sizes[-1]]["mbu"] / report["mbu"]
    return report


def summarize_latency(
    runs: list[Run], model: ModelConfig, input_len: int, output_len: int, dtype: str, ceilings: dict[str, Any]
) -> dict[str, Any]:
    """vLLM's latency and serving keys, and what the machine was used for. `runs` hold equal batches."""
    records: list[RequestTimes] = [record for done in runs for record in done.records]
    latencies = [done.duration_s for done in runs]
    prefills = [max(record.ttft_s for record in done.records) for done in runs]
    prefill_s = statistics.median(prefills)
    batch_size = len(runs[0].records)
    flops = batch_size * prefill_flops(model, input_len)
    report: dict[str, Any] = {
        **serving_metrics(records, sum(latencies)),
        "avg_latency": statistics.fmean(latencies),
        "latencies": latencies,
        "percentiles": {str(q): float(np.percentile(latencies, q)) for q in PERCENTAGES},
        "input_len": input_len,
        "output_len": output_len,
        "prefill_s": prefill_s,
        "prefill_s_all": prefills,
        "mfu_prefill": mfu(flops, prefill_s, ceilings["matmul_tflops"]),
        "decode_step_ms": None,
        "decode_tokens_per_s": None,
        "mbu": None,
        **ceilings,
    }
    if output_len > 1:
        steps = [all_running_step_s(done.records) for done in runs]
        step_s = statistics.median(steps)
        num_bytes = decode_step_bytes(model, [input_len + output_len / 2] * batch_size, jnp.dtype(dtype).itemsize)
        report |= {
            "decode_step_ms": 1e3 * step_s,
            "decode_step_ms_all": [1e3 * s for s in steps],
            "decode_tokens_per_s": batch_size / step_s,
            "decode_step_bytes": num_bytes,
            "mbu": mbu(num_bytes, step_s, ceilings["read_bandwidth_gbps"]),
        }
    return report


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) if part.isdigit() else 0 for part in text.split(","))
    if min(sizes) < 1 or len(set(sizes)) != len(sizes):
        raise ValueError(f"{text!r} must be different whole numbers of at least 1, separated by commas")
    return sizes
