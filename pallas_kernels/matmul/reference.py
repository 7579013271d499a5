"""The oracle: everything widened to float32, one dot, rounded once at the end."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def refuse(*, rows: int, in_size: int, out_size: int, dtype: str, out_dtype: str, platform: str) -> str | None:
    """It takes everything."""
    return None


def run(x: jax.Array, weight: jax.Array, *, out_dtype: jnp.dtype) -> jax.Array:
    """`x [rows, in]`, `weight [out, in]` -> `[rows, out]`."""
    wide = jnp.pad(x, ((0, 1), (0, 0))).astype(jnp.float32)  # a one-row dot would add in another order
    product = lax.dot(wide, weight.astype(jnp.float32).T, precision=lax.Precision.HIGHEST)
    return product[: x.shape[0]].astype(out_dtype)
