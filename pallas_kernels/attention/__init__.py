"""Ragged paged attention: write the new K/V, attend to all of it, in one op.

A backend owns its memory: `allocate` returns an opaque LayerKV, and the LayerKV's type says which backend every
later call runs on. Callers see tokens, sequences and page numbers, never a layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.attention import storage
from pallas_kernels.attention.contract import (
    UnsupportedError,
    check_heads,
    check_new_rows,
    check_options,
    check_ragged,
    check_rows,
    check_spread,
)
from pallas_kernels.devices import Device
from pallas_kernels.dispatch import Op

__all__ = [
    "OP",
    "KVSpec",
    "LayerKV",
    "PageRows",
    "Ragged",
    "UnsupportedError",
    "allocate",
    "attend",
    "choose",
    "copy_pages",
    "default_page_size",
    "merge",
    "move_rows",
    "read_pages",
    "token_rows",
    "token_sequence",
    "with_sinks",
    "write",
    "write_pages",
]

OP = Op(
    name="attention",
    backends={
        "mosaic_tpu": "pallas_kernels.attention.mosaic_tpu",
        "mosaic_gpu": "pallas_kernels.attention.mosaic_gpu",
        "triton": "pallas_kernels.attention.triton",
        "llvm_cpu": "pallas_kernels.attention.llvm_cpu",
        "xla": "pallas_kernels.attention.xla",
        "reference": "pallas_kernels.attention.reference",
    },
    platforms={
        "mosaic_tpu": ("tpu",),
        "mosaic_gpu": ("cuda",),
        "triton": ("cuda", "rocm"),
        "llvm_cpu": ("cpu",),
    },
    invariant={"llvm_cpu": ("cpu",), "xla": ("cpu",)},  # their allocate takes `invariant`
)


@dataclass(frozen=True)
class KVSpec:
    """What one layer's K/V pages hold: `page_size` tokens of `kv_heads` x `head_dim` values each for K and V.

    `dtype`: bfloat16, float32, float16; or int8, float8_e4m3fn, int4 with f32 scales per token and KV head, of K and V.
    """

    kv_heads: int
    head_dim: int
    page_size: int
    dtype: Any = jnp.bfloat16

    @property
    def quantized(self) -> bool:
        return storage.is_quantized(self.dtype)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V, scales included."""
        return 2 * self.kv_heads * (self.head_dim * storage.bits(self.dtype) // 8 + (4 if self.quantized else 0))


@partial(jax.tree_util.register_dataclass, data_fields=("values", "scales"), meta_fields=())
@dataclass(frozen=True)
class PageRows:
    """Pages in the canonical form, K at 0 and V at 1 of axis 2; int4 values come as int8 between -7 and 7."""

    values: jax.Array  # [n, page_size, 2, kv_heads, head_dim]
    scales: jax.Array | None = None  # f32[n, page_size, 2, kv_heads], where the pages are quantized


class LayerKV(Protocol):
    """One layer's pages in a backend's own layout; a pytree of arrays, donated and aliased in place."""

    @property
    def spec(self) -> KVSpec: ...

    @property
    def backend(self) -> str: ...


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("q_start", "kv_len", "page_table", "q_position", "kv_position", "ancestors", "page_offset"),
    meta_fields=("width", "num_decode_seqs", "page_stride"),
)
@dataclass(frozen=True)
class Ragged:
    """Which packed query tokens belong to which sequence, and where that sequence's K/V rows lie.

    The first `num_decode_seqs` sequences own `width` query tokens each, at tokens `[s * width, (s + 1) * width)`;
    the others own `[q_start[s], q_start[s + 1])`. Row r of sequence s lies in page `page_table[s, r // page_size]`.
    Tokens that bring K/V, or have `ancestors`, are the last rows of their sequence; other queries may be any, since
    `q_position` alone says what they see. A sequence with `kv_len` 0 is unused: its tokens' K/V go to the trash page
    0 and their output is zero.

    `page_stride` > 1: a sequence's pages are spread over so many devices, and this one has those in the columns g of
    `page_table` with `g % page_stride == page_offset`; the numbers in other columns are pages of other devices. All
    the rest is said of whole sequences. Only rows that lie here are written and seen, so results are partial:
    `merge` joins those of all offsets, and `with_sinks` comes after it.
    """

    q_start: jax.Array  # i32[seqs + 1]
    kv_len: jax.Array  # i32[seqs]: rows after this call's write
    page_table: jax.Array  # i32[seqs, pages_per_seq]; pages that slid out of the window are 0
    q_position: jax.Array  # i32[tokens]
    kv_position: jax.Array | None = None  # i32[seqs, rows] after eviction; None: row i is position i
    ancestors: jax.Array | None = None  # u32[tokens, words]: bit j of a token = sees its sequence's j-th query token
    page_offset: jax.Array | None = None  # i32[], from 0 to page_stride - 1; None: 0
    width: int = 1
    num_decode_seqs: int = 0
    page_stride: int = 1


