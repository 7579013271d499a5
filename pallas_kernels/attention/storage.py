"""How K/V rows are stored in fewer bits: one scale per token and KV head, the same numbers on every backend.

Rows are quantized (`tensors.quantize_rows`) before a kernel sees them (new rows are few), so backends agree to the last
bit and each only decides where values and scales lie.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import tensors

PLAIN = ("bfloat16", "float32", "float16")
QUANTIZED = ("int8", "float8_e4m3fn", "int4")
DTYPES = (*PLAIN, *QUANTIZED)


def bits(dtype: DTypeLike) -> int:
    """Bits of one stored value."""
    return 4 if jnp.dtype(dtype).name == "int4" else 8 * jnp.dtype(dtype).itemsize


def is_quantized(dtype: DTypeLike) -> bool:
    return jnp.dtype(dtype).name in QUANTIZED


def pack_int4(values: jax.Array) -> jax.Array:
    """int8 from -8 to 7, `[..., n]` -> uint8 `[..., n / 2]`: value i in the low half of byte i, i + n/2 above it."""
    return tensors.pack(values, values.shape[-1])


def unpack_int4(packed: jax.Array) -> jax.Array:
    """The inverse of `pack_int4`: int8 `[..., 2 * bytes]`."""
    return tensors.unpack(packed, 2 * packed.shape[-1])
