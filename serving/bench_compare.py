"""`bench compare`: ways of sampling against each other on one engine, interleaved in one run.

Hides the pairing: round by round every way runs the same prompts, so that drift of the machine hits all alike.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from jaxinfer.config import ConfigError
from jaxinfer.request import SamplingParams
from serving.bench_drive import Run, all_running_step_s, drive, equal_prompts
from serving.bench_latency import summarize_latency
from serving.bench_options import add_hosts, add_model, open_engine, positive, sampling
from serving.bench_report import Ceilings, Reporter, common_report

DEFAULT = ("greedy", "temperature=1,top_p=0.9")


def add_parser(kinds: argparse._SubParsersAction) -> None:
    parser = kinds.add_parser("compare", allow_abbrev=False, help="compare ways of sampling on one engine, interleaved")
    add_model(parser)
    add_hosts(parser)
    parser.add_argument(
        "--sampling",
        action="append",
        type=sampling,
        metavar="SPEC",
        help=f"greedy, or NAME=VALUE,.. ; the first is the baseline (default: {' and '.join(DEFAULT)})",
    )
    parser.add_argument("--batch-size", type=positive, default=16, help="requests at once (default: 16)")
    parser.add_argument("--input-len", type=positive, default=32, help="prompt tokens (default: 32)")
    parser.add_argument("--output-len", type=positive, default=64, help="output tokens (default: 64)")
    parser.add_argument(
        "--rounds", type=positive, default=3, help="times each runs, after one that does not count (default: 3)"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    reporter = Reporter(as_json=args.json)
    variants: dict[str, SamplingParams] = dict(args.sampling or [sampling(text) for text in DEFAULT])
    if len(variants) < 2:
        raise ConfigError(f"compare needs two different --sampling options, got {', '.join(variants)}")
    limits = Ceilings(args.dtype)
    engine = open_engine(args, reporter, num_seqs=args.batch_size, longest=args.input_len + args.output_len)
    runs: dict[str, list[Run]] = {name: [] for name in variants}
    for number in range(1 + args.rounds):
        prompts = equal_prompts(engine, args.batch_size, args.input_len, args.output_len, number)
        for name, params in variants.items():
            reporter.note(f"round {number} of {args.rounds}: {name}")
            done = drive(engine, prompts, params, label=f"{number}-{name}")
            if number:
                runs[name].append(done)
    baseline = next(iter(runs.values()))
    report = {
        **summarize_latency(baseline, engine.model, args.input_len, args.output_len, args.dtype, limits.report()),
        **compare_runs(runs),
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        **common_report(engine),
    }
    engine.close()
    reporter.finish(f"Sampling: {' against '.join(variants)}", report)
    return 0 if report["failed"] == 0 else 1


def compare_runs(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Tokens per second of each variant (median, lowest, highest) and the last variant's ratio to the first.

    Ratios are medians of the ratios within each round.
    """
    rates = {name: [_rate(done) for done in each] for name, each in runs.items()}
    decode = {
        name: [len(done.records) / all_running_step_s(done.records) for done in each] for name, each in runs.items()
    }
    first, last = next(iter(runs)), next(reversed(runs))
    return {
        "failed": sum(record.error is not None for each in runs.values() for done in each for record in done.records),
        "baseline": first,
        "ratio": statistics.median(b / a for a, b in zip(rates[first], rates[last], strict=True)),
        "decode_ratio": statistics.median(b / a for a, b in zip(decode[first], decode[last], strict=True)),
        "variants": {
            name: {
                "output_throughput": statistics.median(rates[name]),
                "lowest": min(rates[name]),
                "highest": max(rates[name]),
                "decode_tokens_per_s": statistics.median(decode[name]),
                "output_throughput_all": rates[name],
            }
            for name in runs
        },
    }


def _rate(done: Run) -> float:
    return sum(record.num_output_tokens for record in done.records) / done.duration_s
