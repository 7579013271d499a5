"""Sums, softmax and the like whose bits, on a CPU, do not depend on how many rows there are.

XLA:CPU vectorizes a plain row reduction differently for different numbers of rows; a dot with ones it does not (for two
rows or more). And it computes exp and log of 3, 6 or 7 numbers in other ways than of many. Elsewhere these are plain
operations: a matrix unit takes six passes over every value to add them up in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import devices

LANES = 16  # of the widest vectors of a CPU, in float32


def row_sums(x: jax.Array) -> jax.Array:
    """`x f32[..., n]` -> `f32[...]`."""
    if not devices.on_cpu():
        return jnp.sum(x, axis=-1)
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 1:  # a one-row dot adds in yet another order
        rows = jnp.concatenate([rows, rows])
    if rows.shape[1] < LANES:  # so do the smallest dots
        rows = jnp.pad(rows, ((0, 0), (0, LANES - rows.shape[1])))
    ones = jnp.ones((2, rows.shape[1]), jnp.float32)
    sums = lax.dot_general(rows, ones, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
    return sums[: x.size // x.shape[-1], 0].reshape(x.shape[:-1])


def softmax(x: jax.Array) -> jax.Array:
    """`x f32[..., n]` -> the same shape, along the last axis. On a CPU the sum is `row_sums`; a maximum has no order.

    The barrier keeps XLA:CPU from fusing the maximum with the exponential, whose last bit then depends on the rows.
    """
    if not devices.on_cpu():
        return jax.nn.softmax(x)
    highest = lax.optimization_barrier(jnp.max(x, axis=-1, keepdims=True))
    raised = in_lanes(jnp.exp, x - highest)
    return raised / row_sums(raised)[..., None]


def in_lanes(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`function`, elementwise, of `x [...]` in whole vectors, so that a few numbers are treated as many are."""
    if not devices.on_cpu():
        return function(x)
    whole = jnp.pad(x.reshape(-1), (0, -x.size % LANES), constant_values=1)
    return lax.optimization_barrier(function(lax.optimization_barrier(whole)))[: x.size].reshape(x.shape)
