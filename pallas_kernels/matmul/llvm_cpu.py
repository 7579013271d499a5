"""Native bfloat16 and W8A8 matmul for CPUs: machine code made at run time by llvmlite, called by XLA through its FFI.

Hides compiling, registration (once per process, on first use) and the CPUs it suits. Decoding is bound by reading
weights; this reads them at about the speed of memory, where XLA:CPU reaches a third of that.
"""

from __future__ import annotations

import functools
import threading

import jax
import jax.numpy as jnp

from pallas_kernels.devices import Device
from pallas_kernels.matmul import llvm_operands, llvm_tiles
from pallas_kernels.native import handler, jit
from pallas_kernels.tensors import QuantizedTensor

# Names stand in compiled programs: a new number for every change of the contract.
TARGETS = {"dense": "jaxinfer_matmul_bf16_v1", "w8a8-int8": "jaxinfer_matmul_int8_v1"}  # by format of the weight
OUT_DTYPES = ("bfloat16", "float32")
MOST_INTEGER_INPUTS = 1 << 16  # 255 * 128 times as many still fits 31 bits

_registration = threading.Lock()


def refuse(
    *, rows: int, in_size: int, out_size: int, dtype: str, out_dtype: str, format: str, device: Device
) -> str | None:
    """None, or why this case is not served. Compiles the kernel when nothing else speaks against it."""
    if device.platform != "cpu":
        return f"it is for CPUs, the device is {device}"
    if format not in TARGETS:
        return f"it multiplies {' and '.join(TARGETS)} weights, not {format}"
    if format == "dense" and dtype != "bfloat16":
        return f"it multiplies bfloat16, not {dtype} (in float32, XLA's dot promises a row's bits)"
    if format == "dense" and out_dtype not in OUT_DTYPES:
        return f"out_dtype {out_dtype} is not one of {', '.join(OUT_DTYPES)}"
    if format != "dense" and in_size > MOST_INTEGER_INPUTS:
        return f"{in_size} inputs are more than {MOST_INTEGER_INPUTS}, whose sum 32 bits can hold"
    with _registration:
        reason = _register(format)
    if reason is not None:
        return reason
    isa = _isa(format)
    if isa.most_rows is not None and rows > isa.most_rows:
        return f"{rows} rows are more than {isa.most_rows}: arithmetic is the limit there, and XLA's dot is faster"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    result = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), out_dtype)
    return jax.ffi.ffi_call(TARGETS["dense"], result, vmap_method="sequential")(x, weight)


def _forward(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _multiply(x, weight, out_dtype), (x, weight)


def _backward(
    out_dtype: jnp.dtype, operands: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = operands
    gradient = gradient.astype(x.dtype)
    return gradient @ weight, gradient.T @ x


_multiply.defvjp(_forward, _backward)


def run(
    x: jax.Array,
    weight: jax.Array | QuantizedTensor,
    *,
    row_scales: jax.Array | None = None,
    out_dtype: jnp.dtype,
    device: Device,
) -> jax.Array:
    """`x bf16[rows, in]` (W8A8: int8, `row_scales f32[rows]`), `weight [out, in]` -> `[rows, out]`; after `refuse`.

    Dense products are differentiable in reverse mode; gradients are XLA's dots.
    """
    if not isinstance(weight, QuantizedTensor):
        return _multiply(x, weight, out_dtype)
    assert row_scales is not None and weight.scales is not None
    above = (x.astype(jnp.int16) + 128).astype(jnp.uint8)  # vpdpbusd multiplies unsigned by signed
    result = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.int32)
    product = jax.ffi.ffi_call(TARGETS["w8a8-int8"], result, vmap_method="sequential")(above, weight.values)
    return (product.astype(jnp.float32) * weight.scales.astype(jnp.float32) * row_scales[:, None]).astype(out_dtype)


run_invariant = run  # every output is one walk along its inputs, whatever tile it falls into (llvm_tiles)


@functools.cache
def _register(format: str) -> str | None:
    """Compile for this CPU and tell XLA; returns why that is impossible, or None."""
    reason = jit.unavailable()
    if reason is None and format != "dense" and not _has_vnni():
        reason = f"{format} needs AVX512-VNNI, which this CPU does not have"
    return reason or jit.register(TARGETS[format], ir(_isa(format), TARGETS[format]))


def _has_vnni() -> bool:
    if jit.is_arm():
        return False
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return all(features.get(name) for name in ("avx512f", "avx512bw", "avx512vl", "avx512vnni"))


def _isa(format: str) -> llvm_tiles.Isa:
    return _host_isa() if format == "dense" else llvm_tiles.AVX512_VNNI


def _host_isa() -> llvm_tiles.Isa:
    """The best instruction set of this machine, which must have one."""
    if jit.is_arm():
        return llvm_tiles.NEON
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    if features.get("avx512f") and features.get("avx512bw") and features.get("avx512vl"):
        if not features.get("avx512bf16"):
            return llvm_tiles.AVX512
        return llvm_tiles.AMX_HOST if features.get("amx-bf16") else llvm_tiles.AVX512_BF16
    return llvm_tiles.AVX2


def ir(isa: llvm_tiles.Isa, name: str = TARGETS["dense"]) -> str:
    """The whole kernel as LLVM IR, handler `@name`."""
    operands = llvm_operands.module(chunk_multiple=llvm_tiles.OUTS, value_bytes=isa.value_bytes)
    return handler.module(name) + operands + llvm_tiles.module(isa)
