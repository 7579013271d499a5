"""Dense matrix multiplication with the weight as Hugging Face stores it, `[out, in]`.

Hides which code multiplies: XLA's dot, or on CPUs a native kernel that reads weights at memory speed. Accumulates in
float32. In float32 a row's bits do not depend on the number of rows, nor in bfloat16 while one backend serves them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.dispatch import Op

OP = Op(
    name="matmul",
    backends={
        "llvm_cpu": "pallas_kernels.matmul.llvm_cpu",
        "xla": "pallas_kernels.matmul.xla",
        "reference": "pallas_kernels.matmul.reference",
    },
)
BACKENDS = OP.backends


def matmul(x: jax.Array, weight: jax.Array, *, backend: str = "auto", out_dtype: DTypeLike | None = None) -> jax.Array:
    """`x [rows, in]` times `weight [out, in]` transposed -> `[rows, out]` in `out_dtype` (None: x's dtype).

    Raises ValueError for shapes or dtypes that do not fit, BackendError where a forced backend refuses.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"matmul takes x [rows, in] and weight [out, in], got {x.shape} and {weight.shape}")
    if x.dtype != weight.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x {x.dtype.name} and weight {weight.dtype.name} must share one floating-point dtype")
    result = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    if 0 in (*x.shape, weight.shape[0]):
        return jnp.zeros((x.shape[0], weight.shape[0]), result)
    _, module = OP.choose(
        backend,
        rows=x.shape[0],
        in_size=x.shape[1],
        out_size=weight.shape[0],
        dtype=x.dtype.name,
        out_dtype=result.name,
        platform=jax.default_backend(),
    )
    return module.run(x, weight, out_dtype=result)
