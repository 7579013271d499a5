"""`jaxinfer check`: is the served model the model that another stack ran? By its logits, from a file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from jaxinfer.config import ConfigError, EngineConfig
from serving.flags import add_config_flags, config_from

_SKIP = ("seed",)  # nothing is sampled


def add_check_parser(subparsers: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `check` to the CLI."""
    parser = subparsers.add_parser(
        "check", parents=parents, allow_abbrev=False, help="compare a model's logits with those of another stack"
    )
    parser.add_argument(
        "--against", required=True, metavar="FILE", help="safetensors with `tokens` and `logits`; docs/evaluation.md"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="most that max|ours - theirs| / max|theirs| may be (default: 2e-4 in float32, 5e-2 in bfloat16)",
    )
    add_config_flags(parser, EngineConfig, skip=_SKIP, dtype="float32", prefix_caching=False)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Compare every prompt of the file; 0 when all are within the tolerance, 1 when one is not."""
    from jaxinfer.evaluation.agreement import TOLERANCES, agreement, read_dumps
    from jaxinfer.llm import LLM

    config = config_from(args, EngineConfig, _SKIP)
    tolerance = TOLERANCES[config.dtype] if args.tolerance is None else args.tolerance
    if not 0 <= tolerance < float("inf"):
        raise ConfigError(f"tolerance={tolerance} must be a number of at least 0")
    if not Path(args.against).is_file():
        raise ConfigError(f"--against {args.against!r} is not a file")
    args.progress.update(f"loading {args.model}")
    llm = LLM(args.model, warm_up=False, **dataclasses.asdict(config))
    prompts: list[dict[str, Any]] = []
    for dump in read_dumps(args.against, llm.engine.model, longest=llm.engine.max_model_len - 1):
        args.progress.update(f"prompt {len(prompts) + 1}: {len(dump.token_ids)} tokens")
        prompts.append(agreement(dump, llm.prompt_logits))
    llm.engine.close()
    args.progress.clear()
    passed = all(prompt["relative_error"] <= tolerance for prompt in prompts)
    report = {
        "model": Path(args.model).resolve().name,
        "against": Path(args.against).name,
        "dtype": config.dtype,
        "tolerance": tolerance,
        "passed": passed,
        "prompts": prompts,
    }
    if args.json:
        json.dump(report, sys.stdout, indent=2, allow_nan=False)
        print()
    else:
        _print(report)
    return 0 if passed else 1


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    title = "error: max|ours - theirs| / max|theirs|"
    table = Table("prompt", "tokens", "error", "mean KL", "same first choice", "largest error at", title=title)
    for prompt in report["prompts"]:
        worst = prompt["worst"]
        table.add_row(
            prompt["name"],
            str(prompt["num_tokens"]),
            f"{prompt['relative_error']:.3g}",
            f"{prompt['kl']['mean']:.3g}",
            f"{prompt['top1_agreement']:.2%}",
            f"position {worst['position']}, id {worst['token_id']}\n{worst['ours']:.6g}, theirs {worst['theirs']:.6g}",
        )
    console.print(table)
    ignored = max(prompt["num_columns_ignored"] for prompt in report["prompts"])
    if ignored:
        console.print(f"The file has fewer columns than the model's vocabulary: our last {ignored} were left out.")
    console.print(f"{'PASS' if report['passed'] else 'FAIL'}: tolerance {report['tolerance']:g} in {report['dtype']}")
