"""One pass over rows of logits, as wide as a vocabulary: sums by groups, cumulative sums, the largest, the 20 largest.

Hides the layout that makes a pass cheap, to run and to compile. Tokens are grouped by id modulo the group width, so
that a group's sum is a chain of adds over contiguous slices. On XLA:CPU the chain is written out, and fuses into one
vectorized loop (0.13 ms for 16 x 128k, a third of a masked reduction over the minor axis). Elsewhere it is a loop over
slices that are whole vector registers wide: what is written out, or sorts, XLA:TPU compiles for many seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import devices

GROUP_SIZE = 32  # slices added up per pass, about
LANES = 128  # of a TPU's vector register


def group_width(vocab_size: int) -> int:
    """How many groups a vocabulary makes: tokens whose ids are equal modulo this number share a group.

    An odd multiple of LANES: slices a power of two apart would evict each other from a CPU's cache.
    """
    return LANES * (-(-vocab_size // (GROUP_SIZE * LANES)) | 1)


def grouped_sum(x: jax.Array, weigh: Callable[[jax.Array], jax.Array], width: int) -> jax.Array:
    """Sum of weigh(slice) over the slices of x [rows, columns], each `width` wide -> [rows, width], in their order."""
    num_whole = x.shape[1] // width
    total = (_written_out if devices.on_cpu() else _in_a_loop)(x, weigh, width, num_whole)
    if x.shape[1] % width:
        rest = weigh(x[:, num_whole * width :])
        rest = jnp.pad(rest, ((0, 0), (0, width - rest.shape[1])))
        total = rest if total is None else total + rest
    assert total is not None
    # Without the barrier XLA:CPU moves the adds into a caller's row sum and writes every slice out: four times slower.
    return lax.optimization_barrier(total)


def largest(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest value f32[rows] of x [rows, columns], its lowest index i32[rows], and bool[rows]: holds a NaN.

    Plain passes instead of jnp.argmax, whose pair of accumulators does not vectorize: ten times slower on XLA:CPU. NaN
    is looked for, for a vectorized maximum may drop it.
    """
    best = jnp.max(x, axis=1)
    if not devices.on_cpu():
        return best.astype(jnp.float32), _first(x == best[:, None]), jnp.any(x != x, axis=1)
    columns, width = x.shape[1], group_width(x.shape[1])
    index = jnp.full((x.shape[0], width), columns, jnp.int32)
    strange = jnp.zeros((x.shape[0], width), bool)
    lane = jnp.arange(width, dtype=jnp.int32)[None]
    for start in range(0, columns, width):
        part = x[:, start : start + width]
        found = jnp.where(part == best[:, None], start + lane[:, : part.shape[1]], columns)
        rest = ((0, 0), (0, width - part.shape[1]))
        index = jnp.minimum(index, jnp.pad(found, rest, constant_values=columns))
        strange |= jnp.pad(part != part, rest)
    return best.astype(jnp.float32), jnp.min(index, axis=1), jnp.any(strange, axis=1)


def several_largest(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest of each row of x [rows, columns], f32[rows, count], and their indices i32: largest first,
    lowest index first among equals. NaN counts for nothing in particular.
    """
    x = x.astype(jnp.float32)
    if devices.on_cpu():
        return lax.top_k(x, count)
    ids = lax.broadcasted_iota(jnp.int32, x.shape, 1)

    def next_one(turn: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        value, index, values, indices = found
        left = (x < value[:, None]) | ((x == value[:, None]) & (ids > index[:, None]))
        value = jnp.max(jnp.where(left, x, -jnp.inf), axis=1)
        index = jnp.minimum(_first(left & (x == value[:, None])), x.shape[1] - 1)  # where nothing but NaN is left
        return value, index, values.at[:, turn].set(value), indices.at[:, turn].set(index)

    rows = x.shape[0]
    none = jnp.zeros((rows, count), jnp.float32), jnp.zeros((rows, count), jnp.int32)
    start = (jnp.full((rows,), jnp.inf), jnp.full((rows,), -1, jnp.int32), *none)
    return lax.fori_loop(0, count, next_one, start)[2:]


def cumulative_sums(x: jax.Array) -> jax.Array:
    """Of x f32[rows, columns] the sums of each row's columns up to and with each, f32[rows, columns].

    XLA:TPU writes a cumulative sum out, as many adds as a register has lanes for each: half a million instructions for
    256 x 4,224. There each register's lanes are multiplied by a triangle of ones, and the registers' sums by another.
    """
    rows, columns = x.shape
    if devices.on_cpu() or columns <= LANES:
        return jnp.cumsum(x, axis=1)
    count = -(-columns // LANES)
    lanes = jnp.pad(x, ((0, 0), (0, count * LANES - columns))).reshape(rows, count, LANES)
    inside = _dot(lanes, jnp.triu(jnp.ones((LANES, LANES), x.dtype)))
    before = _dot(inside[..., -1], jnp.triu(jnp.ones((count, count), x.dtype), 1))
    return (inside + before[..., None]).reshape(rows, -1)[:, :columns]


def _written_out(x: jax.Array, weigh: Callable[[jax.Array], jax.Array], width: int, num_whole: int) -> jax.Array | None:
    parts = [weigh(x[:, index * width : (index + 1) * width]) for index in range(num_whole)]
    return reduce(jnp.add, parts) if parts else None


def _in_a_loop(x: jax.Array, weigh: Callable[[jax.Array], jax.Array], width: int, num_whole: int) -> jax.Array | None:
    if not num_whole:
        return None

    def add(index: jax.Array, total: jax.Array) -> jax.Array:
        return total + weigh(lax.dynamic_slice_in_dim(x, index * width, width, axis=1))

    return lax.fori_loop(1, num_whole, add, weigh(x[:, :width]))


def _dot(x: jax.Array, ones: jax.Array) -> jax.Array:
    """`x [..., n]` times `ones [n, m]`, in float32 throughout."""
    return jnp.matmul(x, ones, precision=lax.Precision.HIGHEST)


def _first(hits: jax.Array) -> jax.Array:
    """The index of the first true of each row of bool[rows, columns]; `columns` where there is none."""
    ids = lax.broadcasted_iota(jnp.int32, hits.shape, 1)
    return jnp.min(jnp.where(hits, ids, hits.shape[1]), axis=1)
