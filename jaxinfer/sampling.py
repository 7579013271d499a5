"""Choosing the next token of every slot, on the device. Hides: how settings are packed into array rows, how a
feature nobody in the batch asked for costs nothing, and how truncation works without ever sorting the vocabulary.

Order: allowed ids, logit bias, min_tokens, penalties, temperature, min-p and top-k, top-p, one draw
(docs/sampling.md has the definition). A row's result depends on nothing but that row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.logprobs import best_logprobs, log_normalizers
from jaxinfer.request import MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS, SamplingParams
from jaxinfer.truncation import masked_weights, top_k_threshold, top_p_threshold, vocabulary_group_sums
from jaxinfer.vocabulary_passes import cumulative_sums, group_width, largest
from sharding.vocabulary import UNUSED_ID, Vocabulary

_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_INTS = ("top_k", "min_tokens", "num_bias", "wants_logprobs", "top_logprobs", "restricted")
_BIAS_IDS = len(_FLOATS) + len(_INTS) + 2  # the seed takes two words
_BIAS_VALUES = _BIAS_IDS + MAX_LOGIT_BIAS
ROW_WORDS = _BIAS_VALUES + MAX_LOGIT_BIAS  # int32 words of one packed row


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class SamplingArrays:
    """Every slot's sampling settings, one row per slot; zeros are a valid (greedy) row."""

    temperature: jax.Array  # f32[slots]; 0 = greedy
    top_p: jax.Array  # f32[slots]; 1 = off
    min_p: jax.Array  # f32[slots]; 0 = off
    repetition_penalty: jax.Array  # f32[slots]; 1 = off
    presence_penalty: jax.Array  # f32[slots]; 0 = off
    frequency_penalty: jax.Array  # f32[slots]; 0 = off
    top_k: jax.Array  # i32[slots]; 0 = off
    min_tokens: jax.Array  # i32[slots]
    num_bias: jax.Array  # i32[slots]; how many of bias_ids are used
    wants_logprobs: jax.Array  # i32[slots]; 0 or 1
    top_logprobs: jax.Array  # i32[slots]
    restricted: jax.Array  # i32[slots]; 1 = the slot's row of the allowed mask is in force
    seed: jax.Array  # u32[slots, 2]; the request's 64-bit seed as threefry key data
    bias_ids: jax.Array  # i32[slots, MAX_LOGIT_BIAS]
    bias_values: jax.Array  # f32[slots, MAX_LOGIT_BIAS]


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class TokenCounts:
    """Which tokens a slot's sequence holds, for the penalties. Rows of slots without penalties may be stale.

    One table, because XLA:TPU takes seconds to compile what reads arrays of 8 and of 32 bits side by side.
    """

    table: jax.Array  # i32[slots, columns]; twice the times generated, and 1 more where it is in the prompt

    @classmethod
    def of(cls, in_prompt: jax.Array, in_output: jax.Array) -> TokenCounts:
        """in_prompt bool[slots, columns]; in_output i32[slots, columns], times generated."""
        return cls(2 * in_output + in_prompt)

    @property
    def in_prompt(self) -> jax.Array:
        """bool[slots, columns]."""
        return self.table & 1 != 0

    @property
    def in_output(self) -> jax.Array:
        """i32[slots, columns]; times generated."""
        return self.table >> 1


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class SampleResult:
    """What sample() chose. Log-probabilities are of softmax(logits) as the model gave them; 0 when not asked for."""

    tokens: jax.Array  # i32[slots]; always inside the vocabulary
    logprobs: jax.Array  # f32[slots]
    top_ids: jax.Array  # i32[slots, MAX_TOP_LOGPROBS]; best first, lower id first on ties
    top_logprobs: jax.Array  # f32[slots, MAX_TOP_LOGPROBS]
    bad: jax.Array  # bool[slots]; NaN or +inf among the logits, or nothing left to choose from