def default_page_size(device: Device) -> int:
    """Tokens per page that the kernels for a device like best."""
    return {"tpu": 128, "cuda": 64, "rocm": 64}.get(device.platform, 32)


def choose(
    spec: KVSpec,
    *,
    backend: str = "auto",
    q_heads: int | None = None,
    device: Device | None = None,
    invariant: bool = False,
) -> tuple[str, Any]:
    """`(name, module)` of the backend that holds such pages; BackendError where a forced one, or every one, refuses.

    `q_heads`: query heads that will read them (None: as many as KV heads); `device`: None is the one compiled for.
    `invariant`: one whose results for a query depend on that query and the rows it sees alone, in any dtype.
    """
    promise = {"invariant": True} if invariant else {}
    q_heads, device = q_heads or spec.kv_heads, device or devices.current()
    return OP.choose(backend, spec=spec, q_heads=q_heads, device=device, **promise)


def allocate(
    spec: KVSpec,
    num_pages: int,
    *,
    backend: str = "auto",
    q_heads: int | None = None,
    device: Device | None = None,
    invariant: bool = False,
) -> LayerKV:
    """Zeroed pages for one layer, on the backend of `choose`, and read as asked there. Page 0 is the trash page."""
    _, module = choose(spec, backend=backend, q_heads=q_heads, device=device, invariant=invariant)
    return module.allocate(spec, num_pages, invariant=True) if invariant else module.allocate(spec, num_pages)


def attend(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    kv: LayerKV,
    ragged: Ragged,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array, LayerKV]:
    """Write `k, v [tokens, kv_heads, head_dim]` into pages and attend with `q [tokens, q_heads, head_dim]`.

    Returns `(out [tokens, q_heads, head_dim], lse f32[tokens, q_heads], kv)`; `lse` is the log of the sum of
    exponentials, so that partial results over disjoint rows merge exactly. `k = v = None`: another layer wrote them.
    `window`: a query at position p sees rows at positions above `p - window`. `softcap`: `cap * tanh(s / cap)`.
    `sinks f32[q_heads]`: a logit per head that takes probability but has no value. `scale`: 1/sqrt(head_dim) if None.
    Sources: online softmax (Milakov & Gimelshein 2018), FlashAttention-2 (Dao 2023), PagedAttention (Kwon et al.
    2023), Ragged Paged Attention (2604.15464).
    """
    check_heads(q, k, v, sinks, kv.spec)
    check_ragged(ragged, q.shape[0], kv.spec.page_size)
    check_options(window, softcap, scale)
    check_spread(ragged, sinks)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if q.shape[0] == 0:
        return q, jnp.zeros(q.shape[:2], jnp.float32), kv
    return OP.load(kv.backend).attend(q, k, v, kv, ragged, window=window, softcap=softcap, sinks=sinks, scale=scale)


def write(kv: LayerKV, k: jax.Array, v: jax.Array, ragged: Ragged) -> LayerKV:
    """Write `k, v [tokens, kv_heads, head_dim]` into pages as `attend` does; the tokens are their sequences' last rows.

    Then `attend` with `k = v = None` serves any part of the tokens as queries, once or part by part.
    """
    check_new_rows(k, v, kv.spec)
    check_ragged(ragged, k.shape[0], kv.spec.page_size)
    check_spread(ragged, None)
    return OP.load(kv.backend).write(kv, k, v, ragged) if k.shape[0] else kv


def read_pages(kv: LayerKV, pages: jax.Array) -> PageRows:
    """What lies in `pages: i32[n]`, in the canonical form; exactly, scales included."""
    return OP.load(kv.backend).read_pages(kv, pages)


