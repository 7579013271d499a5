"""Matrix multiplication with the weight as Hugging Face stores it, `[out, in]`: dense, quantized or 2:4 sparse.

Hides which code multiplies, and what is common to every quantized product: outlier columns, zero points, and W8A8's
quantization of activations. Accumulates in float32 (W8A8 in int32). On CPUs a row's bits do not depend on the number of
rows in float32, nor in bfloat16 and W8A8 while one backend serves every number; elsewhere only where `invariant` asks.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import devices, tensors
from pallas_kernels.devices import Device
from pallas_kernels.dispatch import Op
from pallas_kernels.matmul import xla
from pallas_kernels.reductions import row_sums
from pallas_kernels.tensors import QuantizedTensor

_F32 = jnp.dtype(jnp.float32)
OP = Op(
    name="matmul",
    backends={
        "mosaic_tpu": "pallas_kernels.matmul.mosaic_tpu",
        "triton": "pallas_kernels.matmul.triton",
        "llvm_cpu": "pallas_kernels.matmul.llvm_cpu",
        "xla": "pallas_kernels.matmul.xla",
        "reference": "pallas_kernels.matmul.reference",
    },
    platforms={"mosaic_tpu": ("tpu",), "triton": ("cuda", "rocm"), "llvm_cpu": ("cpu",)},
    invariant={"llvm_cpu": ("cpu",), "xla": ("cpu",)},  # these supply run_invariant, with run's signature
)
BACKENDS = OP.backends


def matmul(
    x: jax.Array,
    weight: jax.Array | QuantizedTensor,
    *,
    backend: str = "auto",
    out_dtype: DTypeLike | None = None,
    device: Device | None = None,
    invariant: bool = False,
) -> jax.Array:
    """`x [rows, in]` times `weight [out, in]` transposed -> `[rows, out]` in `out_dtype` (None: x's dtype).

    `device` None is the one compiled for. `invariant`: a row's bits depend on that row alone, in any dtype. Raises
    ValueError for shapes or dtypes that do not fit, BackendError where a forced backend refuses.
    Sources: W8A8 SmoothQuant (2211.10438, section 3), outliers LLM.int8() (2208.07339, 3.2).
    """
    _check(x, weight)
    result = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    device = device or devices.current()
    if 0 in (*x.shape, weight.shape[0]):
        return jnp.zeros((x.shape[0], weight.shape[0]), result)
    if not isinstance(weight, QuantizedTensor) or (weight.zeros is None and weight.outlier_columns is None):
        return _multiply(x, weight, backend, result, device, invariant)
    x, beside = _beside(x, weight, device)
    return (_multiply(x, weight.core(), backend, _F32, device, invariant) + beside).astype(result)


def matmul_rows(
    rows: jax.Array,
    row_scales: jax.Array | None,
    weight: QuantizedTensor,
    *,
    dtype: DTypeLike,
    out_dtype: DTypeLike,
    backend: str = "auto",
    device: Device | None = None,
) -> jax.Array:
    """W8A8's product of rows that `quantize_rows` made of an x of `dtype`, for inputs that lie on several devices.

    `rows [rows, in]`, `row_scales f32[rows]`, `weight [out, in]` -> `[rows, out]`. `row_scales` None: the product of
    the values alone, without the weight's scales either. Of int8 those are sums of integers, which float32 holds
    exactly up to 2**24: devices may add theirs up, and what is scaled then has the bits of one device's product.
    """
    assert weight.activation is not None and weight.outlier_columns is None and weight.scales is not None
    if row_scales is None:
        weight = replace(weight, scales=jnp.ones_like(weight.scales))
        row_scales = jnp.ones(rows.shape[0], _F32)
    names = jnp.dtype(dtype), jnp.dtype(out_dtype)
    return _run(rows, weight, backend, *names, device or devices.current(), row_scales=row_scales)


def _multiply(
    x: jax.Array,
    weight: jax.Array | QuantizedTensor,
    backend: str,
    out_dtype: jnp.dtype,
    device: Device,
    invariant: bool,
) -> jax.Array:
    """What a backend's `run` serves: any weight without zero points and outliers.

    With activation quantization it gets `x` as int8 or fp8, and `row_scales f32[rows]` to multiply the product by.
    """
    dtype, row_scales = x.dtype, None
    if isinstance(weight, QuantizedTensor) and weight.activation is not None:
        x, row_scales = tensors.quantize_rows(x, weight.activation)
    return _run(x, weight, backend, dtype, out_dtype, device, row_scales=row_scales, invariant=invariant)


def _run(
    x: jax.Array,
    weight: jax.Array | QuantizedTensor,
    backend: str,
    dtype: jnp.dtype,
    out_dtype: jnp.dtype,
    device: Device,
    *,
    row_scales: jax.Array | None,
    invariant: bool = False,
) -> jax.Array:
    """By the backend that takes it. `dtype`: of x before it was quantized."""
    promise = {"invariant": True} if invariant else {}
    _, module = OP.choose(
        backend,
        rows=1 if invariant else x.shape[0],  # one backend for every number of rows
        **promise,
        in_size=x.shape[1],
        out_size=weight.shape[0],
        dtype=dtype.name,
        out_dtype=out_dtype.name,
        format=weight.format if isinstance(weight, QuantizedTensor) else "dense",
        device=device,
    )
    run = module.run_invariant if invariant else module.run
    return run(x, weight, row_scales=row_scales, out_dtype=out_dtype, device=device)


def _beside(x: jax.Array, weight: QuantizedTensor, device: Device) -> tuple[jax.Array, jax.Array]:
    """x without outlier inputs, and what to add to its product with `weight.core()`: thin float32 products."""
    added = jnp.zeros((x.shape[0], weight.shape[0]), jnp.float32)
    if weight.outlier_columns is not None and weight.outlier_values is not None:
        outliers = x[:, weight.outlier_columns].astype(jnp.float32)
        added += xla.run(outliers, weight.outlier_values.astype(jnp.float32), out_dtype=_F32, device=device)
        x = x.at[:, weight.outlier_columns].set(0)
    if weight.zeros is not None and weight.scales is not None:  # x @ ((q - z) * s) = x @ (q * s) - sums of x @ (z * s)
        sums = row_sums(x.astype(jnp.float32).reshape(x.shape[0], weight.num_groups, weight.group_size))
        offsets = weight.zeros.astype(jnp.float32) * weight.scales.astype(jnp.float32)
        added -= xla.run(sums, offsets.T, out_dtype=_F32, device=device)
    return x, added


def _check(x: jax.Array, weight: jax.Array | QuantizedTensor) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"matmul takes x [rows, in] and weight [out, in], got {x.shape} and {weight.shape}")
    if isinstance(weight, QuantizedTensor):
        weight.check()
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x {x.dtype.name} is not floating-point; activations are quantized here, not before")
        if weight.scales is None and x.dtype.name != weight.dtype:
            raise ValueError(f"x {x.dtype.name} and sparse values {weight.dtype} must share one dtype")
    elif x.dtype != weight.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x {x.dtype.name} and weight {weight.dtype.name} must share one floating-point dtype")
