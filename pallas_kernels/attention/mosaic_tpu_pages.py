"""Pages as the TPU kernel reads them: tokens along lanes, `[pages, kv_heads, 2 * rows, page_size]` with K above V.

The minor dimension is a multiple of 128 (any other and XLA copies the pool around every kernel call), no head_dim is
padded, a page is one contiguous copy, and K enters the matrix unit as it lies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tensors
from pallas_kernels.attention import KVSpec, PageRows, storage


@partial(jax.tree_util.register_dataclass, data_fields=("values", "scales"), meta_fields=("head_dim", "dtype"))
@dataclass(frozen=True)
class MosaicKV:
    """Pages, tokens along lanes. Quantized values are bytes: int8, the bits of e4m3, or two int4."""

    values: jax.Array  # [pages, kv_heads, 2 * rows, page_size]; rows = head_dim, for int4 half of it
    scales: jax.Array | None  # f32[pages, kv_heads, 2, page_size]
    head_dim: int
    dtype: str

    @property
    def spec(self) -> KVSpec:
        _, kv_heads, _, page_size = self.values.shape
        return KVSpec(kv_heads, self.head_dim, page_size, jnp.dtype(self.dtype))

    @property
    def backend(self) -> str:
        return "mosaic_tpu"


def allocate(spec: KVSpec, num_pages: int) -> MosaicKV:
    name = jnp.dtype(spec.dtype).name
    rows = spec.head_dim * storage.bits(spec.dtype) // 8 if spec.quantized else spec.head_dim
    values = jnp.zeros((num_pages, spec.kv_heads, 2 * rows, spec.page_size), jnp.int8 if spec.quantized else spec.dtype)
    scales = jnp.zeros((num_pages, spec.kv_heads, 2, spec.page_size), jnp.float32) if spec.quantized else None
    return MosaicKV(values, scales, spec.head_dim, name)


def stored(spec: KVSpec, rows: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """`rows [..., head_dim]` as pages hold them, `[..., rows]`, and their scales `[...]`."""
    if not spec.quantized:
        return rows.astype(spec.dtype), None
    values, scales = tensors.quantize_rows(rows, spec.dtype)
    return _packed(values, jnp.dtype(spec.dtype).name), scales


def _packed(values: jax.Array, dtype: str) -> jax.Array:
    """Bytes of 8-bit values; of int4 (as int8), neighbours share one: the order in which a kernel sees them as int4."""
    if dtype == "int4":
        values = storage.pack_int4(jnp.concatenate([values[..., 0::2], values[..., 1::2]], axis=-1))
    return values if values.dtype.itemsize > 1 else lax.bitcast_convert_type(values, jnp.int8)


def _unpacked(stored: jax.Array, dtype: str) -> jax.Array:
    """The inverse of `_packed`."""
    if dtype == "int4":
        even, odd = jnp.split(storage.unpack_int4(stored), 2, axis=-1)
        return jnp.stack([even, odd], axis=-1).reshape(*stored.shape[:-1], -1)
    return stored if stored.dtype.itemsize > 1 else lax.bitcast_convert_type(stored, jnp.dtype(dtype))


def read_pages(kv: MosaicKV, pages: jax.Array) -> PageRows:
    spec = kv.spec
    values = kv.values[pages].reshape(len(pages), spec.kv_heads, 2, -1, spec.page_size).transpose(0, 4, 2, 1, 3)
    return PageRows(_unpacked(values, kv.dtype), None if kv.scales is None else kv.scales[pages].transpose(0, 3, 2, 1))


def write_pages(kv: MosaicKV, pages: jax.Array, rows: PageRows) -> MosaicKV:
    values = _packed(rows.values, kv.dtype).transpose(0, 3, 2, 4, 1)  # [n, kv_heads, 2, rows, page_size]
    values = values.reshape(len(pages), *kv.values.shape[1:])
    scales = None if rows.scales is None else rows.scales.transpose(0, 3, 2, 1)
    return _map(lambda pool, new: pool.at[pages].set(new.astype(pool.dtype)), kv, values, scales)


def copy_pages(kv: MosaicKV, source: jax.Array, target: jax.Array) -> MosaicKV:
    """Page by page: around a scatter of 8-bit pages XLA changes the layout of the whole pool and back."""

    def copy(pool: jax.Array) -> jax.Array:
        pages = lax.map(lambda page: lax.dynamic_index_in_dim(pool, page, keepdims=False), source)
        put = lambda i, into: lax.dynamic_update_index_in_dim(into, pages[i], target[i], axis=0)
        return lax.fori_loop(0, len(source), put, pool)

    return _map(copy, kv)


def move_rows(kv: MosaicKV, source: tuple[jax.Array, jax.Array], target: tuple[jax.Array, jax.Array]) -> MosaicKV:
    """By whole pages, one row after the other: an update along lanes alone has XLA transpose the pool and back."""

    def move(pool: jax.Array) -> jax.Array:
        lane = jnp.arange(pool.shape[-1])
        lowest = jnp.iinfo(pool.dtype).min if pool.dtype == jnp.int8 else -jnp.inf  # below all: a maximum picks a lane
        page_of = lambda pages, page: lax.dynamic_index_in_dim(pages, page, keepdims=False)
        read = lambda at: jnp.max(jnp.where(lane == at[1], page_of(pool, at[0]), lowest), axis=-1)
        rows = lax.map(read, source)  # [n, kv_heads, 2 * rows]

        def put(i: Any, into: jax.Array) -> jax.Array:
            page = jnp.where(lane == target[1][i], rows[i][..., None], page_of(into, target[0][i]))
            return lax.dynamic_update_index_in_dim(into, page, target[0][i], axis=0)

        return lax.fori_loop(0, len(rows), put, pool)

    return _map(move, kv)


def _map(change: Callable[..., jax.Array], kv: MosaicKV, *new: Any) -> MosaicKV:
    """`change(pool)`, or `change(pool, new)` with new = (values, scales), for the values and for the scales, if any."""
    values = change(kv.values, *new[:1])
    return replace(kv, values=values, scales=None if kv.scales is None else change(kv.scales, *new[1:]))
