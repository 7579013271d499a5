"""Latency and throughput of a run, from the times at which pieces of completions arrived.

Hides the definitions. They are those of `vllm bench serve`, and so are the key names: TTFT to the first piece, TPOT the
mean time per token after it, ITL the gap between pieces as a client sees them, E2EL to the last piece.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

PERCENTILES = (50, 90, 95, 99)
GOODPUT_METRICS = ("ttft", "tpot", "e2el")


@dataclass
class RequestTimes:
    """One request as its caller saw it: seconds on one clock."""

    arrival_s: float
    num_prompt_tokens: int
    pieces: list[tuple[float, int]] = field(default_factory=list)  # (time, tokens in the piece), tokens > 0
    num_cached_tokens: int = 0
    error: str | None = None

    @property
    def num_output_tokens(self) -> int:
        return sum(count for _, count in self.pieces)

    @property
    def first_s(self) -> float:
        """Time of the first piece. IndexError for a request without one."""
        return self.pieces[0][0]

    @property
    def last_s(self) -> float:
        return self.pieces[-1][0]

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.arrival_s

    @property
    def e2el_s(self) -> float:
        return self.last_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None for a single token.

        Tokens that arrive together with the first one count as generated after it, as in vLLM.
        """
        later = self.num_output_tokens - 1
        return (self.last_s - self.first_s) / later if later > 0 else None

    @property
    def itl_s(self) -> list[float]:
        times = [time for time, _ in self.pieces]
        return [b - a for a, b in itertools.pairwise(times)]


def summarize(name: str, values_s: Sequence[float]) -> dict[str, float | None]:
    """`mean_<name>_ms`, `median_`, `std_` (of the population) and `p50_` to `p99_` (linear interpolation).

    Values are None where there is nothing to average.
    """
    keys = [f"mean_{name}_ms", f"median_{name}_ms", f"std_{name}_ms", *(f"p{q}_{name}_ms" for q in PERCENTILES)]
    if not values_s:
        return dict.fromkeys(keys)
    ms = 1e3 * np.asarray(values_s, np.float64)
    numbers = [ms.mean(), np.median(ms), ms.std(), *np.percentile(ms, PERCENTILES)]
    return {key: float(number) for key, number in zip(keys, numbers, strict=True)}


def serving_metrics(requests: Sequence[RequestTimes], duration_s: float) -> dict[str, float | int | None]:
    """Counts, throughputs and latency summaries under vLLM's key names; failed requests count as failed only."""
    done = [r for r in requests if r.error is None and r.pieces]
    inputs = sum(r.num_prompt_tokens for r in done)
    outputs = sum(r.num_output_tokens for r in done)
    return {
        "completed": len(done),
        "failed": len(requests) - len(done),
        "duration": duration_s,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / duration_s,
        "input_throughput": inputs / duration_s,
        "output_throughput": outputs / duration_s,
        "total_token_throughput": (inputs + outputs) / duration_s,
        **summarize("ttft", [r.ttft_s for r in done]),
        **summarize("tpot", [r.tpot_s for r in done if r.tpot_s is not None]),
        **summarize("itl", [gap for r in done for gap in r.itl_s]),
        **summarize("e2el", [r.e2el_s for r in done]),
    }


def parse_goodput(text: str) -> dict[str, float]:
    """`ttft:200,tpot:50` (milliseconds; commas or spaces between pairs) -> {"ttft": 0.2, "tpot": 0.05} in seconds.

    Raises ValueError that names the pair, and the metrics there are.
    """
    limits_s: dict[str, float] = {}
    for pair in text.replace(",", " ").split():
        name, _, value = pair.partition(":")
        try:
            limit_ms = float(value)
        except ValueError:
            limit_ms = -1.0
        if name not in GOODPUT_METRICS or not limit_ms > 0:
            raise ValueError(
                f"goodput limit {pair!r} must be METRIC:MILLISECONDS with METRIC one of {', '.join(GOODPUT_METRICS)}"
            )
        limits_s[name] = limit_ms / 1e3
    if not limits_s:
        raise ValueError(f"goodput {text!r} names no limit; write for example ttft:200,tpot:50")
    return limits_s


def request_goodput(requests: Sequence[RequestTimes], limits_s: Mapping[str, float], duration_s: float) -> float:
    """Requests per second that kept every limit. A request of one token has a TPOT of 0, as in vLLM."""
    kept = 0
    for request in requests:
        if request.error is None and request.pieces:
            seen = {"ttft": request.ttft_s, "tpot": request.tpot_s or 0.0, "e2el": request.e2el_s}
            kept += all(seen[name] <= limit for name, limit in limits_s.items())
    return kept / duration_s