def pack_row(params: SamplingParams, seed: int, out: np.ndarray | None = None) -> np.ndarray:
    """One request's settings as i32[ROW_WORDS], in `out` when given. `seed` is that completion's own, 64 bits."""
    row = np.empty(ROW_WORDS, np.int32) if out is None else out
    num_floats, num_bias = len(_FLOATS), len(params.logit_bias)
    row[:num_floats].view(np.float32)[:] = [getattr(params, name) for name in _FLOATS]
    restricted = params.allowed_token_ids is not None
    row[num_floats : _BIAS_IDS - 2] = (
        min(params.top_k, UNUSED_ID),
        params.min_tokens,
        num_bias,
        params.logprobs,
        params.top_logprobs,
        restricted,
    )
    row[_BIAS_IDS - 2 : _BIAS_IDS].view(np.uint32)[:] = (seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF)
    row[_BIAS_IDS:_BIAS_VALUES] = UNUSED_ID
    row[_BIAS_VALUES:] = 0
    if num_bias:
        row[_BIAS_IDS : _BIAS_IDS + num_bias] = list(params.logit_bias.keys())
        row[_BIAS_VALUES : _BIAS_VALUES + num_bias].view(np.float32)[:] = list(params.logit_bias.values())
    return row


def unpack_rows(words: jax.Array) -> SamplingArrays:
    """i32[rows, ROW_WORDS] of packed rows -> SamplingArrays of as many rows (traced)."""
    fields: dict[str, Any] = {}
    for index, name in enumerate(_FLOATS):
        fields[name] = lax.bitcast_convert_type(words[:, index], jnp.float32)
    for index, name in enumerate(_INTS, start=len(_FLOATS)):
        fields[name] = words[:, index]
    fields["seed"] = lax.bitcast_convert_type(words[:, _BIAS_IDS - 2 : _BIAS_IDS], jnp.uint32)
    fields["bias_ids"] = words[:, _BIAS_IDS:_BIAS_VALUES]
    fields["bias_values"] = lax.bitcast_convert_type(words[:, _BIAS_VALUES:], jnp.float32)
    return SamplingArrays(**fields)


def empty_rows(num_slots: int) -> jax.Array:
    """Packed greedy rows for `num_slots` slots, i32[slots, ROW_WORDS]."""
    row = pack_row(SamplingParams(temperature=0.0), seed=0)
    return jnp.tile(jnp.asarray(row), (num_slots, 1))


