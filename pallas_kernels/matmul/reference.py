"""The oracle: everything widened to float32, one dot, rounded once at the end. W8A8 multiplies exact integers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.devices import Device
from pallas_kernels.tensors import QuantizedTensor, dequantize


def refuse(
    *, rows: int, in_size: int, out_size: int, dtype: str, out_dtype: str, format: str, device: Device
) -> str | None:
    """It takes everything."""
    return None


def run(
    x: jax.Array,
    weight: jax.Array | QuantizedTensor,
    *,
    row_scales: jax.Array | None = None,
    out_dtype: jnp.dtype,
    device: Device,
) -> jax.Array:
    """`x [rows, in]` (W8A8: quantized, `row_scales f32[rows]`), `weight [out, in]` -> `[rows, out]`."""
    wide = jnp.pad(x, ((0, 1), (0, 0)))  # a one-row dot would add in another order
    if isinstance(weight, QuantizedTensor) and weight.activation == "int8":
        assert weight.scales is not None
        sums = lax.dot(wide.astype(jnp.int32), weight.values.T.astype(jnp.int32))  # exact: |sum| <= in * 127 * 128
        product = sums.astype(jnp.float32) * weight.scales.astype(jnp.float32)
    else:
        plain = dequantize(weight) if isinstance(weight, QuantizedTensor) else weight.astype(jnp.float32)
        product = lax.dot(wide.astype(jnp.float32), plain.T, precision=lax.Precision.HIGHEST)
    product = product[: x.shape[0]]
    if row_scales is not None:
        product *= row_scales[:, None]
    return product.astype(out_dtype)
