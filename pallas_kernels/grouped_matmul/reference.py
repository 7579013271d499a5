"""The oracle: every group's weight multiplies all rows, and each row keeps the product of its own group."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.devices import Device
from pallas_kernels.matmul import reference
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
    """It takes everything."""
    return None


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
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])[:, None]
    result = jnp.zeros((x.shape[0], weight.shape[1]), out_dtype)
    for group in range(group_sizes.shape[0]):
        own = jax.tree.map(lambda array, group=group: array[group], weight)
        product = reference.run(x, own, row_scales=row_scales, out_dtype=out_dtype, device=device)
        result = jnp.where((row >= ends[group] - group_sizes[group]) & (row < ends[group]), product, result)
    return result
