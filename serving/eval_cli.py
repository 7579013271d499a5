"""`jaxinfer eval`: perplexity of a text, the distance between two ways of serving, multiple choice.

Hides the flags, engines opened for reading alone, and that a report is the same bytes for the same seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxinfer.config import ConfigError, EngineConfig, flag_fields
from jaxinfer.evaluation.text import BOS_MODES, DEFAULT_WINDOW, WindowOptions, read_text, tokenize, windows
from serving.flags import add_config_flags, arguments_from, config_from, flag_type, positive
from serving.several_hosts import team_of
from sharding.hosts import HostsConfig

if TYPE_CHECKING:
    from jaxinfer.llm import LLM

_SKIP = ("seed",)  # of EngineConfig: nothing is sampled, and --seed is the bootstrap's
_ENGINE_DEFAULTS: dict[str, Any] = {"prefix_caching": False}  # scored prompts are computed in full anyway


def add_eval_parser(subparsers: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `eval` with its subcommands; each sets `func(args) -> exit code`."""
    parser = subparsers.add_parser("eval", help="perplexity, distance between two settings, multiple choice")
    kinds = parser.add_subparsers(title="evaluations", metavar="EVALUATION", required=True)

    ppl = kinds.add_parser("ppl", parents=parents, allow_abbrev=False, help="perplexity of a text file")
    _add_text_flags(ppl)
    add_config_flags(ppl, HostsConfig)
    ppl.set_defaults(func=_ppl)

    compare = kinds.add_parser(
        "compare", parents=parents, allow_abbrev=False, help="KL divergence and agreement of B with A on a text file"
    )
    compare.add_argument("--against", metavar="MODEL", help="B's model directory (default: MODEL, that of A)")
    for side in "ab":
        compare.add_argument(
            f"--{side}",
            dest=f"options_{side}",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            type=flag_type(_engine_option),
            help=f"an engine option of {side.upper()} alone, such as kv_dtype=int8; repeat for more",
        )
    _add_text_flags(compare)
    compare.set_defaults(func=_compare)

    choices = kinds.add_parser(
        "choices", parents=parents, allow_abbrev=False, help="multiple choice, in lm-evaluation-harness's JSON layout"
    )
    choices.add_argument("--task", required=True, metavar="FILE", help="questions, one JSON object per line")
    choices.add_argument("--task-name", metavar="NAME", help="its name in the report (default: the file's)")
    choices.add_argument("--log-samples", metavar="FILE", help="write each question's answer there, as JSONL")
    choices.add_argument("--limit", type=positive, metavar="N", help="take the first N questions alone")
    _add_output_and_engine(choices)
    add_config_flags(choices, HostsConfig)
    choices.set_defaults(func=_choices)


def _add_text_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", required=True, metavar="FILE", help="the text, in UTF-8")
    parser.add_argument(
        "--window", type=positive, metavar="N", help=f"tokens per prompt (default: {DEFAULT_WINDOW}, if so many fit)"
    )
    parser.add_argument(
        "--stride", type=positive, metavar="N", help="tokens between windows (default: half of --window)"
    )
    parser.add_argument("--bos", choices=BOS_MODES, default="start", help="where BOS goes (default: start)")
    parser.add_argument("--limit", type=positive, metavar="N", help="read about the first N tokens of the text alone")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap (default: 0)")
    _add_output_and_engine(parser)


def _add_output_and_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="FILE", help="write the JSON document there, too")
    add_config_flags(parser, EngineConfig, skip=_SKIP, **_ENGINE_DEFAULTS)


# ---- commands --------------------------------------------------------------------------------------------------------


def _ppl(args: argparse.Namespace) -> int:
    from jaxinfer.evaluation.perplexity import perplexity_report, window_nats

    _require_writable(args, args.output)
    text, seed = read_text(args.text), _seed(args)
    config = config_from(args, EngineConfig, _SKIP)
    llm = _open(args, args.model, config)
    options = _window_options(args, llm.engine.max_model_len)
    tokenized = tokenize(text, llm.engine.tokenizer, limit=args.limit)
    found = windows(tokenized, options, llm.engine.model)
    nats = window_nats(found, llm.score, _counter(args, len(found), "windows"))
    report = perplexity_report(tokenized, options, found, nats, seed=seed)
    llm.engine.close()
    return _deliver(args, {"evaluation": "ppl", **_side(args.model, config), **report}, _ppl_rows)


