"""Native bfloat16 matmul for CPUs: machine code made at run time by llvmlite, called by XLA through its FFI.

Hides compiling, registration (once per process, on first use) and the CPUs it suits. Decoding is bound by reading
weights; this reads them at about the speed of memory, where XLA:CPU reaches a third of that.
"""

from __future__ import annotations

import functools
import threading

import jax
import jax.numpy as jnp

from pallas_kernels.matmul import llvm_operands, llvm_tiles
from pallas_kernels.native import handler, jit

TARGET_NAME = "jaxinfer_matmul_bf16_v1"  # stands in compiled programs: a new number for every change of the contract
OUT_DTYPES = ("bfloat16", "float32")

_registration = threading.Lock()


def refuse(*, rows: int, in_size: int, out_size: int, dtype: str, out_dtype: str, platform: str) -> str | None:
    """None, or why this case is not served. Compiles the kernel when nothing else speaks against it."""
    if platform != "cpu":
        return f"it is for CPUs, the platform is {platform}"
    if dtype != "bfloat16":
        return f"it multiplies bfloat16, not {dtype} (in float32, XLA's dot promises a row's bits)"
    if out_dtype not in OUT_DTYPES:
        return f"out_dtype {out_dtype} is not one of {', '.join(OUT_DTYPES)}"
    with _registration:
        reason = _register()
    if reason is not None:
        return reason
    isa = _host_isa()
    if isa.most_rows is not None and rows > isa.most_rows:
        return f"{rows} rows are more than {isa.most_rows}: arithmetic is the limit there, and XLA's dot is faster"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    result = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), out_dtype)
    return jax.ffi.ffi_call(TARGET_NAME, result, vmap_method="sequential")(x, weight)


def _forward(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _multiply(x, weight, out_dtype), (x, weight)


def _backward(
    out_dtype: jnp.dtype, operands: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = operands
    gradient = gradient.astype(x.dtype)
    return gradient @ weight, gradient.T @ x


_multiply.defvjp(_forward, _backward)


def run(x: jax.Array, weight: jax.Array, *, out_dtype: jnp.dtype) -> jax.Array:
    """`x bf16[rows, in]`, `weight bf16[out, in]` -> `[rows, out]`; after `refuse` has returned None.

    Differentiable in reverse mode; gradients are XLA's dots.
    """
    return _multiply(x, weight, out_dtype)


@functools.cache
def _register() -> str | None:
    """Compile for this CPU and tell XLA; returns why that is impossible, or None."""
    return jit.unavailable() or jit.register(TARGET_NAME, ir(_host_isa()))


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


def ir(isa: llvm_tiles.Isa) -> str:
    """The whole kernel as LLVM IR."""
    return handler.module(TARGET_NAME) + llvm_operands.module(chunk_multiple=llvm_tiles.OUTS) + llvm_tiles.module(isa)
