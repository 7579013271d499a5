"""Grouped matmul for TPUs: pieces of rows mapped to their group's weight by scalar prefetch, as MegaBlocks does it.

Hides which tile of which weight a step of the grid reads, and how groups that meet within a tile of rows share it.
Tiles of weights are multiplied as in the plain matmul's kernel.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tuning
from pallas_kernels.devices import Device
from pallas_kernels.grouped_matmul.schedule import Schedule, schedule
from pallas_kernels.matmul import mosaic_tpu as matmul
from pallas_kernels.matmul.mosaic_tpu import Operands, Tiling, finished, tile_product
from pallas_kernels.tensors import QuantizedTensor

LEAST_ROWS = 128  # of a tile of rows, where there are as many: fewer tiles meet fewer groups twice


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
    """None, or why this case is not served."""
    return matmul.unfit(format, in_size, dtype, out_dtype)


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
    tokens, in_size = x.shape
    num_groups, out_size, _ = weight.shape
    blocks = tuning.block_sizes(
        "grouped_matmul.mosaic_tpu",
        device,
        default_blocks(weight, x, device),
        format=weight.format if isinstance(weight, QuantizedTensor) else "dense",
        rows=tuning.row_bucket(tokens),
        in_size=in_size,
        out_size=out_size,
        num_groups=num_groups,
    )
    x = matmul.matrix_unit_x(x, device)
    tiling = matmul.tiling_of(weight, blocks, integer=x.dtype == jnp.int8)
    operands = matmul.operands_of(x, weight, row_scales, tiling)
    pieces = schedule(group_sizes, operands.x.shape[1], tiling.rows)
    return _call(pieces, operands, tiling, out_size, out_dtype)[:tokens]


def default_blocks(weight: jax.Array | QuantizedTensor, x: jax.Array, device: Device) -> dict[str, int]:
    """Tiles of rows about as long as a group, but no longer than in the plain matmul; tiles of weights as there."""
    blocks = matmul.default_blocks(weight, x, device)
    per_group = tuning.row_bucket(x.shape[0] // weight.shape[0])
    return {**blocks, "rows": min(max(per_group, LEAST_ROWS), blocks["rows"])}


def _kernel(tiling: Tiling, pieces: Schedule, tile: Operands, out: jax.Array, sums: jax.Array) -> None:
    """One step of the grid (outputs, pieces, inputs). `out [rows, outs]` stays while pieces are of the same tile."""
    piece, step = pl.program_id(1), pl.program_id(2)
    start, stop = pieces.start[piece], pieces.stop[piece]

    @pl.when(step == 0)
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)

    @pl.when(start < stop)
    def _() -> None:
        sums[...] += tile_product(tiling, tile)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        own_tile = pieces.tile[piece]
        is_first = (piece == 0) | (own_tile != pieces.tile[jnp.maximum(piece - 1, 0)])
        row = own_tile * tiling.rows + lax.broadcasted_iota(jnp.int32, out.shape, 0)
        before = jnp.where(is_first, 0.0, out[...].astype(jnp.float32))
        product = finished(tiling, sums[...], tile)
        out[...] = jnp.where((row >= start) & (row < stop), product, before).astype(out.dtype)


def _call(pieces: Schedule, operands: Operands, tiling: Tiling, out_size: int, out_dtype: jnp.dtype) -> jax.Array:
    """`[tokens, out]`, tokens being a multiple of the tile's."""
    tokens = operands.x.shape[1]
    outs = min(tiling.outs, out_size)
    specs = matmul.block_specs(
        operands,
        tiling,
        outs,
        row_tile=lambda j, t, k, pieces: pieces.tile[t],
        weight_tile=lambda j, t, k, pieces: (pieces.group[t], j, k),
    )
    grid = (pl.cdiv(out_size, outs), pieces.tile.shape[0], operands.x.shape[2] // tiling.plane_inputs)
    return pl.pallas_call(
        functools.partial(_kernel, tiling),
        out_shape=jax.ShapeDtypeStruct((tokens, out_size), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[specs],
            out_specs=pl.BlockSpec((tiling.rows, outs), lambda j, t, k, pieces: (pieces.tile[t], j)),
            scratch_shapes=[pltpu.VMEM((tiling.rows, outs), tiling.sum_dtype)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=matmul.VMEM_LIMIT
        ),
        name=f"grouped_matmul_{tiling.format}",
    )(pieces, operands)
