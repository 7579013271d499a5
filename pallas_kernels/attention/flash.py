"""Dense attention without pages, by the same kernels: K/V are laid out as the pages of a pool of their own.

The copy reads K/V once, little beside attention over a prompt; in exchange one kernel family is to be proven and tuned.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import attention, devices
from pallas_kernels.attention import KVSpec, PageRows, Ragged
from pallas_kernels.devices import Device

PAGE_SIZE = 128  # tokens: every backend takes such pages


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    lengths: jax.Array | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
    backend: str = "auto",
    device: Device | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`q [batch, q_tokens, q_heads, head_dim]`, `k, v [batch, kv_tokens, kv_heads, head_dim]` -> `(out, lse)` as q.

    `lengths i32[batch]`: rows of k and v in use (None: all), at least q_tokens; queries are the last of them. `lse
    f32[batch, q_tokens, q_heads]`; the rest as in `attend`. Raises ValueError for shapes that do not fit, BackendError
    where a backend refuses. Source: FlashAttention-2 (Dao 2023).
    """
    _check(q, k, v, lengths, causal, window)
    batch, q_tokens, q_heads, head_dim = q.shape
    kv_tokens, kv_heads = k.shape[1:3]
    if 0 in (batch, q_tokens):
        return jnp.zeros_like(q), jnp.zeros(q.shape[:3], jnp.float32)
    columns = -(-kv_tokens // PAGE_SIZE)
    spec = KVSpec(kv_heads, head_dim, PAGE_SIZE, k.dtype)
    kv = attention.allocate(
        spec, 1 + batch * columns, backend=backend, q_heads=q_heads, device=device or devices.current()
    )
    pages = 1 + jnp.arange(batch * columns, dtype=jnp.int32)
    kv = attention.write_pages(kv, pages, PageRows(_canonical(k, v, columns)))
    used = jnp.full(batch, kv_tokens, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
    first = used - q_tokens
    position = first[:, None] + jnp.arange(q_tokens, dtype=jnp.int32) if causal else (used - 1)[:, None]
    ragged = Ragged(
        q_start=jnp.arange(batch + 1, dtype=jnp.int32) * q_tokens,
        kv_len=used,
        page_table=pages.reshape(batch, columns),
        q_position=jnp.broadcast_to(position, (batch, q_tokens)).reshape(-1),
    )
    flat = q.reshape(batch * q_tokens, q_heads, head_dim)
    out, lse, _ = attention.attend(
        flat, None, None, kv, ragged, window=window, softcap=softcap, sinks=sinks, scale=scale
    )
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def _canonical(k: jax.Array, v: jax.Array, columns: int) -> jax.Array:
    """`[batch * columns, PAGE_SIZE, 2, kv_heads, head_dim]`"""
    batch, kv_tokens, kv_heads, head_dim = k.shape
    rows = jnp.pad(jnp.stack([k, v], axis=2), [(0, 0), (0, columns * PAGE_SIZE - kv_tokens), (0, 0), (0, 0), (0, 0)])
    return rows.reshape(batch * columns, PAGE_SIZE, 2, kv_heads, head_dim)


def _check(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None, causal: bool, window: int | None
) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or k.dtype != v.dtype:
        raise ValueError(
            "flash_attention takes q [batch, q_tokens, q_heads, head_dim] and k, v "
            f"[batch, kv_tokens, kv_heads, head_dim] of one dtype, got {q.shape}, {k.shape}, {v.shape}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % max(1, k.shape[2]):
        raise ValueError(
            f"q {q.shape} does not fit k {k.shape}: same batch, same head_dim, q_heads a multiple of kv_heads"
        )
    if causal and q.shape[1] > k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} causal queries are more than the {k.shape[1]} rows of k: they are the last of them"
        )
    if not all(jnp.issubdtype(array.dtype, jnp.floating) for array in (q, k)):
        raise ValueError(f"q {q.dtype.name} and k {k.dtype.name} must be floating-point")
    if lengths is not None and (lengths.shape != q.shape[:1] or not jnp.issubdtype(lengths.dtype, jnp.integer)):
        raise ValueError(f"lengths {lengths.dtype.name}{lengths.shape} must be integers, one for each of {q.shape[0]}")
    if window is not None and not causal:
        raise ValueError(f"window={window} needs causal=True: without positions there is nothing to slide over")
