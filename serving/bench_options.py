"""Options that benchmarks share, and the engine they describe, loaded and compiled.

Hides the defaults that differ from serving: slots and lengths follow the workload, so that small runs start fast.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jaxinfer.config import EngineConfig, ModelConfig, shipped_model
from jaxinfer.engine import Engine
from jaxinfer.models import load_config
from jaxinfer.request import SamplingParams
from serving.bench_report import Reporter
from serving.bench_trace import parse_length
from serving.flags import add_config_flags, config_from, flag_type, positive
from serving.several_hosts import team_of
from sharding.hosts import HostsConfig

SAMPLING_FIELDS = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
}


def add_model(parser: argparse.ArgumentParser, *, skip: Collection[str] = ()) -> None:
    """MODEL, --json, and the engine's flags; `max_num_seqs` and `max_model_len` default to what the workload needs."""
    parser.add_argument(
        "model", nargs="?", type=Path, default=None, help="model directory (default: the shipped model)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else")
    parser.add_argument("--max-num-seqs", type=positive, default=None, help="decode slots (default: the workload's)")
    parser.add_argument(
        "--max-model-len", type=positive, default=None, help="longest sequence (default: the workload's)"
    )
    add_config_flags(parser, EngineConfig, skip={"max_num_seqs", "max_model_len", *skip})


def add_hosts(parser: argparse.ArgumentParser) -> None:
    """The flags of a benchmark whose engine may run on several hosts."""
    add_config_flags(parser, HostsConfig)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Sampling flags; the default is greedy."""
    for name, kind in SAMPLING_FIELDS.items():
        default = 0.0 if name == "temperature" else None
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=default, metavar="X", help="sampling option (default: greedy)")


def add_lengths(parser: argparse.ArgumentParser, *, input_len: str, output_len: str) -> None:
    """--input-len and --output-len as distributions."""
    form = "tokens: N, LOW:HIGH (uniform), or lognormal:MEDIAN:SIGMA"
    parser.add_argument("--input-len", type=length, default=input_len, help=f"prompt {form} (default: {input_len})")
    parser.add_argument("--output-len", type=length, default=output_len, help=f"output {form} (default: {output_len})")


def sampling_from(args: argparse.Namespace) -> SamplingParams:
    """SamplingParams of the parsed flags; RequestError for values out of range."""
    given = {name: getattr(args, name) for name in SAMPLING_FIELDS}
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def parse_sampling(text: str) -> tuple[str, SamplingParams]:
    """`temperature=1,top_p=0.9` -> (that text, SamplingParams); `greedy` is temperature 0. Raises ValueError."""
    values: dict[str, Any] = {"temperature": 0.0}
    for pair in () if text == "greedy" else text.split(","):
        name, _, value = pair.partition("=")
        if name not in SAMPLING_FIELDS:
            raise ValueError(f"sampling {pair!r}: {name!r} is not one of greedy, {', '.join(SAMPLING_FIELDS)}")
        try:
            values[name] = SAMPLING_FIELDS[name](value)
        except ValueError:
            raise ValueError(f"sampling {pair!r}: {value!r} is not a number") from None
    return text, SamplingParams(**values)


def model_of(args: argparse.Namespace) -> tuple[Path, ModelConfig]:
    """The model directory and its shape; ConfigError where it is none."""
    directory = args.model or shipped_model()
    return directory, load_config(directory)


def open_engine(args: argparse.Namespace, reporter: Reporter, *, num_seqs: int, longest: int | None) -> Engine:
    """Load and compile an engine with `num_seqs` slots and room for `longest` tokens, unless flags say otherwise.

    `longest=None` gives the model's own limit.
    """
    directory, model = model_of(args)
    wanted = args.max_model_len
    if wanted is None and longest is not None:
        wanted = min(model.max_position, longest)
    config = config_from(args, EngineConfig, max_num_seqs=args.max_num_seqs or num_seqs, max_model_len=wanted)
    team = team_of(args)
    loading = lambda name: reporter.note(f"loading {name}")
    engine = Engine(directory, config, progress=loading, **team.engine_options())
    engine.warm_up(lambda name: reporter.note(f"compiling {name}"))
    team.follow(engine)
    return engine


length = flag_type(parse_length)
sampling = flag_type(parse_sampling)
