"""Top-k, top-p and min-p without sorting: exact thresholds found by bisecting the bit patterns of floats."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.vocabulary_passes import group_width, grouped_sum
from pallas_kernels.reductions import row_sums
from sharding.vocabulary import Vocabulary


def group_sums(weights: jax.Array, threshold: jax.Array) -> jax.Array:
    """Per group of these columns, the sum of the weights that are >= threshold.

    weights f[slots, columns], threshold f[slots] -> f32[slots, group_width(columns)]
    """
    return grouped_sum(weights, _at_least(threshold), group_width(weights.shape[1]))


def vocabulary_group_sums(weights: jax.Array, threshold: jax.Array, vocabulary: Vocabulary) -> jax.Array:
    """As group_sums() of the whole vocabulary: weights f[slots, local] -> f32[slots, group_width(size)]."""
    width = group_width(vocabulary.size)
    own = grouped_sum(weights, _at_least(threshold), width)
    if vocabulary.num_shards > 1:
        own = jnp.roll(own, vocabulary.first % width, axis=1)  # the first column's group comes first in it
    return vocabulary.sum_in_order(own)


def masked_weights(
    x: jax.Array, best: jax.Array, temperature: jax.Array, k_threshold: jax.Array, min_p: jax.Array
) -> jax.Array:
    """exp((x - best) / temperature), and 0 where x < k_threshold or the result < min_p. x [slots, vocab] -> f32.

    The best token's weight is 1, so weights compare with min_p as probabilities do with min_p times the largest.
    """
    x = x.astype(jnp.float32)
    weights = jnp.exp((x - best[:, None]) / temperature[:, None])
    return jnp.where((x >= k_threshold[:, None]) & (weights >= min_p[:, None]), weights, 0)


def top_k_threshold(
    x: jax.Array, best: jax.Array, top_k: jax.Array, wanted: jax.Array, vocabulary: Vocabulary
) -> jax.Array:
    """The top_k-th largest of each row of x [slots, local], or a value that keeps the same tokens -> f32[slots].

    Tokens tied with the top_k-th stay. Rows that are not wanted bool[slots] get -inf. best f32[slots] are the maxima.
    """
    width = group_width(x.shape[1])

    def count(threshold: jax.Array) -> jax.Array:
        at_least = grouped_sum(x, lambda part: (part >= threshold[:, None]).astype(jnp.int32), width)
        return vocabulary.sum(jnp.sum(at_least, axis=1))

    top = _key(best) + 1
    low, _ = _bisect(
        count, top_k, _key(jnp.full_like(best, -jnp.inf)), top, wanted, lambda low, at_low, at_high: at_low == top_k
    )
    return jnp.where(wanted, _value(low), -jnp.inf)


def top_p_threshold(weights: jax.Array, top_p: jax.Array, wanted: jax.Array, vocabulary: Vocabulary) -> jax.Array:
    """The largest t such that the weights >= t hold top_p of each row's sum, or one that keeps the same tokens.

    Nucleus sampling (Holtzman et al. 2019). weights f32[slots, local] in [0, 1], the largest 1; equal weights stay
    together; masses are float32 sums. Rows that are not wanted bool[slots] get 0. -> f32[slots]
    """

    def mass(threshold: jax.Array) -> jax.Array:
        return vocabulary.sum_in_order(row_sums(group_sums(weights, threshold)))

    def single(low: jax.Array, at_low: jax.Array, at_high: jax.Array) -> jax.Array:
        return at_low - at_high < 1.5 * _value(low)  # at most one token lies between: the bits below it are no matter

    total = mass(jnp.zeros_like(top_p))
    # All weights below total x (1 - top_p) / vocab together cannot hold more than what may be cut; 0.9 covers rounding.
    low = jnp.maximum(total * (1 - top_p) * (0.9 / vocabulary.size), 0)
    high = jnp.full_like(low, 1.0)
    low, _ = _bisect(mass, top_p * total, _key(low), _key(high) + 1, wanted, single)
    return jnp.where(wanted, _value(low), 0)


def _at_least(threshold: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """slice [slots, n] -> f32, with 0 for what is below threshold f[slots]."""
    return lambda part: jnp.where(part >= threshold[:, None], part, 0).astype(jnp.float32)


_State = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]  # low, high, measures at both, open


def _bisect(
    measure: Callable[[jax.Array], jax.Array],
    target: jax.Array,
    low: jax.Array,
    high: jax.Array,
    wanted: jax.Array,
    settled: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Per row, keys low < high that are neighbours or settled, with measure(low) >= target > measure(high).

    measure (of float thresholds) must not grow with the threshold; low and high i32[slots] must bracket the target.
    A row that has ended stays as it is while others go on, so it does not depend on its neighbours.
    """

    def open_rows(low: jax.Array, high: jax.Array, at_low: jax.Array, at_high: jax.Array) -> jax.Array:
        gap = high.astype(jnp.uint32) - low.astype(jnp.uint32)  # unsigned: the keys span all 32 bits
        return wanted & (low < high) & (gap > 1) & ~settled(low, at_low, at_high)

    def step(state: _State) -> _State:
        low, high, at_low, at_high, is_open = state
        middle = (low & high) + ((low ^ high) >> 1)  # floor of the mean, without overflow
        at_middle = measure(_value(middle))
        up, down = is_open & (at_middle >= target), is_open & (at_middle < target)
        low, at_low = jnp.where(up, middle, low), jnp.where(up, at_middle, at_low)
        high, at_high = jnp.where(down, middle, high), jnp.where(down, at_middle, at_high)
        return low, high, at_low, at_high, open_rows(low, high, at_low, at_high)

    at_low = measure(_value(low))
    at_high = jnp.zeros_like(at_low)
    state = (low, high, at_low, at_high, open_rows(low, high, at_low, at_high))
    low, high, *_ = lax.while_loop(lambda state: jnp.any(state[-1]), step, state)
    return low, high


def _key(x: jax.Array) -> jax.Array:
    """f32 -> i32 that sort alike (-0 below 0)."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _value(key: jax.Array) -> jax.Array:
    """The inverse of _key()."""
    return lax.bitcast_convert_type(jnp.where(key < 0, key ^ 0x7FFFFFFF, key), jnp.float32)
