"""Ragged paged attention: write the new K/V, attend to all of it, in one op.

A backend owns its memory: `allocate` returns an opaque LayerKV, and the LayerKV's type says which backend every
later call runs on. Callers see tokens, sequences and page numbers, never a layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Op

OP = Op(
    name="attention",
    backends={
        "llvm_cpu": "pallas_kernels.attention.llvm_cpu",
        "xla": "pallas_kernels.attention.xla",
        "reference": "pallas_kernels.attention.reference",
    },
)


@dataclass(frozen=True)
class KVSpec:
    """What one layer's K/V pages hold: `page_size` tokens of `kv_heads` x `head_dim` values each for K and V."""

    kv_heads: int
    head_dim: int
    page_size: int
    dtype: Any = jnp.bfloat16

    @property
    def token_bytes(self) -> int:
        return 2 * self.kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize


class LayerKV(Protocol):
    """One layer's pages in a backend's own layout; a pytree of arrays, donated and aliased in place."""

    @property
    def spec(self) -> KVSpec: ...

    @property
    def backend(self) -> str: ...


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("q_start", "kv_len", "page_table", "q_position", "kv_position", "ancestors"),
    meta_fields=("width", "num_decode_seqs"),
)
@dataclass(frozen=True)
class Ragged:
    """Which packed query tokens belong to which sequence, and where that sequence's K/V rows lie.

    The first `num_decode_seqs` sequences own `width` query tokens each, at tokens `[s * width, (s + 1) * width)`;
    the others own `[q_start[s], q_start[s + 1])`. Row r of sequence s lies in page `page_table[s, r // page_size]`.
    Query tokens are the last rows of their sequence. A sequence with `kv_len` 0 is unused: its tokens' K/V go to
    the trash page 0 and their output is zero.
    """

    q_start: jax.Array  # i32[seqs + 1]
    kv_len: jax.Array  # i32[seqs]: rows after this call's write
    page_table: jax.Array  # i32[seqs, pages_per_seq]; pages that slid out of the window are 0
    q_position: jax.Array  # i32[tokens]
    kv_position: jax.Array | None = None  # i32[seqs, rows] after eviction; None: row i is position i
    ancestors: jax.Array | None = None  # u32[tokens, words]: bit j of a token = sees its sequence's j-th query token
    width: int = 1
    num_decode_seqs: int = 0


class UnsupportedError(ValueError):
    """A request to a kernel that its backend cannot honour; the message says what would work."""


def allocate(spec: KVSpec, num_pages: int, *, backend: str = "auto") -> LayerKV:
    """Zeroed pages for one layer. Page 0 is the trash page. Raises where a forced backend refuses the spec."""
    _, module = OP.choose(backend, spec=spec)
    return module.allocate(spec, num_pages)


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
    _check(q, k, v, kv, ragged)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return OP.load(kv.backend).attend(q, k, v, kv, ragged, window=window, softcap=softcap, sinks=sinks, scale=scale)


def read_pages(kv: LayerKV, pages: jax.Array) -> jax.Array:
    """`pages: i32[n]` -> the canonical form `[n, page_size, 2, kv_heads, head_dim]` (K at 0, V at 1)."""
    return OP.load(kv.backend).read_pages(kv, pages)


def write_pages(kv: LayerKV, pages: jax.Array, values: jax.Array) -> LayerKV:
    """Write canonical `values [n, page_size, 2, kv_heads, head_dim]` into `pages: i32[n]`."""
    return OP.load(kv.backend).write_pages(kv, pages, values)


def copy_pages(kv: LayerKV, source: jax.Array, target: jax.Array) -> LayerKV:
    """Copy page `source[i]` over page `target[i]` (copy-on-write); all reads come before all writes."""
    return OP.load(kv.backend).copy_pages(kv, source, target)


def move_rows(kv: LayerKV, source: tuple[jax.Array, jax.Array], target: tuple[jax.Array, jax.Array]) -> LayerKV:
    """Move rows given as `(pages i32[n], offsets i32[n])`; all reads come before all writes."""
    return OP.load(kv.backend).move_rows(kv, source, target)


def token_sequence(ragged: Ragged, num_tokens: int) -> jax.Array:
    """i32[tokens]: the sequence each packed token belongs to; the number of sequences for padding."""
    num_seqs, decode_tokens = ragged.kv_len.shape[0], ragged.num_decode_seqs * ragged.width
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    starts = ragged.q_start[ragged.num_decode_seqs :]
    ragged_seq = ragged.num_decode_seqs + jnp.sum(token[:, None] >= starts[None, 1:], axis=1, dtype=jnp.int32)
    ragged_seq = jnp.where(token < ragged.q_start[-1], ragged_seq, num_seqs)
    return jnp.where(token < decode_tokens, token // max(ragged.width, 1), ragged_seq)


def token_rows(ragged: Ragged, num_tokens: int, page_size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For each packed token: its row's page, its offset in that page, and its sequence (padding: page 0)."""
    seq = token_sequence(ragged, num_tokens)
    num_seqs = ragged.kv_len.shape[0]
    inside = jnp.minimum(seq, num_seqs - 1)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    first = jnp.where(seq < ragged.num_decode_seqs, seq * ragged.width, ragged.q_start[inside])
    length = jnp.where(seq < ragged.num_decode_seqs, ragged.width, ragged.q_start[inside + 1] - ragged.q_start[inside])
    row = ragged.kv_len[inside] - length + token - first
    valid = (seq < num_seqs) & (row >= 0) & (ragged.kv_len[inside] > 0)
    column = jnp.clip(row // page_size, 0, ragged.page_table.shape[1] - 1)
    page = jnp.where(valid, ragged.page_table[inside, column], 0)
    return page, jnp.where(valid, row % page_size, 0), jnp.where(valid, seq, num_seqs)


def _check(q: jax.Array, k: jax.Array | None, v: jax.Array | None, kv: LayerKV, ragged: Ragged) -> None:
    spec = kv.spec
    if (k is None) != (v is None):
        raise UnsupportedError("k and v come together or not at all")
    if q.ndim != 3 or q.shape[2] != spec.head_dim or q.shape[1] % spec.kv_heads:
        raise UnsupportedError(
            f"q {q.shape} does not fit pages of {spec.kv_heads} KV heads x {spec.head_dim}: "
            "it must be [tokens, a multiple of kv_heads, head_dim]"
        )
    for name, array in (("k", k), ("v", v)):
        if array is not None and array.shape != (q.shape[0], spec.kv_heads, spec.head_dim):
            raise UnsupportedError(f"{name} {array.shape} must be {(q.shape[0], spec.kv_heads, spec.head_dim)}")
    if ragged.num_decode_seqs * ragged.width > q.shape[0]:
        raise UnsupportedError(
            f"{ragged.num_decode_seqs} decode sequences x width {ragged.width} exceed the {q.shape[0]} packed tokens"
        )
