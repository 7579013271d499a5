"""Synthetic requests for benchmarks: how long, when, and which tokens, all drawn from one seed.

Hides the distributions. Lengths, arrivals and tokens come from separate streams of the seed, so that one option does
not change what another draws.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxinfer.config import ConfigError


@dataclass(frozen=True)
class LengthSpec:
    """A distribution of token counts, as written on the command line."""

    text: str
    kind: str  # "constant", "uniform" or "lognormal"
    low: float  # the constant, the lower bound, or the median
    high: float  # the constant, the upper bound (included), or sigma of the logarithm

    def draw(self, rng: np.random.Generator, count: int, limit: int) -> np.ndarray:
        """`i64[count]` lengths of at least 1. A lognormal tail over `limit` is cut off there.

        ConfigError where a constant or an upper bound is over `limit`.
        """
        if self.kind == "lognormal":
            drawn = np.rint(rng.lognormal(math.log(self.low), self.high, count)).astype(np.int64)
            return np.clip(drawn, 1, limit)
        if self.high > limit:
            raise ConfigError(
                f"length {self.text!r} goes over the limit of {limit} tokens that the model's length leaves"
            )
        return rng.integers(int(self.low), int(self.high), count, endpoint=True)

    def longest(self) -> int | None:
        """The largest length this can draw; None for an unbounded tail."""
        return None if self.kind == "lognormal" else int(self.high)


def parse_length(text: str) -> LengthSpec:
    """`128`, `16:512` (uniform, ends included) or `lognormal:64:0.8` (median, sigma). ValueError where malformed."""
    wrong = f"length {text!r} must be a number, LOW:HIGH, or lognormal:MEDIAN:SIGMA"
    parts = text.split(":")
    try:
        if parts[0] == "lognormal" and len(parts) == 3:
            median, sigma = float(parts[1]), float(parts[2])
            if not (median >= 1 and 0 <= sigma <= 5):
                raise ValueError(f"length {text!r}: the median must be at least 1 and sigma from 0 to 5")
            return LengthSpec(text, "lognormal", median, sigma)
        bounds = [int(part) for part in parts]
    except ValueError as error:
        raise error if str(error).startswith("length") else ValueError(wrong) from None
    if len(bounds) not in (1, 2):
        raise ValueError(wrong)
    low, high = bounds[0], bounds[-1]
    if not 1 <= low <= high:
        raise ValueError(f"length {text!r}: lengths must be at least 1, the lower bound first")
    return LengthSpec(text, "constant" if len(bounds) == 1 else "uniform", low, high)


@dataclass(frozen=True)
class TraceRequest:
    """One synthetic request; it arrives `arrival_s` after the start and wants exactly `output_len` tokens."""

    arrival_s: float
    prompt_token_ids: tuple[int, ...]
    output_len: int


def draw_trace(
    *,
    num_prompts: int,
    input_len: LengthSpec,
    output_len: LengthSpec,
    vocab_size: int,
    max_model_len: int,
    seed: int,
    request_rate: float = math.inf,
    burstiness: float = 1.0,
) -> list[TraceRequest]:
    """`num_prompts` requests of random token ids. Prompt and output together fit `max_model_len`.

    With a finite `request_rate` (per second) the gaps are gamma-distributed with shape `burstiness`: 1 is a Poisson
    process, less is burstier. Raises ConfigError where the lengths cannot fit.
    """
    lengths, gaps, tokens = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3))
    outputs = output_len.draw(lengths, num_prompts, max_model_len - 1)
    inputs = input_len.draw(lengths, num_prompts, max_model_len - (output_len.longest() or 1))
    outputs = np.minimum(outputs, max_model_len - inputs)
    arrivals = np.zeros(num_prompts)
    if math.isfinite(request_rate):
        arrivals = np.cumsum(gaps.gamma(burstiness, 1.0 / (request_rate * burstiness), num_prompts))
    return [
        TraceRequest(float(arrival), tuple(tokens.integers(0, vocab_size, n).tolist()), int(m))
        for arrival, n, m in zip(arrivals, inputs, outputs, strict=True)
    ]


def save_trace(trace: Sequence[TraceRequest], path: Path) -> None:
    """Write a trace as JSON, for programs in other environments (benchmarks/hf_baseline.py)."""
    requests = [
        {"arrival_s": r.arrival_s, "prompt_token_ids": list(r.prompt_token_ids), "output_len": r.output_len}
        for r in trace
    ]
    path.write_text(json.dumps({"requests": requests}))