def _compare(args: argparse.Namespace) -> int:
    from jaxinfer.evaluation.divergence import comparison_report, window_divergences

    _require_writable(args, args.output)
    text, seed = read_text(args.text), _seed(args)
    models = (args.model, args.model if args.against is None else args.against)
    _require_directory(models[1])
    common = config_from(args, EngineConfig, _SKIP)
    configs = [
        dataclasses.replace(common, **dict(options), seed=common.seed) for options in (args.options_a, args.options_b)
    ]
    llms = [_open(args, model, config) for model, config in zip(models, configs, strict=True)]
    options = _window_options(args, min(llm.engine.max_model_len for llm in llms))
    tokenized = [tokenize(text, llm.engine.tokenizer, limit=args.limit) for llm in llms]
    _require_one_vocabulary(llms, tokenized)
    found = windows(tokenized[0], options, llms[0].engine.model)
    logits = [llm.prompt_logits for llm in llms]
    rows = window_divergences(found, logits[0], logits[1], _counter(args, len(found), "windows"))
    report = comparison_report(tokenized[0], options, found, rows, seed=seed)
    for side, model, config in zip("ab", models, configs, strict=True):
        report[side] = _side(model, config) | report[side]
    for llm in llms:
        llm.engine.close()
    return _deliver(args, {"evaluation": "compare", **report}, _compare_rows)


def _choices(args: argparse.Namespace) -> int:
    from jaxinfer.evaluation import choices

    _require_writable(args, args.output, args.log_samples)
    questions, num_original = choices.read_questions(args.task, limit=args.limit)
    config = config_from(args, EngineConfig, _SKIP)
    llm = _open(args, args.model, config)
    engine = llm.engine
    if engine.tokenizer is None:
        raise ConfigError("this model directory has no tokenizer.json, so questions cannot be asked")
    answers = choices.answer_all(
        questions,
        llm.score,
        engine.tokenizer,
        engine.model,
        longest=engine.max_model_len - 1,
        on_prompt=_counter(args, sum(len(question.choices) for question in questions), "choices"),
    )
    described = {
        "model": "jaxinfer",
        "model_args": f"pretrained={Path(args.model).resolve().name}",
        "model_dtype": config.dtype,
        "engine": _side(args.model, config)["engine"],
        "limit": args.limit,
    }
    task = args.task_name or Path(args.task).stem
    report = choices.results_document(task, questions, answers, num_original=num_original, config=described)
    if args.log_samples is not None:
        lines = [json.dumps(choices.sample_record(*pair)) for pair in zip(questions, answers, strict=True)]
        _write(args.log_samples, "\n".join(lines) + "\n")
    llm.engine.close()
    return _deliver(args, report, _choices_rows)


# ---- engines and options ---------------------------------------------------------------------------------------------


def _open(args: argparse.Namespace, model: str, config: EngineConfig) -> LLM:
    from jaxinfer.llm import LLM  # imports jax, which takes seconds

    args.progress.update(f"loading {model}")
    team = team_of(args)
    llm = LLM(model, warm_up=False, **team.engine_options(), **dataclasses.asdict(config))
    args.progress.clear()
    team.follow(llm.engine)
    return llm


def _engine_option(text: str) -> tuple[str, Any]:
    """`kv_dtype=int8` -> ("kv_dtype", "int8"), the value in the field's type. ValueError names the choices."""
    name, separator, value = text.partition("=")
    name = name.replace("-", "_")
    names = {spec.name for spec in flag_fields(EngineConfig)} - set(_SKIP)
    if not separator or name not in names:
        raise ValueError(f"{text!r} is not NAME=VALUE with one of the names {', '.join(sorted(names))}")
    annotation = typing.get_type_hints(EngineConfig)[name]
    kinds = [kind for kind in typing.get_args(annotation) or (annotation,) if kind is not type(None)]
    if value == "none" and len(typing.get_args(annotation)) > len(kinds):
        return name, None
    if kinds == [bool]:
        if value not in ("true", "false"):
            raise ValueError(f"{text!r}: {value!r} must be true or false")
        return name, value == "true"
    try:
        return name, kinds[0](value)
    except ValueError:
        raise ValueError(f"{text!r}: {value!r} is not of type {kinds[0].__name__}") from None


def _window_options(args: argparse.Namespace, max_model_len: int) -> WindowOptions:
    return WindowOptions.checked(args.window, args.stride, args.bos, max_model_len=max_model_len)


