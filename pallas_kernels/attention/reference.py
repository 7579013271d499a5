"""The oracle: one sequence after the other, dense scores, float32, nothing skipped. Slow and obviously right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tensors
from pallas_kernels.attention import KVSpec, PageRows, Ragged, token_rows
from pallas_kernels.devices import Device


@partial(jax.tree_util.register_dataclass, data_fields=("values", "scales"), meta_fields=("dtype",))
@dataclass(frozen=True)
class ReferenceKV:
    """Pages in the canonical form: `values [pages, page_size, 2, kv_heads, head_dim]` (int4 unpacked) and scales."""

    values: jax.Array
    scales: jax.Array | None  # f32[pages, page_size, 2, kv_heads]
    dtype: str

    @property
    def spec(self) -> KVSpec:
        _, page_size, _, kv_heads, head_dim = self.values.shape
        return KVSpec(kv_heads, head_dim, page_size, jnp.dtype(self.dtype))

    @property
    def backend(self) -> str:
        return "reference"

    def dequantized(self) -> jax.Array:
        """f32[pages, page_size, 2, kv_heads, head_dim]"""
        wide = self.values.astype(jnp.float32)
        return wide if self.scales is None else wide * self.scales[..., None]


def refuse(*, spec: KVSpec, q_heads: int, device: Device) -> str | None:
    """It takes everything."""
    return None


def allocate(spec: KVSpec, num_pages: int) -> ReferenceKV:
    name = jnp.dtype(spec.dtype).name
    shape = (num_pages, spec.page_size, 2, spec.kv_heads, spec.head_dim)
    values = jnp.zeros(shape, jnp.int8 if name == "int4" else spec.dtype)
    return ReferenceKV(values, jnp.zeros(shape[:-1], jnp.float32) if spec.quantized else None, name)


def attend(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    kv: ReferenceKV,
    ragged: Ragged,
    *,
    window: int | None,
    softcap: float | None,
    sinks: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array, ReferenceKV]:
    num_tokens, q_heads, head_dim = q.shape
    spec = kv.spec
    seq = token_rows(ragged, num_tokens, spec.page_size)[2]
    if k is not None and v is not None:
        kv = write(kv, k, v, ragged)
    pages = kv.dequantized()
    column = jnp.arange(ragged.page_table.shape[1])
    lies_here = column % ragged.page_stride == (0 if ragged.page_offset is None else ragged.page_offset)
    out = jnp.zeros(q.shape, jnp.float32)
    lse = jnp.full((num_tokens, q_heads), -jnp.inf)
    for s in range(ragged.kv_len.shape[0]):
        rows = pages[jnp.where(lies_here, ragged.page_table[s], 0)].reshape(-1, 2, spec.kv_heads, head_dim)
        seen = _visible(ragged, s, seq == s, rows.shape[0], window) & jnp.repeat(lies_here, spec.page_size)[None]
        rows = jnp.where(jnp.any(seen, axis=0)[:, None, None, None], rows, 0.0)  # what nobody sees may be NaN
        keys, values = (jnp.repeat(rows[:, i], q_heads // spec.kv_heads, axis=1) for i in (0, 1))
        scores = jnp.einsum("tnh,rnh->tnr", q.astype(jnp.float32), keys) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        scores = jnp.where(seen[:, None, :], scores, -jnp.inf)
        if sinks is not None:
            sink = jnp.broadcast_to(sinks[None, :, None], (num_tokens, q_heads, 1))
            scores = jnp.concatenate([scores, sink], axis=-1)
            values = jnp.concatenate([values, jnp.zeros((1, q_heads, head_dim))])
        total = jax.nn.logsumexp(scores, axis=-1)
        weights = jnp.exp(scores - jnp.where(jnp.isfinite(total), total, 0.0)[..., None])
        mine = (seq == s)[:, None]
        out = jnp.where(mine[..., None], jnp.einsum("tnr,rnh->tnh", weights, values), out)
        lse = jnp.where(mine, total, lse)
    return out.astype(q.dtype), lse, kv


def write(kv: ReferenceKV, k: jax.Array, v: jax.Array, ragged: Ragged) -> ReferenceKV:
    page, offset, _ = token_rows(ragged, k.shape[0], kv.spec.page_size)
    rows = jnp.stack([k, v], axis=1)
    if kv.scales is None:
        return replace(kv, values=kv.values.at[page, offset].set(rows.astype(kv.values.dtype)))
    values, scales = tensors.quantize_rows(rows, kv.dtype)
    return replace(kv, values=kv.values.at[page, offset].set(values), scales=kv.scales.at[page, offset].set(scales))


def _visible(ragged: Ragged, s: int, mine: jax.Array, num_rows: int, window: int | None) -> jax.Array:
    """bool[tokens, rows]: which rows of sequence s each token sees."""
    row = jnp.arange(num_rows)[None, :]
    position = row if ragged.kv_position is None else ragged.kv_position[s][None, :num_rows]
    query = ragged.q_position[:, None]
    seen = (row < ragged.kv_len[s]) & (position <= query) & mine[:, None]
    if ragged.ancestors is not None:
        first = ragged.kv_len[s] - jnp.sum(mine)  # the first row that is one of this call's query tokens
        node = jnp.clip(row - first, 0, 32 * ragged.ancestors.shape[1] - 1)
        bit = (jnp.take_along_axis(ragged.ancestors, node // 32, axis=1) >> (node % 32).astype(jnp.uint32)) & 1
        seen &= jnp.where(row >= first, bit == 1, True)
    if window is not None:
        seen &= position > query - window
    return seen


def read_pages(kv: ReferenceKV, pages: jax.Array) -> PageRows:
    return PageRows(kv.values[pages], None if kv.scales is None else kv.scales[pages])


def write_pages(kv: ReferenceKV, pages: jax.Array, rows: PageRows) -> ReferenceKV:
    return _map(lambda pool, new: pool.at[pages].set(new.astype(pool.dtype)), kv, rows.values, rows.scales)


def copy_pages(kv: ReferenceKV, source: jax.Array, target: jax.Array) -> ReferenceKV:
    return _map(lambda pool: pool.at[target].set(pool[source]), kv)


def move_rows(kv: ReferenceKV, source: Any, target: Any) -> ReferenceKV:
    return _map(lambda pool: pool.at[target].set(pool[source]), kv)


def _map(change: Any, kv: ReferenceKV, values: Any = None, scales: Any = None) -> ReferenceKV:
    """`change(pool)`, or `change(pool, new)`, applied to the values and to the scales where there are any."""
    new = [[] if part is None else [part] for part in (values, scales)]
    return replace(
        kv,
        values=change(kv.values, *new[0]),
        scales=None if kv.scales is None else change(kv.scales, *new[1]),
    )
