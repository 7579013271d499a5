"""XLA's own dot: every platform, every shape.

Hides the row counts that XLA:CPU serves badly: its one-row dot adds in another order than the others (and in bfloat16
runs ten times slower), so a row never goes alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

MIN_ROWS = 2  # from 2 rows up, XLA:CPU's float32 dot gives a row the same bits whatever the number of rows
MIN_ROWS_BF16_CPU = 4  # XLA:CPU reads bfloat16 weights faster with 4 rows than with fewer


def refuse(*, rows: int, in_size: int, out_size: int, dtype: str, out_dtype: str, platform: str) -> str | None:
    """It takes everything."""
    return None


def run(x: jax.Array, weight: jax.Array, *, out_dtype: jnp.dtype) -> jax.Array:
    """`x [rows, in]`, `weight [out, in]` -> `[rows, out]`."""
    rows = x.shape[0]
    on_cpu = jax.default_backend() == "cpu"
    least = MIN_ROWS_BF16_CPU if on_cpu and x.dtype == jnp.bfloat16 else MIN_ROWS
    if rows < least:
        x = jnp.pad(x, ((0, least - rows), (0, 0)))
    product = lax.dot_general(
        x,
        weight,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,  # else TPUs and GPUs round float32
        preferred_element_type=jnp.float32,
    )
    return product[:rows].astype(out_dtype)
