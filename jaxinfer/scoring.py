"""What the model made of a prompt: log-probabilities, ranks and logits, from the hidden states prefill leaves behind.

Hides the programs that read those rows (in blocks of one size: a row has the same bits wherever it lies, and memory
stays bounded), which rows of a call belong to whom, and that a preempted or replayed prompt goes on where it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer import logprobs
from jaxinfer.models.transformer import Decoder
from jaxinfer.output import CompletionStream
from jaxinfer.plan import Plan, Sequence
from jaxinfer.request import MAX_TOP_LOGPROBS
from sharding.host_arrays import from_devices
from sharding.vocabulary import Vocabulary

BLOCK_ROWS = 64  # rows unembedded at once: f32[64, vocab] is 33 MB for a vocabulary of 128k
NO_TARGET = -1  # a row nobody asked about

log = logging.getLogger(__name__)

Parameters = tuple[jax.Array, ...]
Merge = Callable[[Parameters], Decoder]
Run = Callable[..., Any]  # run(name, *arguments): a program of READERS on the call's hidden rows


class Scores(NamedTuple):
    """Per row of hidden states, how the model saw its target; zeros where nobody asked."""

    logprobs: jax.Array  # f32[rows], of softmax(logits), as for sampled tokens
    ranks: jax.Array  # i32[rows]: 1 + the number of tokens with larger logits
    top_ids: jax.Array  # i32[rows, MAX_TOP_LOGPROBS], best first, lower id first on ties; -1 past the vocabulary
    top_logprobs: jax.Array  # f32[rows, MAX_TOP_LOGPROBS]


# ---- on the device ---------------------------------------------------------------------------------------------------


def prompt_scores(
    merge: Merge,
    parameters: Parameters,
    hidden: jax.Array,
    targets: jax.Array,
    num_top: jax.Array,
    vocabulary: Vocabulary | None = None,
) -> Scores:
    """Score `targets: i32[rows]` against normed `hidden [rows, embed]` (traced).

    NO_TARGET skips a row, and a block of such rows costs nothing. The alternatives are zeros while num_top i32[] is 0.
    The model's logits are this device's columns of `vocabulary`: all of them by default.
    """
    model = merge(parameters)
    num_rows = hidden.shape[0]
    hidden, num_blocks = _whole_blocks(hidden)
    targets = jnp.pad(targets, (0, hidden.shape[0] - num_rows), constant_values=NO_TARGET)
    wanted = jnp.any(targets.reshape(num_blocks, BLOCK_ROWS) >= 0, axis=1)
    order = jnp.argsort(~wanted, stable=True)

    def score(index: jax.Array, scores: Scores) -> Scores:
        at = order[index] * BLOCK_ROWS
        block = _score_block(
            model.unembed(lax.dynamic_slice_in_dim(hidden, at, BLOCK_ROWS)),
            lax.dynamic_slice_in_dim(targets, at, BLOCK_ROWS),
            num_top,
            vocabulary,
        )
        return Scores(
            *(lax.dynamic_update_slice_in_dim(whole, part, at, 0) for whole, part in zip(scores, block, strict=True))
        )

    scores = lax.fori_loop(0, jnp.sum(wanted, dtype=jnp.int32), score, _no_scores(hidden.shape[0]))
    return Scores(*(values[:num_rows] for values in scores))


def prompt_logits(
    merge: Merge,
    parameters: Parameters,
    hidden: jax.Array,
    start: jax.Array,
    vocabulary: Vocabulary | None = None,
) -> jax.Array:
    """Logits f32[BLOCK_ROWS, vocab] of the rows of `hidden [rows, embed]` from `start: i32[]` on (traced).

    Rows past the end hold anything. Columns are gathered where `vocabulary` is split; by default it is not.
    """
    padded = jnp.pad(hidden, ((0, BLOCK_ROWS), (0, 0)))
    logits = merge(parameters).unembed(lax.dynamic_slice_in_dim(padded, start, BLOCK_ROWS))
    return (vocabulary or Vocabulary(logits.shape[1])).whole(logits)


READERS: dict[str, Callable[..., Any]] = {"scores": prompt_scores, "logits": prompt_logits}


def reader_arguments(name: str, num_rows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What the program of READERS takes after parameters and hidden rows."""
    scalar = jax.ShapeDtypeStruct((), "int32")
    return (jax.ShapeDtypeStruct((num_rows,), "int32"), scalar) if name == "scores" else (scalar,)