def _seed(args: argparse.Namespace) -> int:
    if args.seed < 0:
        raise ConfigError(f"seed={args.seed} must be at least 0")
    return args.seed


def _require_directory(model: str) -> None:
    if not Path(model).is_dir():
        raise ConfigError(f"--against {model!r} is not a model directory")


def _require_one_vocabulary(llms: list[LLM], tokenized: list[Any]) -> None:
    sizes = [llm.engine.model.vocab_size for llm in llms]
    if sizes[0] != sizes[1]:
        raise ConfigError(f"A and B have vocabularies of {sizes[0]} and {sizes[1]}: their logits cannot be compared")
    if tokenized[0] != tokenized[1]:
        raise ConfigError("A and B tokenize this text differently: their logits are of different tokens")


def _side(model: str, config: EngineConfig) -> dict[str, Any]:
    """What was run: the directory's name, and the engine's options that are not the default."""
    return {"model": Path(model).resolve().name, "dtype": config.dtype, "engine": arguments_from(config)}


def _counter(args: argparse.Namespace, total: int, things: str) -> Callable[[int], None]:
    return lambda done: args.progress.update(f"{done} of {total} {things}")


# ---- reports ---------------------------------------------------------------------------------------------------------


def _deliver(args: argparse.Namespace, report: dict[str, Any], rows: Callable[[dict[str, Any]], list[Any]]) -> int:
    """Print the report as a table, or with --json as a document; write it to --output."""
    args.progress.clear()
    document = json.dumps(report, indent=2, allow_nan=False) + "\n"
    if args.json:
        sys.stdout.write(document)
    else:
        _print(args, rows(report))
    if args.output is not None:  # last: what cannot be written was at least seen
        _write(args.output, document)
    return 0


def _print(args: argparse.Namespace, rows: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "value", "95% interval", title=f"{args.model}")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


def _require_writable(args: argparse.Namespace, *paths: str | None) -> None:
    """Before hours of work: ConfigError for a file that could not be written after them. Host 0 alone writes."""
    for path in filter(None, () if team_of(args).follows else paths):
        target = Path(path)
        if target.is_dir():
            raise ConfigError(f"{path!r} cannot be written: it is a directory")
        if not os.access(target if target.exists() else target.absolute().parent, os.W_OK):
            raise ConfigError(f"{path!r} cannot be written: it is read-only, or its directory is, or there is none")


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path!r} cannot be written: {error.strerror}") from error


def _row(name: str, estimate: dict[str, Any], digits: int = 4) -> tuple[str, str, str]:
    ends = estimate["ci95"]
    interval = "one window tells none" if ends is None else f"{ends[0]:.{digits}g} to {ends[1]:.{digits}g}"
    return name, f"{estimate['value']:.{digits}g}", interval


def _ppl_rows(report: dict[str, Any]) -> list[Any]:
    names = ("perplexity", "nats_per_token", "bits_per_byte")
    return [
        *(_row(name.replace("_", " "), report[name]) for name in names),
        ("tokens scored", f"{report['num_scored_tokens']:,} in {report['num_windows']:,} windows", ""),
    ]


def _compare_rows(report: dict[str, Any]) -> list[Any]:
    kl = report["kl"]
    return [
        _row("KL(A || B), nats per token", kl),
        ("   median, 99th percentile, largest", f"{kl['median']:.3g}, {kl['p99']:.3g}, {kl['max']:.3g}", ""),
        _row("same first choice", report["top1_agreement"]),
        _row("perplexity of A", report["a"]["perplexity"]),
        _row("perplexity of B", report["b"]["perplexity"]),
        _row("B less A, nats per token", report["nats_per_token_difference"]),
        ("tokens scored", f"{report['num_scored_tokens']:,} in {report['num_windows']:,} windows", ""),
    ]


def _choices_rows(report: dict[str, Any]) -> list[Any]:
    rows: list[Any] = []
    for task, values in report["results"].items():
        for name in report["higher_is_better"][task]:
            stderr = values[f"{name}_stderr,none"]
            around = "" if isinstance(stderr, str) else f"± {1.96 * stderr:.4f}"
            rows.append((f"{task}: {name}", f"{values[f'{name},none']:.4f}", around))
        rows.append(("questions", str(report["n-samples"][task]["effective"]), ""))
    return rows
