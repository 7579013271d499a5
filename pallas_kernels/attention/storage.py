"""How K/V rows are stored in fewer bits: one scale per token and KV head, the same numbers on every backend.

Rows are quantized before a kernel sees them (new rows are few), so backends agree to the last bit and each only
decides where values and scales lie.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

PLAIN = ("bfloat16", "float32", "float16")
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "int4": 7.0}  # of a quantized value; symmetric around zero
DTYPES = (*PLAIN, *LARGEST)


def bits(dtype: DTypeLike) -> int:
    """Bits of one stored value."""
    return 4 if jnp.dtype(dtype).name == "int4" else 8 * jnp.dtype(dtype).itemsize


def is_quantized(dtype: DTypeLike) -> bool:
    return jnp.dtype(dtype).name in LARGEST


def quantize(rows: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """`rows [..., head_dim]` -> values of the same shape, `f32[...]` scales; a row is about `values * scale`.

    `dtype` is "int8", "float8_e4m3fn" or "int4"; int4 values come as int8 between -7 and 7. A row's largest magnitude
    becomes the format's largest value; a row of zeros has scale 1. NaN stays NaN through its scale.
    """
    name = jnp.dtype(dtype).name
    largest = LARGEST[name]
    wide = rows.astype(jnp.float32)
    highest = jnp.max(jnp.abs(wide), axis=-1)
    scale = jnp.where(highest == 0, 1.0, highest / largest)
    scaled = jnp.clip(wide / scale[..., None], -largest, largest)
    if name == "float8_e4m3fn":
        return scaled.astype(jnp.float8_e4m3fn), scale
    return jnp.round(jnp.nan_to_num(scaled)).astype(jnp.int8), scale


def pack_int4(values: jax.Array) -> jax.Array:
    """int8 from -8 to 7, `[..., n]` -> uint8 `[..., n / 2]`: value i in the low half of byte i, i + n/2 above it."""
    low, high = jnp.split(values.astype(jnp.uint8) & 0xF, 2, axis=-1)
    return low | (high << 4)


def unpack_int4(packed: jax.Array) -> jax.Array:
    """The inverse of `pack_int4`: int8 `[..., 2 * bytes]`."""
    signed = packed.astype(jnp.int8)
    low = jnp.right_shift(jnp.left_shift(signed, 4), 4)
    return jnp.concatenate([low, jnp.right_shift(signed, 4)], axis=-1)
