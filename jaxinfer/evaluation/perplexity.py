"""Perplexity of a text: exp of the mean negative log-likelihood per token, with intervals over windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxinfer.evaluation.statistics import RESAMPLES, mean_per_token
from jaxinfer.evaluation.text import TokenizedText, Window, WindowOptions
from jaxinfer.request import PromptLogprobs

BATCH = 64  # windows handed to the engine at once
Score = Callable[[Sequence[tuple[int, ...]]], list[PromptLogprobs]]


def window_nats(windows: Sequence[Window], score: Score, on_window: Callable[[int], None] | None = None) -> list[float]:
    """Per window, the negative log-likelihood of its scored tokens in nats. `on_window` hears how many are done."""
    nats: list[float] = []
    for start in range(0, len(windows), BATCH):
        batch = windows[start : start + BATCH]
        for window, values in zip(batch, score([w.token_ids for w in batch]), strict=True):
            scored = [value.logprob for value in values[window.scored :] if value is not None]
            assert len(scored) == window.num_scored, "every scored token has a predecessor"
            nats.append(-math.fsum(scored))
        if on_window is not None:
            on_window(len(nats))
    return nats


def perplexity_report(
    text: TokenizedText, options: WindowOptions, windows: Sequence[Window], nats: Sequence[float], *, seed: int
) -> dict[str, Any]:
    """The numbers of a text whose windows have these negative log-likelihoods (JSON).

    bits_per_byte is the mean bits per token times the text's tokens per byte: a token that no window could score
    counts as an average one.
    """
    counts = [window.num_scored for window in windows]
    per_token = mean_per_token(nats, counts, seed=seed)
    bits_per_byte = per_token.scaled(len(text.token_ids) / text.num_bytes / math.log(2))
    return {
        "perplexity": per_token.exponential().json(),
        "nats_per_token": per_token.json(),
        "bits_per_byte": bits_per_byte.json(),
        **options.report(text, windows),
        "seed": seed,
        "resamples": RESAMPLES,
    }
