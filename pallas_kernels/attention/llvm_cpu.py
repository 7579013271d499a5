"""Native paged attention for CPUs: machine code made at run time by llvmlite reads K/V where it lies.

Its pages are those of the `xla` backend, and what it cannot do (tree drafts, rows with gaps, soft cap) runs there on
the same pages. XLA gathers pages before it multiplies, which costs several times the reading.
"""

from __future__ import annotations

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import KVSpec, Ragged, llvm_rows, strided, with_sinks, xla
from pallas_kernels.attention.xla import XlaKV, copy_pages, move_rows, read_pages, write, write_pages
from pallas_kernels.devices import Device
from pallas_kernels.native import handler, jit

__all__ = ["allocate", "attend", "copy_pages", "move_rows", "read_pages", "refuse", "write", "write_pages"]

TARGET_NAME = "jaxinfer_attention_v2"  # stands in compiled programs: a new number for every change of the contract
DTYPES = ("bfloat16", "float32")
TILE_ROWS = 64  # query rows (tokens times group) of a prefill tile: their state stays in L2 while pages stream past

_registration = threading.Lock()


def refuse(*, spec: KVSpec, q_heads: int, device: Device) -> str | None:
    """None, or why these pages cannot be served. Compiles the kernel when nothing else speaks against it."""
    dtype = jnp.dtype(spec.dtype).name
    if device.platform != "cpu":
        return f"it is for CPUs, the device is {device}"
    if dtype not in DTYPES:
        return f"K/V dtype {dtype} is not one of {', '.join(DTYPES)}"
    if spec.head_dim % llvm_rows.LANES:
        return f"head_dim {spec.head_dim} must be a multiple of {llvm_rows.LANES}"
    if spec.page_size % llvm_rows.KEYS:
        return f"page_size {spec.page_size} must be a multiple of {llvm_rows.KEYS}"
    with _registration:
        return xla.refuse(spec=spec, q_heads=q_heads, device=device) or _register()


@functools.cache
def _register() -> str | None:
    """Compile for this CPU and tell XLA; returns why that is impossible, or None."""
    return jit.unavailable() or jit.register(TARGET_NAME, handler.module(TARGET_NAME) + llvm_rows.module())


def allocate(spec: KVSpec, num_pages: int, *, invariant: bool = False) -> XlaKV:
    return xla.allocate(spec, num_pages, backend="llvm_cpu", invariant=invariant)


def attend(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    kv: XlaKV,
    ragged: Ragged,
    *,
    window: int | None,
    softcap: float | None,
    sinks: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array, XlaKV]:
    plain = softcap is None and ragged.ancestors is None and ragged.kv_position is None
    if not plain or q.dtype.name not in DTYPES:
        return xla.attend(q, k, v, kv, ragged, window=window, softcap=softcap, sinks=sinks, scale=scale)
    if k is not None and v is not None:
        kv = write(kv, k, v, ragged)
    ragged, window, first = strided.view(ragged, kv.spec.page_size, window)
    group = q.shape[1] // kv.spec.kv_heads
    settings = np.array([ragged.num_decode_seqs, ragged.width, window or 0, max(1, TILE_ROWS // group), 0], np.int32)
    settings[4:].view(np.float32)[0] = scale
    sums = jax.ShapeDtypeStruct(q.shape[:2], jnp.float32)
    out_dtype = q.dtype if sinks is None else jnp.float32
    call = jax.ffi.ffi_call(TARGET_NAME, (jax.ShapeDtypeStruct(q.shape, out_dtype), sums, sums))
    none = np.zeros(q.shape[0], np.int32)  # a constant of the program
    rows = (
        *(ragged.page_table, ragged.q_start, ragged.kv_len, ragged.q_position),
        none if first is None else first,
    )
    out, highest, total = call(q, kv.keys, kv.values, *(x.astype(jnp.int32) for x in rows), settings)
    used = total != 0
    lse = jnp.where(used, highest + jnp.log(jnp.where(used, total, 1.0)), -jnp.inf)
    out, lse = with_sinks(out, lse, sinks)
    return out.astype(q.dtype), lse, kv
