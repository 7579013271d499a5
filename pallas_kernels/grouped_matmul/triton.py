"""Grouped products on GPUs, in Triton: the kernel of `matmul`, whose tiles of rows belong to one group each.

Hides how rows become tiles. Dense weights are served too: XLA multiplies every row by every group's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import triton_launch
from pallas_kernels.devices import Device
from pallas_kernels.matmul import triton as matmul_triton
from pallas_kernels.tensors import QuantizedTensor


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
    return matmul_triton.refuse_kind(in_size, dtype, out_dtype, format, device)


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
    (tokens, in_size), num_groups = x.shape, weight.shape[0]
    mean = -(-tokens // num_groups)  # rows of a group, if all are alike
    busy = min(tokens, num_groups)  # groups with rows, at most
    row_tiles = busy * -(-mean // matmul_triton.FEW_ROWS)
    blocks = matmul_triton.blocks_of(
        "grouped_matmul.triton", mean, row_tiles, in_size, weight, device, num_groups=num_groups
    )
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends, jnp.full(1, tokens, jnp.int32)])  # the last: of no group
    tiles = triton_launch.tiles_of(starts, blocks.rows, tokens)
    return matmul_triton.multiply(x, weight, row_scales, tiles, blocks, out_dtype, device)
