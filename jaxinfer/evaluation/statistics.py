"""Estimates with 95% intervals, for tokens that come in windows and for yes-or-no counts.

Everything is float64 and a function of its arguments: sums are exactly rounded, so that order plays no part, and the
only random draws are the bootstrap's, from the seed given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Z95 = 1.959963984540054  # standard normal quantile of 0.975
RESAMPLES = 2000  # of the bootstrap


@dataclass(frozen=True)
class Estimate:
    """A value, its standard error by the normal approximation, and a 95% interval; None where one window tells none."""

    value: float
    stderr: float | None
    ci95: tuple[float, float] | None

    def scaled(self, factor: float) -> Estimate:
        """The estimate of `factor` (positive) times the quantity."""
        return Estimate(
            self.value * factor,
            None if self.stderr is None else self.stderr * factor,
            None if self.ci95 is None else (self.ci95[0] * factor, self.ci95[1] * factor),
        )

    def exponential(self) -> Estimate:
        """The estimate of exp(quantity): ends carried over, error by the delta method."""
        value = math.exp(self.value)
        return Estimate(
            value,
            None if self.stderr is None else self.stderr * value,
            None if self.ci95 is None else (math.exp(self.ci95[0]), math.exp(self.ci95[1])),
        )

    def json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"value": self.value, "stderr": self.stderr, "ci95": None if self.ci95 is None else list(self.ci95)}


def mean_per_token(totals: Sequence[float], counts: Sequence[int], *, seed: int) -> Estimate:
    """sum(totals) / sum(counts) over windows with `totals` and numbers of tokens `counts`.

    Tokens of a window are not independent, so windows are the unit: the standard error is the ratio estimator's
    (linearized, with n - 1), the interval a percentile bootstrap over windows (Efron 1979) of RESAMPLES draws.
    """
    if len(totals) != len(counts) or not totals or min(counts) < 1:
        raise ValueError(f"{len(totals)} totals and {len(counts)} counts must be as many, and each count at least 1")
    num_tokens = sum(counts)
    value = math.fsum(totals) / num_tokens
    n = len(totals)
    if n < 2:
        return Estimate(value, None, None)
    squares = math.fsum((total - value * count) ** 2 for total, count in zip(totals, counts, strict=True))
    stderr = math.sqrt(n / (n - 1) * squares) / num_tokens
    sums, sizes = np.asarray(totals, np.float64), np.asarray(counts, np.float64)
    random = np.random.Generator(np.random.PCG64(seed))
    draws = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        chosen = random.integers(0, n, n)
        draws[i] = sums[chosen].sum() / sizes[chosen].sum()
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(value, stderr, (float(low), float(high)))


def proportion(successes: int, trials: int) -> Estimate:
    """successes / trials with Wilson's score interval (1927), which stays in [0, 1]; trials count as independent."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes of {trials} trials is no proportion")
    share = successes / trials
    scale = 1 + Z95**2 / trials
    centre = (share + Z95**2 / (2 * trials)) / scale
    half = Z95 / scale * math.sqrt(share * (1 - share) / trials + Z95**2 / (4 * trials**2))
    ends = (max(0.0, centre - half) if successes else 0.0, min(1.0, centre + half) if successes < trials else 1.0)
    return Estimate(share, math.sqrt(share * (1 - share) / trials), ends)


def mean_with_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the sample standard deviation (n - 1) over sqrt(n), as lm-evaluation-harness reports; None for one."""
    n = len(values)
    if n == 0:
        raise ValueError("no values, so no mean")
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) / math.sqrt(n)
