"""How far apart two sets of logits for the same tokens are: Kullback-Leibler divergence, first choices, largest error.

Hides float64 over a large vocabulary in blocks of rows, and which rows of a window count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.evaluation.statistics import RESAMPLES, mean_per_token, proportion
from jaxinfer.evaluation.text import TokenizedText, Window, WindowOptions

BLOCK_ROWS = 32  # rows in float64 at once: 33 MB per array for a vocabulary of 128k

Logits = Callable[[tuple[int, ...]], np.ndarray]  # token ids -> f32[tokens, vocab]


@dataclass(frozen=True)
class RowDivergence:
    """Per row: KL(A || B) in nats, whether both have the same first choice, and the targets' log-likelihoods."""

    kl: np.ndarray  # f64[rows]
    agrees: np.ndarray  # bool[rows]; the lower id counts among equals
    logprob_a: np.ndarray  # f64[rows]
    logprob_b: np.ndarray  # f64[rows]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """f[rows, vocab] -> f64[rows, vocab]."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def divergence(a: np.ndarray, b: np.ndarray, targets: Sequence[int]) -> RowDivergence:
    """Row by row between logits a and b, both f[rows, vocab], and of `targets`, one per row.

    ValueError names the first row with a value that is not finite, or shapes that differ.
    """
    if a.shape != b.shape or len(a) != len(targets):
        raise ValueError(f"logits of {a.shape} and {b.shape} and {len(targets)} targets must be of the same rows")
    parts = []
    for start in range(0, len(a), BLOCK_ROWS):
        at = slice(start, start + BLOCK_ROWS)
        for name, block in (("first", a[at]), ("second", b[at])):
            bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
            if bad.size:
                raise ValueError(f"the {name} logits of row {start + bad[0]} are not finite")
        parts.append(_block(a[at], b[at], np.asarray(targets[at], np.int64)))
    return RowDivergence(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _block(a: np.ndarray, b: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, ...]:
    log_a, log_b = log_softmax(a), log_softmax(b)
    rows = np.arange(len(targets))
    kl = (np.exp(log_a) * (log_a - log_b)).sum(axis=1)
    return np.maximum(kl, 0.0), a.argmax(axis=1) == b.argmax(axis=1), log_a[rows, targets], log_b[rows, targets]


def window_divergences(
    windows: Sequence[Window], a: Logits, b: Logits, on_window: Callable[[int], None] | None = None
) -> list[RowDivergence]:
    """Of every window's scored tokens; one window's logits are held at a time. `on_window` hears how many are done."""
    found = []
    for window in windows:
        rows = slice(window.scored - 1, len(window.token_ids) - 1)  # row i predicts token i + 1
        ids = window.token_ids
        found.append(divergence(a(ids)[rows], b(ids)[rows], ids[window.scored :]))
        if on_window is not None:
            on_window(len(found))
    return found


def comparison_report(
    text: TokenizedText,
    options: WindowOptions,
    windows: Sequence[Window],
    divergences: Sequence[RowDivergence],
    *,
    seed: int,
) -> dict[str, Any]:
    """The numbers of two models on a text (JSON). A is the reference: KL(A || B), and differences are B less A."""
    counts = [window.num_scored for window in windows]
    kl = np.concatenate([each.kl for each in divergences])
    agreeing = sum(int(each.agrees.sum()) for each in divergences)
    nats = {name: [-math.fsum(getattr(d, f"logprob_{name}")) for d in divergences] for name in ("a", "b")}
    worse = [nats_b - nats_a for nats_a, nats_b in zip(nats["a"], nats["b"], strict=True)]
    sides = {name: mean_per_token(values, counts, seed=seed) for name, values in nats.items()}
    return {
        "kl": mean_per_token([math.fsum(each.kl) for each in divergences], counts, seed=seed).json()
        | {
            "median": float(np.percentile(kl, 50)),
            "p99": float(np.percentile(kl, 99)),
            "max": float(kl.max()),
        },
        "top1_agreement": proportion(agreeing, len(kl)).json(),
        "nats_per_token_difference": mean_per_token(worse, counts, seed=seed).json(),
        "a": {"nats_per_token": sides["a"].json(), "perplexity": sides["a"].exponential().json()},
        "b": {"nats_per_token": sides["b"].json(), "perplexity": sides["b"].exponential().json()},
        **options.report(text, windows),
        "seed": seed,
        "resamples": RESAMPLES,
    }
