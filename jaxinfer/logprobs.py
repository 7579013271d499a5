"""Log-probabilities of softmax(logits), for sampled tokens and for prompts alike.

Hides that a row has the same bits in any number of rows, and where the columns of the vocabulary lie.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.request import MAX_TOP_LOGPROBS
from jaxinfer.truncation import group_sums, masked_weights
from jaxinfer.vocabulary_passes import several_largest
from pallas_kernels.reductions import in_lanes, row_sums
from sharding.vocabulary import Vocabulary


def log_normalizers(logits: jax.Array, vocabulary: Vocabulary | None = None) -> jax.Array:
    """log(sum(exp(row))) of each row of logits [rows, local] -> f32[rows]; logits less this are log-probabilities.

    `vocabulary` (default: not split) says whose columns these are.
    """
    vocabulary = vocabulary or Vocabulary(logits.shape[1])
    best = vocabulary.max(jnp.max(logits, axis=1).astype(jnp.float32))
    best = lax.optimization_barrier(best)  # as in reductions.softmax
    ones = jnp.ones((logits.shape[0],), jnp.float32)
    total = row_sums(group_sums(masked_weights(logits, best, ones, -jnp.inf * ones, 0 * ones), 0 * ones))
    return best + in_lanes(jnp.log, vocabulary.sum_in_order(total))


def best_logprobs(
    logits: jax.Array, normalizers: jax.Array, vocabulary: Vocabulary | None = None
) -> tuple[jax.Array, jax.Array]:
    """The most likely tokens' ids i32[rows, MAX_TOP_LOGPROBS] and log-probabilities f32, best first, lower ids on ties.

    logits [rows, local] of `vocabulary` (default: not split); normalizers f32[rows] as log_normalizers() gives them.
    A smaller vocabulary is filled up with id -1, probability 0.
    """
    vocabulary = vocabulary or Vocabulary(logits.shape[1])
    num_top = min(MAX_TOP_LOGPROBS, vocabulary.size)
    values, ids = several_largest(logits, min(num_top, logits.shape[1]))
    if vocabulary.num_shards > 1:
        # Shard after shard, so ids ascend among equal values, and padding comes after all tokens.
        values, ids = (jnp.concatenate([*part], axis=1) for part in vocabulary.gather_candidates(values, ids))
        values, at = several_largest(values, num_top)
        ids = jnp.take_along_axis(ids, at, axis=1)
    rest = ((0, 0), (0, MAX_TOP_LOGPROBS - num_top))
    return (
        jnp.pad(ids, rest, constant_values=-1),
        jnp.pad(values - normalizers[:, None], rest, constant_values=-jnp.inf),
    )
