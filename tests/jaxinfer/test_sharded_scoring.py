"""Prompt scores and logits over a vocabulary split over devices, against one device that has it all."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vocabulary_split import WHOLE, Split, agreed

from jaxinfer import scoring

SPLITS = [("8", 12), ("2", 101), ("2x2", 4096)]
ROWS = 150  # two blocks and a part of one


class Table:
    """A model whose hidden state is the number of its row of logits."""

    def __init__(self, logits: jax.Array):
        self._logits = logits

    def unembed(self, hidden: jax.Array) -> jax.Array:
        return self._logits[hidden[:, 0].astype(jnp.int32)]


def merge(parameters: tuple[jax.Array, ...]) -> Any:
    return Table(*parameters)


@pytest.mark.parametrize(("name", "vocab"), SPLITS)
def test_prompts_score_as_on_one_device(name: str, vocab: int) -> None:
    split, rng = Split(name, vocab), np.random.default_rng(5)
    logits = (3 * rng.standard_normal((ROWS, vocab))).astype(np.float32)
    logits[::3] = np.round(logits[::3])  # ties
    targets = np.where(rng.random(ROWS) < 0.8, rng.integers(0, vocab, ROWS), scoring.NO_TARGET).astype(np.int32)
    targets[:7] = scoring.NO_TARGET, 0, vocab - 1, vocab // 2, vocab // 2 - 1, vocab // 8, vocab // 8 + 1
    targets[128:] = scoring.NO_TARGET  # a block that nobody asked about
    hidden = np.arange(ROWS, dtype=np.float32)[:, None]
    read = functools.partial(scoring.READERS["scores"], merge)
    split_read = split.compile(
        functools.partial(read, vocabulary=split.vocabulary), (split.columns,), WHOLE, WHOLE, WHOLE
    )
    whole_read = jax.jit(read)
    for num_top in (0, 5):
        found = agreed(split_read((split.pad(logits, -np.inf),), hidden, targets, np.int32(num_top)))
        expected = jax.tree.map(np.asarray, whole_read((logits,), hidden, targets, np.int32(num_top)))
        np.testing.assert_array_equal(found.ranks, expected.ranks)
        np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=1e-5, atol=2e-5)
        np.testing.assert_array_equal(found.top_ids, expected.top_ids)
        np.testing.assert_allclose(found.top_logprobs, expected.top_logprobs, rtol=1e-5, atol=2e-5)
        assert (found.ranks[targets >= 0] > 0).all() and not found.ranks[targets < 0].any()
        assert found.top_ids.any() == (num_top > 0)


def test_a_target_without_a_finite_logit_has_no_finite_score() -> None:
    split = Split("8", 12)
    logits = np.zeros((3, 12), np.float32)
    logits[0, 11], logits[1, 2], logits[2, 5] = np.nan, np.inf, -np.inf
    read = functools.partial(scoring.READERS["scores"], merge, vocabulary=split.vocabulary)
    run = split.compile(read, (split.columns,), *[WHOLE] * 3)
    hidden, targets = np.arange(3, dtype=np.float32)[:, None], np.array([11, 2, 5], np.int32)
    scores = agreed(run((split.pad(logits, -np.inf),), hidden, targets, np.int32(0)))
    assert not np.isfinite(scores.logprobs).any()


@pytest.mark.parametrize(("name", "vocab"), SPLITS)
def test_prompt_logits_are_whole_rows(name: str, vocab: int) -> None:
    split = Split(name, vocab)
    logits = np.random.default_rng(6).standard_normal((80, vocab)).astype(np.float32)
    read = functools.partial(scoring.READERS["logits"], merge, vocabulary=split.vocabulary)
    run = split.compile(read, (split.columns,), WHOLE, WHOLE)
    found = agreed(run((split.pad(logits, -np.inf),), np.arange(80, dtype=np.float32)[:, None], np.int32(9)))
    np.testing.assert_array_equal(found, logits[9 : 9 + scoring.BLOCK_ROWS])