def write_pages(kv: LayerKV, pages: jax.Array, rows: PageRows) -> LayerKV:
    """Write what `read_pages` gave, for pages of the same KVSpec on any backend, into `pages: i32[n]`."""
    check_rows(rows, len(pages), kv.spec)
    return OP.load(kv.backend).write_pages(kv, pages, rows)


def copy_pages(kv: LayerKV, source: jax.Array, target: jax.Array) -> LayerKV:
    """Copy page `source[i]` over page `target[i]` (copy-on-write); all reads come before all writes."""
    return OP.load(kv.backend).copy_pages(kv, source, target)


def move_rows(kv: LayerKV, source: tuple[jax.Array, jax.Array], target: tuple[jax.Array, jax.Array]) -> LayerKV:
    """Move rows given as `(pages i32[n], offsets i32[n])`; all reads come before all writes."""
    return OP.load(kv.backend).move_rows(kv, source, target)


def merge(parts: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """One `(out [..., head_dim], lse f32[...])` from those over disjoint sets of rows, exactly (log-sum-exp).

    A part that saw no row has lse -inf and adds nothing, if its `out` is finite.
    """
    highest = jnp.maximum(jnp.max(jnp.stack([lse for _, lse in parts]), axis=0), jnp.finfo(jnp.float32).min)
    weights = [jnp.exp(lse - highest) for _, lse in parts]
    total = sum(weights[1:], start=weights[0])
    used = total != 0  # NaN is of use: it must be seen
    shares = [weight / jnp.where(used, total, 1.0) for weight in weights]
    terms = [out.astype(jnp.float32) * share[..., None] for (out, _), share in zip(parts, shares, strict=True)]
    out = sum(terms[1:], start=terms[0])
    return out.astype(parts[0][0].dtype), jnp.where(used, highest + jnp.log(jnp.where(used, total, 1.0)), -jnp.inf)


def with_sinks(out: jax.Array, lse: jax.Array, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """What attention with `sinks f32[q_heads]` gives, from its `(out [tokens, q_heads, head_dim], lse)` without."""
    if sinks is None:
        return out, lse
    used = lse != -jnp.inf  # a token that sees nothing does not see sinks either
    total = jnp.where(used, jnp.logaddexp(lse, sinks[None, :]), -jnp.inf)
    return jnp.where(used[..., None], out * jnp.exp(lse - total)[..., None], 0.0).astype(out.dtype), total


def token_sequence(ragged: Ragged, num_tokens: int) -> jax.Array:
    """i32[tokens]: the sequence each packed token belongs to; the number of sequences for padding."""
    num_seqs, decode_tokens = ragged.kv_len.shape[0], ragged.num_decode_seqs * ragged.width
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    starts = ragged.q_start[ragged.num_decode_seqs :]
    ragged_seq = ragged.num_decode_seqs + jnp.sum(token[:, None] >= starts[None, 1:], axis=1, dtype=jnp.int32)
    ragged_seq = jnp.where(token < ragged.q_start[-1], ragged_seq, num_seqs)
    return jnp.where(token < decode_tokens, token // max(ragged.width, 1), ragged_seq)


def token_rows(ragged: Ragged, num_tokens: int, page_size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For each packed token: its row's page, its offset in that page, and its sequence (padding: page 0).

    A row that lies on another device has page 0 too.
    """
    seq = token_sequence(ragged, num_tokens)
    num_seqs = ragged.kv_len.shape[0]
    inside = jnp.minimum(seq, num_seqs - 1)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    first = jnp.where(seq < ragged.num_decode_seqs, seq * ragged.width, ragged.q_start[inside])
    length = jnp.where(seq < ragged.num_decode_seqs, ragged.width, ragged.q_start[inside + 1] - ragged.q_start[inside])
    row = ragged.kv_len[inside] - length + token - first
    valid = (seq < num_seqs) & (row >= 0) & (ragged.kv_len[inside] > 0)
    column = jnp.clip(row // page_size, 0, ragged.page_table.shape[1] - 1)
    here = valid
    if ragged.page_stride > 1:
        here &= column % ragged.page_stride == (0 if ragged.page_offset is None else ragged.page_offset)
    page = jnp.where(here, ragged.page_table[inside, column], 0)
    return page, jnp.where(here, row % page_size, 0), jnp.where(valid, seq, num_seqs)
