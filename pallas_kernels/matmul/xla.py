"""XLA's own dots: every platform, every shape, every format.

Hides what XLA:CPU serves badly: a row never goes alone (its dot adds in another order than the others', and in
bfloat16 runs ten times slower), and quantized weights are widened some outputs at a time, in cache, where a whole one
would be written to memory first.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.devices import Device
from pallas_kernels.tensors import QuantizedTensor, dequantize

MIN_ROWS = 2  # from 2 rows up, XLA:CPU's float32 dot gives a row the same bits whatever the number of rows
MIN_ROWS_BF16_CPU = 4  # XLA:CPU reads bfloat16 weights faster with 4 rows than with fewer
WEIGHTS_AT_A_TIME_CPU = 1 << 19  # widened before they are multiplied: 1 MB of bfloat16, a core's second-level cache
INVARIANT_ROWS = 32  # of every dot where a row's bits must not depend on their number; fewer read weights too often


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
    rows = x.shape[0]
    on_cpu = device.platform == "cpu"
    if on_cpu and x.dtype == jnp.float8_e4m3fn:
        x = x.astype(jnp.bfloat16)  # exactly; XLA:CPU multiplies fp8 one value at a time
    least = MIN_ROWS_BF16_CPU if on_cpu and x.dtype == jnp.bfloat16 else MIN_ROWS
    if rows < least:
        x = jnp.pad(x, ((0, least - rows), (0, 0)))
    if on_cpu and isinstance(weight, QuantizedTensor) and x.dtype != jnp.int8:
        product = blockwise(x, weight)
    else:
        product = multiply(x, weight)
    product = product[:rows]
    return (product if row_scales is None else product * row_scales[:, None]).astype(out_dtype)


def run_invariant(
    x: jax.Array,
    weight: jax.Array | QuantizedTensor,
    *,
    row_scales: jax.Array | None = None,
    out_dtype: jnp.dtype,
    device: Device,
) -> jax.Array:
    """`run`, a fixed number of rows at a time: every dot has the same shape, hence adds in the same order.

    In float32 the dot itself gives a row the same bits from two rows up, and integers add exactly.
    """
    if x.dtype in (jnp.float32, jnp.int8):
        return run(x, weight, row_scales=row_scales, out_dtype=out_dtype, device=device)
    rows, in_size = x.shape
    blocks = jnp.pad(x, ((0, -rows % INVARIANT_ROWS), (0, 0))).reshape(-1, INVARIANT_ROWS, in_size)
    product = lax.map(lambda block: run(block, weight, out_dtype=jnp.dtype(jnp.float32), device=device), blocks)
    product = product.reshape(-1, weight.shape[0])[:rows]
    return (product if row_scales is None else product * row_scales[:, None]).astype(out_dtype)


def multiply(x: jax.Array, weight: jax.Array | QuantizedTensor) -> jax.Array:
    """`x [rows, in]`, `weight [out, in]` -> f32 `[rows, out]`: one dot."""
    if not isinstance(weight, QuantizedTensor):
        return _dot(x, weight)
    if weight.activation is not None and weight.scales is not None and x.dtype == weight.values.dtype:
        return _dot(x, weight.values).astype(jnp.float32) * weight.scales.astype(jnp.float32)
    if weight.scales is None or weight.num_groups > 1:
        return _dot(x, dequantize(weight).astype(x.dtype))
    # One scale per output can wait until after the dot; values are exact in x's dtype, scaled ones are not.
    return _dot(x, dequantize(replace(weight, scales=None)).astype(x.dtype)) * weight.scales.astype(jnp.float32)


def _dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x [rows, in]`, `weight [out, in]` -> f32 `[rows, out]`; int32 of integers."""
    outputs = weight.shape[0]
    if outputs == 1:  # on CPUs a one-column dot, like a one-row dot, adds in an order of its own
        weight = jnp.concatenate([weight, weight])
    product = lax.dot_general(
        x,
        weight,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,  # else TPUs and GPUs round float32
        preferred_element_type=jnp.int32 if x.dtype == jnp.int8 else jnp.float32,
    )
    return product[:, :outputs]


def blockwise(x: jax.Array, weight: jax.Array | QuantizedTensor, *, group: jax.Array | None = None) -> jax.Array:
    """`multiply`, some outputs at a time, with one `group` of a weight `[groups, out, in]` where it has groups.

    The last block reaches back over the one before it where outputs do not divide.
    """
    out_size, in_size = weight.shape[-2:]
    block = min(max(1, WEIGHTS_AT_A_TIME_CPU // in_size), out_size)

    def body(i: jax.Array, product: jax.Array) -> jax.Array:
        start = jnp.minimum(i * block, out_size - block)
        part = multiply(x, _cut(weight, start, block, group))
        return lax.dynamic_update_slice_in_dim(product, part, start, axis=1)

    empty = jnp.zeros((x.shape[0], out_size), jnp.float32)
    return lax.fori_loop(0, -(-out_size // block), body, empty)


def _cut(
    weight: jax.Array | QuantizedTensor, start: jax.Array, size: int, group: jax.Array | None
) -> jax.Array | QuantizedTensor:
    """Outputs `start : start + size` of a weight `[out, in]`, or of one group of `[groups, out, in]`."""

    def cut(array: jax.Array, axis: int) -> jax.Array:
        starts, sizes = [jnp.int32(0)] * array.ndim, list(array.shape)
        starts[axis], sizes[axis] = start, size
        if group is not None:  # in one slice: two would copy the whole group
            starts[0], sizes[0] = group, 1
        if array.dtype == jnp.float8_e4m3fn:  # as bytes: XLA:CPU would widen all of it to cut a piece out
            array = lax.bitcast_convert_type(array, jnp.uint8)
            part = _widened_fp8(lax.dynamic_slice(array, starts, sizes))
        else:
            part = lax.dynamic_slice(array, starts, sizes)
        return part if group is None else part[0]

    if not isinstance(weight, QuantizedTensor):
        return cut(weight, -2)
    return replace(
        weight,
        values=cut(weight.values, -2),
        scales=None if weight.scales is None else cut(weight.scales, -1),
        sparse_index=None if weight.sparse_index is None else cut(weight.sparse_index, -2),
    )


def _widened_fp8(bits: jax.Array) -> jax.Array:
    """uint8 bits of float8_e4m3fn -> the same numbers in bfloat16, some times faster than XLA:CPU's conversion.

    Shifted into a float16 they are a 256th (exponents are biased by 7 and by 15), also where they are subnormal.
    """
    wide = bits.astype(jnp.uint16)
    magnitude = wide & 0x7F
    half = lax.bitcast_convert_type(((wide & 0x80) << 8) | (magnitude << 7), jnp.float16)
    return jnp.where(magnitude == 0x7F, jnp.nan, half.astype(jnp.float32) * 256).astype(jnp.bfloat16)