def _whole_blocks(hidden: jax.Array) -> tuple[jax.Array, int]:
    """`hidden [rows, embed]` padded with zeros to a multiple of BLOCK_ROWS, and how many blocks that makes."""
    num_blocks = -(-hidden.shape[0] // BLOCK_ROWS)
    return jnp.pad(hidden, ((0, num_blocks * BLOCK_ROWS - hidden.shape[0]), (0, 0))), num_blocks


def _no_scores(rows: int) -> Scores:
    top = (rows, MAX_TOP_LOGPROBS)
    return Scores(
        jnp.zeros(rows, jnp.float32), jnp.zeros(rows, jnp.int32), jnp.zeros(top, jnp.int32), jnp.zeros(top, jnp.float32)
    )


def _score_block(
    logits: jax.Array, targets: jax.Array, num_top: jax.Array, vocabulary: Vocabulary | None = None
) -> Scores:
    """logits f32[BLOCK_ROWS, local], targets i32[BLOCK_ROWS] -> the scores of these rows."""
    vocabulary = vocabulary or Vocabulary(logits.shape[1])
    assert logits.shape[1] == vocabulary.local, (logits.shape, vocabulary)
    asked = targets >= 0
    normalizer = logprobs.log_normalizers(logits, vocabulary)
    own = vocabulary.take(logits, jnp.maximum(targets, 0)[:, None])
    ranks = 1 + vocabulary.sum(jnp.sum(logits > own, axis=1, dtype=jnp.int32))
    empty = _no_scores(logits.shape[0])
    top_ids, top_logprobs = lax.cond(
        num_top > 0,
        partial(logprobs.best_logprobs, vocabulary=vocabulary),
        lambda *_: (empty.top_ids, empty.top_logprobs),
        logits,
        normalizer,
    )
    return Scores(jnp.where(asked, own[:, 0] - normalizer, 0.0), jnp.where(asked, ranks, 0), top_ids, top_logprobs)


# ---- on the host -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rows:
    """Prompt positions [first, first + count) of a sequence, packed from `row` on in a call's hidden states."""

    sequence: Sequence
    first: int
    row: int
    count: int


@dataclass(frozen=True)
class Scoring:
    """What is wanted of one call's prompt rows, under way on the device."""

    rows: tuple[Rows, ...]
    scores: Scores | None  # None: only logits are wanted
    run: Run

    def read(self, streams: Mapping[int, CompletionStream]) -> list[tuple[Sequence, str]]:
        """Hand over what the call's rows gave, to the streams and to who listens for logits.

        Returns the sequences that must end, each with the reason: no finite values, or a listener that raised.
        Whatever the device raises goes through; rows handed over before stay counted.
        """
        ended = []
        scores = None if self.scores is None else _Fetched(self.scores)
        for rows in self.rows:
            if rows.sequence.finish_reason is not None:
                continue
            error = None
            if scores is not None and rows.sequence.request.sampling.prompt_logprobs is not None:
                error = scores.hand_over(rows, streams[rows.sequence.seq_id])
            if error is None and rows.sequence.request.on_prompt_logits is not None:
                error = self._tell_logits(rows)
            if error is None:
                rows.sequence.num_scored = max(rows.sequence.num_scored, rows.first + rows.count)
            else:
                ended.append((rows.sequence, error))
        return ended

    def _tell_logits(self, rows: Rows) -> str | None:
        listener = rows.sequence.request.on_prompt_logits
        assert listener is not None
        for offset in range(0, rows.count, BLOCK_ROWS):
            count = min(BLOCK_ROWS, rows.count - offset)
            logits = from_devices(self.run("logits", np.int32(rows.row + offset)))[:count]
            try:
                listener(rows.first + offset, logits)
            except Exception as error:  # the caller's own code; its request alone shall suffer
                log.exception("on_prompt_logits of request %s raised", rows.sequence.request.request_id)
                return f"on_prompt_logits raised {type(error).__name__}: {error}"
            rows.sequence.num_scored = rows.first + offset + count
        return None


def dispatch(plans: Iterable[Plan | None], num_rows: int, run: Run) -> Scoring | None:
    """Start what the plans' prompt rows are wanted for; None when nobody wants any.

    num_rows: hidden rows of each data shard's plan, its chunks packed in their order. run(name, *arguments) calls a
    program of READERS on all of them.
    """
    plans = list(plans)
    rows = [row for shard, plan in enumerate(plans) if plan for row in _wanted_rows(plan, shard * num_rows)]
    if not rows:
        return None
    scored = [r for r in rows if r.sequence.request.sampling.prompt_logprobs is not None]
    targets = _targets(scored, len(plans) * num_rows)
    scores = run("scores", targets, _most_alternatives(scored)) if scored else None
    return Scoring(tuple(rows), scores, run)


def _wanted_rows(plan: Plan, packed: int) -> list[Rows]:
    """Rows of the plan's chunks, `packed` from there on, that are to be scored and were not yet."""
    rows: list[Rows] = []
    for chunk in plan.chunks:
        first = max(chunk.start, chunk.sequence.num_scored)
        end = min(chunk.start + chunk.length, chunk.sequence.rows_to_score)
        if first < end:
            rows.append(Rows(chunk.sequence, first, packed + first - chunk.start, end - first))
        packed += chunk.length
    return rows


def _targets(scored: list[Rows], num_rows: int) -> np.ndarray:
    """i32[num_rows]: each row's is the prompt's next token; the prompt's last row has none."""
    targets = np.full(num_rows, NO_TARGET, np.int32)
    for rows in scored:
        following = rows.sequence.request.prompt_token_ids[rows.first + 1 : rows.first + rows.count + 1]
        targets[rows.row : rows.row + len(following)] = following
    return targets


def _most_alternatives(scored: list[Rows]) -> np.int32:
    return np.int32(max(rows.sequence.request.sampling.prompt_logprobs or 0 for rows in scored))


class _Fetched:
    """A call's scores on the host; the alternatives are fetched only when a request asks for them."""

    def __init__(self, scores: Scores):
        self._scores = scores
        self._logprobs, self._ranks = from_devices(scores.logprobs), from_devices(scores.ranks)
        self._top: tuple[np.ndarray, np.ndarray] | None = None

    def hand_over(self, rows: Rows, stream: CompletionStream) -> str | None:
        """Give the stream its values; an error text when one is not finite."""
        sequence = rows.sequence
        count = min(rows.count, sequence.num_prompt - 1 - rows.first)  # the last row predicts no prompt token
        at = slice(rows.row, rows.row + count)
        bad = np.flatnonzero(~np.isfinite(self._logprobs[at]))
        if bad.size:
            return f"the model gave no finite log-probability to the prompt token at position {rows.first + bad[0] + 1}"
        num_top = sequence.request.sampling.prompt_logprobs or 0
        if num_top and self._top is None:
            self._top = from_devices(self._scores.top_ids), from_devices(self._scores.top_logprobs)
        ids, values = (None, None) if self._top is None else self._top
        assert stream.prompt is not None
        stream.prompt.put(
            rows.first,
            self._logprobs[at],
            self._ranks[at],
            None if ids is None else ids[at, :num_top],
            None if values is None else values[at, :num_top],
        )
        return None
