"""Seconds per call, compared within one run: programs take turns, so that a noisy machine disturbs all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Timing:
    """Seconds per call over several rounds."""

    median_s: float
    lowest_s: float
    highest_s: float


def compare(programs: Mapping[str, Callable[[], Any]], *, rounds: int = 7, round_s: float = 0.02) -> dict[str, Timing]:
    """Each program's time per call; `rounds` of at least `round_s` seconds each, in turns, after a call to compile.

    A program starts its work and returns arrays; waiting for them happens here, once per round.
    """
    calls = {name: _calls_for(program, round_s) for name, program in programs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            seconds[name].append(_seconds(program, calls[name]))
    return {name: Timing(statistics.median(each), min(each), max(each)) for name, each in seconds.items()}


def _calls_for(program: Callable[[], Any], round_s: float) -> int:
    jax.block_until_ready(program())
    return max(1, min(1000, int(round_s / max(_seconds(program, 1), 1e-7))))


def _seconds(program: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    results = [program() for _ in range(calls)]
    jax.block_until_ready(results)
    return (time.perf_counter() - start) / calls