def allowed_words(params: SamplingParams, vocab_size: int) -> np.ndarray:
    """u32[ceil(vocab/32)]: bit i of word w allows token 32 w + i. All ones when the request allows everything."""
    num_words = -(-vocab_size // 32)
    if params.allowed_token_ids is None:
        return np.full(num_words, 0xFFFFFFFF, np.uint32)
    bits = np.zeros(num_words * 32, bool)
    bits[list(params.allowed_token_ids)] = True
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def uses_penalties(params: SamplingParams) -> bool:
    """Whether this request reads its row of TokenCounts."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def empty_counts(num_slots: int, num_columns: int) -> TokenCounts:
    """Counts for `num_slots` slots that hold nothing; `num_columns` of the vocabulary are on this device."""
    return TokenCounts(jnp.zeros((num_slots, num_columns), jnp.int32))


def update_counts(
    counts: TokenCounts, tokens: jax.Array, active: jax.Array, vocabulary: Vocabulary | None = None
) -> TokenCounts:
    """Count the generated tokens i32[slots] of the slots that are active bool[slots]. In place when donated."""
    vocabulary = vocabulary or Vocabulary(counts.table.shape[1])
    ids = jnp.where(active & (tokens >= 0), tokens, UNUSED_ID)
    rows = jnp.arange(tokens.shape[0])
    return TokenCounts(counts.table.at[rows, vocabulary.columns(ids)].add(2, mode="drop"))


def reset_counts(
    counts: TokenCounts,
    slots: jax.Array,
    history: jax.Array,
    num_prompt: jax.Array,
    num_tokens: jax.Array,
    vocabulary: Vocabulary | None = None,
) -> TokenCounts:
    """Count anew the sequences that enter slots.

    slots i32[rows]: a slot outside the table is skipped; pass one for padding and for rows without penalties.
    history i32[rows, max_len] holds num_tokens i32[rows] tokens; the first num_prompt i32[rows] are the prompt.
    Time grows with the longest history counted, not with max_len.
    """
    num_slots, num_columns = counts.table.shape
    columns = (vocabulary or Vocabulary(num_columns)).columns
    valid = (slots >= 0) & (slots < num_slots)
    targets = jnp.where(valid, slots, UNUSED_ID)
    rows, max_len = history.shape
    chunk = min(256, max_len)

    def clear(row: jax.Array, table: jax.Array) -> jax.Array:
        start = (jnp.clip(slots[row], 0, num_slots - 1), 0)
        old = lax.dynamic_slice(table, start, (1, num_columns))
        return lax.dynamic_update_slice(table, jnp.where(valid[row], 0, old), start)

    def count(index: jax.Array, table: jax.Array) -> jax.Array:
        start = jnp.minimum(index * chunk, max_len - chunk)  # the last chunk overlaps the one before
        ids = lax.dynamic_slice(history, (0, start), (rows, chunk))
        position = start + jnp.arange(chunk)[None]
        fresh = (position >= index * chunk) & (position < num_tokens[:, None]) & (ids >= 0)
        in_prompt = position < num_prompt[:, None]
        prompt_ids = jnp.where(fresh & in_prompt, ids, UNUSED_ID)
        output_ids = jnp.where(fresh & ~in_prompt, ids, UNUSED_ID)
        table = table.at[targets[:, None], columns(prompt_ids)].set(1, mode="drop")  # nothing was generated before
        return table.at[targets[:, None], columns(output_ids)].add(2, mode="drop")

    table = lax.fori_loop(0, jnp.where(jnp.any(valid), rows, 0), clear, counts.table)
    longest = jnp.max(jnp.where(valid, num_tokens, 0))
    return TokenCounts(lax.fori_loop(0, -(-longest // chunk), count, table))


def sample(
    logits: jax.Array,
    arrays: SamplingArrays,
    counts: TokenCounts,
    allowed: jax.Array,
    stop_ids: jax.Array,
    positions: jax.Array,
    num_generated: jax.Array,
    active: jax.Array,
    vocabulary: Vocabulary | None = None,
) -> SampleResult:
    """Choose one token per slot (traced).

    logits [slots, local] of any float dtype: this device's columns of `vocabulary` (default: all of it), as are those
    of counts. All else is the same on every device: allowed u32[slots, ceil(size/32)] as allowed_words() makes it;
    stop_ids i32[slots, n] (negative = unused) are held back while num_generated i32[slots] < min_tokens;
    positions i32[slots] of the tokens being chosen: with the seed they fix the draw. Rows that are not
    active bool[slots] get some token and switch no feature on. counts may have more rows than there are slots
    (pass it whole: a slice would be copied at every step).
    """
    vocabulary = vocabulary or Vocabulary(logits.shape[1])
    assert logits.shape[1] == vocabulary.local, (logits.shape, vocabulary)
    held = active & (num_generated < arrays.min_tokens)
    penalized = (
        (arrays.repetition_penalty != 1) | (arrays.presence_penalty != 0) | (arrays.frequency_penalty != 0)
    ) & active
    restricted = active & (arrays.restricted != 0)
    num_bias = jnp.where(active, arrays.num_bias, 0)
    x = logits.astype(jnp.float32)
    x = _times(jnp.any(restricted), partial(_mask, vocabulary), x, allowed, restricted)
    x = _times(jnp.max(num_bias), partial(_add_bias, vocabulary), x, arrays)
    x = _times(jnp.any(held), partial(_hold_stops, vocabulary), x, stop_ids, held)
    x = _times(jnp.any(penalized), _penalize, x, arrays, counts)
    tokens, bad = _choose(x, arrays, positions, active, vocabulary)
    logprobs, top_ids, top_logprobs = _logprobs(logits, tokens, arrays, active, vocabulary)
    return SampleResult(tokens, logprobs, top_ids, top_logprobs, bad)


def _times(turns: jax.Array, change: Callable[..., jax.Array], x: jax.Array, *operands: Any) -> jax.Array:
    """change(turn, x, *operands), `turns` times (False and True are 0 and 1).

    A loop, because unlike lax.cond it works in place and copies nothing when there is nothing to do. The barrier
    ties the operands to the turn, or XLA would move what can be computed from them alone ahead of the loop.
    """

    def turn(index: jax.Array, x: jax.Array) -> jax.Array:
        index, tied = lax.optimization_barrier((index, operands))
        return change(index, x, *tied)

    return lax.fori_loop(0, turns.astype(jnp.int32), turn, x)


def _mask(vocabulary: Vocabulary, _: jax.Array, x: jax.Array, allowed: jax.Array, restricted: jax.Array) -> jax.Array:
    """-inf where a restricted row's bit is 0. x f32[slots, local]."""
    slots, local = x.shape
    bits = (vocabulary.words(allowed)[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    keep = bits.reshape(slots, -1)[:, :local] != 0
    return jnp.where(keep | ~restricted[:, None], x, -jnp.inf)


def _add_bias(vocabulary: Vocabulary, index: jax.Array, x: jax.Array, arrays: SamplingArrays) -> jax.Array:
    """Add every row's index-th logit bias (unused entries are dropped)."""
    rows = jnp.arange(x.shape[0])
    return x.at[rows, vocabulary.columns(arrays.bias_ids[:, index])].add(arrays.bias_values[:, index], mode="drop")


def _hold_stops(vocabulary: Vocabulary, _: jax.Array, x: jax.Array, stop_ids: jax.Array, held: jax.Array) -> jax.Array:
    """-inf at the stop ids of rows that must go on."""
    ids = jnp.where(held[:, None] & (stop_ids >= 0), stop_ids, UNUSED_ID)
    return x.at[jnp.arange(x.shape[0])[:, None], vocabulary.columns(ids)].set(-jnp.inf, mode="drop")


def _penalize(_: jax.Array, x: jax.Array, arrays: SamplingArrays, counts: TokenCounts) -> jax.Array:
    """Repetition penalty over prompt and output (CTRL, Keskar et al. 2019), then frequency and presence over output."""
    seen = TokenCounts(counts.table[: x.shape[0]])
    repetition = arrays.repetition_penalty[:, None]
    repeated = jnp.where(x > 0, x / repetition, x * repetition)
    x = jnp.where(seen.table > 0, repeated, x)
    x = x - arrays.frequency_penalty[:, None] * seen.in_output.astype(jnp.float32)
    return x - jnp.where(seen.in_output > 0, arrays.presence_penalty[:, None], 0)


def _choose(
    x: jax.Array, arrays: SamplingArrays, positions: jax.Array, active: jax.Array, vocabulary: Vocabulary
) -> tuple[jax.Array, jax.Array]:
    """x [slots, local] with masks, bias and penalties applied -> tokens i32[slots], bad bool[slots]."""
    best, tokens, has_nan = largest(x)
    if vocabulary.num_shards > 1:
        best, tokens, has_nan = _agree(best, tokens, has_nan, vocabulary)
    bad = has_nan | ~jnp.isfinite(best)
    random = active & (arrays.temperature > 0) & ~bad
    tokens = lax.cond(
        jnp.any(random),
        lambda: jnp.where(random, _draw(x, best, arrays, positions, random, vocabulary), tokens),
        lambda: tokens,
    )
    return jnp.minimum(tokens, vocabulary.size - 1), bad


def _agree(
    best: jax.Array, column: jax.Array, has_nan: jax.Array, vocabulary: Vocabulary
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """largest() of this device's columns -> that of the vocabulary: the one collective of choosing greedily."""
    values, ids = vocabulary.gather_candidates(jnp.where(has_nan, jnp.nan, best), column)
    best = jnp.max(values, axis=0)
    return best, jnp.min(jnp.where(values == best, ids, UNUSED_ID), axis=0), jnp.any(jnp.isnan(values), axis=0)


def _draw(
    x: jax.Array,
    best: jax.Array,
    arrays: SamplingArrays,
    positions: jax.Array,
    random: jax.Array,
    vocabulary: Vocabulary,
) -> jax.Array:
    """One token per row of softmax(x / temperature), truncated by min-p, top-k and top-p -> i32[slots].

    Inverse CDF in two steps of one 64-bit threefry block, keyed by seed and position: the first word picks a group
    of tokens (ids equal modulo the group width), the second a token in it.
    """
    slots, vocab = x.shape[0], vocabulary.size
    width = group_width(vocab)
    has_k = random & (arrays.top_k > 0) & (arrays.top_k < vocab)
    has_p = random & (arrays.top_p < 1)
    k_threshold = lax.cond(
        jnp.any(has_k),
        lambda: top_k_threshold(x, best, arrays.top_k, has_k, vocabulary),
        lambda: jnp.full((slots,), -jnp.inf),
    )
    temperature = jnp.where(random, arrays.temperature, 1)
    weights = masked_weights(x, best, temperature, k_threshold, arrays.min_p)
    p_threshold = lax.cond(
        jnp.any(has_p), lambda: top_p_threshold(weights, arrays.top_p, has_p, vocabulary), lambda: jnp.zeros((slots,))
    )
    bits = jax.vmap(_draw_bits)(arrays.seed, positions)
    uniform = (bits >> 8).astype(jnp.float32) * 2.0**-24
    group = _invert_cdf(vocabulary_group_sums(weights, p_threshold, vocabulary), uniform[:, 0])
    ids = group[:, None] + jnp.arange(0, vocab, width)[None]
    members = vocabulary.take(weights, jnp.minimum(ids, vocab - 1))
    members = jnp.where((ids < vocab) & (members >= p_threshold[:, None]), members, 0)
    member = _invert_cdf(members, uniform[:, 1])
    return group + member * width


def _draw_bits(seed: jax.Array, position: jax.Array) -> jax.Array:
    """seed u32[2], position i32[] -> u32[2]."""
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return jax.random.bits(jax.random.fold_in(key, position), (2,), jnp.uint32)


def _invert_cdf(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """weights f32[slots, n] >= 0, uniform f32[slots] in [0, 1) -> first index whose cumulative sum exceeds
    uniform x total; never one of weight 0, whatever the rounding."""
    sums = cumulative_sums(weights)
    hit = (sums > (uniform * sums[:, -1])[:, None]) & (weights > 0)
    index = lax.broadcasted_iota(jnp.int32, weights.shape, 1)
    first = jnp.min(jnp.where(hit, index, UNUSED_ID), axis=1)
    last = jnp.max(jnp.where(weights > 0, index, 0), axis=1)
    return jnp.where(first == UNUSED_ID, last, first)


def _logprobs(
    logits: jax.Array, tokens: jax.Array, arrays: SamplingArrays, active: jax.Array, vocabulary: Vocabulary
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of the tokens f32[slots]; ids and log-probabilities of the best [slots, MAX_TOP_LOGPROBS]."""
    slots = logits.shape[0]

    def own() -> tuple[jax.Array, jax.Array]:
        chosen = vocabulary.take(logits, tokens[:, None])[:, 0].astype(jnp.float32)
        normalizer = log_normalizers(logits, vocabulary)
        return chosen - normalizer, normalizer

    def top(normalizer: jax.Array) -> tuple[jax.Array, jax.Array]:
        return best_logprobs(logits, normalizer, vocabulary)

    def no_top(_: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = (slots, MAX_TOP_LOGPROBS)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    wanted = jnp.any(active & (arrays.wants_logprobs != 0))
    logprobs, normalizer = lax.cond(wanted, own, lambda: (jnp.zeros((slots,)), jnp.zeros((slots,))))
    top_ids, top_logprobs = lax.cond(jnp.any(active & (arrays.top_logprobs > 0)), top, no_top, normalizer)
    return logprobs, top_ids, top_logprobs
