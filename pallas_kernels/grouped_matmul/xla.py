"""A loop over pieces of work, each one tile of rows times one group's weight: every platform, shape and format.

Hides that `lax.ragged_dot` multiplies all rows by every group's weight on CPUs. Weights are cut out some outputs at a
time, since a whole one would be copied to memory before its dot.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tuning
from pallas_kernels.devices import Device
from pallas_kernels.grouped_matmul.schedule import schedule
from pallas_kernels.matmul.xla import MIN_ROWS_BF16_CPU, blockwise
from pallas_kernels.tensors import QuantizedTensor

MOST_ROWS = 128  # of a tile
INVARIANT_ROWS = 16  # of every tile where a row's bits must not depend on how many tokens there are


def refuse(
    *,
    rows: int,
    in_size: int,
    out_size: int,
    num_groups: int,
    dtype: str,
    out_dtype: str,
    format: str,
    device: Device,
) -> str | None:
    """It takes everything."""
    return None


def tile_rows(tokens: int, num_groups: int) -> int:
    """Rows of a tile: about as many as a group has, between what one dot needs and MOST_ROWS."""
    return min(max(tuning.row_bucket(tokens // num_groups), MIN_ROWS_BF16_CPU), MOST_ROWS)


def run(
    x: jax.Array,
    weight: jax.Array | QuantizedTensor,
    group_sizes: jax.Array,
    *,
    row_scales: jax.Array | None = None,
    out_dtype: jnp.dtype,
    device: Device,
) -> jax.Array:
    """`x [tokens, in]` (W8A8: quantized, `row_scales f32[tokens]`), `weight [groups, out, in]` -> `[tokens, out]`."""
    rows = tile_rows(x.shape[0], group_sizes.shape[0])
    return _run(x, weight, group_sizes, rows, row_scales, out_dtype, device)


def run_invariant(
    x: jax.Array,
    weight: jax.Array | QuantizedTensor,
    group_sizes: jax.Array,
    *,
    row_scales: jax.Array | None = None,
    out_dtype: jnp.dtype,
    device: Device,
) -> jax.Array:
    """`run` with tiles of a fixed number of rows: every dot has the same shape, hence adds in the same order."""
    return _run(x, weight, group_sizes, INVARIANT_ROWS, row_scales, out_dtype, device)


def _run(
    x: jax.Array,
    weight: jax.Array | QuantizedTensor,
    group_sizes: jax.Array,
    rows: int,
    row_scales: jax.Array | None,
    out_dtype: jnp.dtype,
    device: Device,
) -> jax.Array:
    """`rows` rows of one tile at a time."""
    tokens = x.shape[0]
    if device.platform == "cpu" and x.dtype == jnp.float8_e4m3fn:
        x = x.astype(jnp.bfloat16)  # exactly; XLA:CPU multiplies fp8 one value at a time
    x = jnp.pad(x, ((0, -tokens % rows), (0, 0)))
    pieces = schedule(group_sizes, x.shape[0], rows)

    def multiply(piece: jax.Array, result: jax.Array) -> jax.Array:
        first = pieces.tile[piece] * rows
        product = blockwise(lax.dynamic_slice_in_dim(x, first, rows), weight, group=pieces.group[piece])
        row = first + jnp.arange(rows)[:, None]
        own = (row >= pieces.start[piece]) & (row < pieces.stop[piece])
        before = lax.dynamic_slice_in_dim(result, first, rows)
        return lax.dynamic_update_slice_in_dim(result, jnp.where(own, product, before), first, axis=0)

    def body(piece: jax.Array, result: jax.Array) -> jax.Array:
        has_rows = pieces.start[piece] < pieces.stop[piece]
        return lax.cond(has_rows, multiply, lambda piece, result: result, piece, result)

    empty = jnp.zeros((x.shape[0], weight.shape[1]), jnp.float32)
    product = lax.fori_loop(0, pieces.tile.shape[0], body, empty)[:tokens]
    if row_scales is not None:
        grouped = jnp.arange(tokens) < jnp.sum(group_sizes)  # what no group has is zero, whatever its scale
        product = jnp.where(grouped[:, None], product * row_scales[:, None], 0.0)
    return product.astype(out_dtype)
