"""Portable attention in plain XLA; the CPU's.

Layout: `[pages, kv_heads, page_size, head_dim]`. Seen as rows of one KV head of one page, that gathers by a page
table at memcpy speed into `[..., kv_heads, rows, head_dim]`, which a batched dot reads contiguously.
Rows are taken BLOCK at a time, aligned to the sequence's own rows, and merged by online softmax. So a query's
result has the same bits whether it is decoded or prefilled, in whatever batch, bucket or chunk (float32).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tensors
from pallas_kernels.attention import KVSpec, PageRows, Ragged, storage, strided, token_rows
from pallas_kernels.devices import Device
from pallas_kernels.reductions import LANES, row_sums

BLOCK = 128  # K/V rows per online-softmax step
Q_BLOCK = 64  # query tokens per prefill tile
INVARIANT_TOKENS = 16  # per tile, decoded or prefilled, where a query's bits must not depend on their number
MASKED = -1e30  # finite, so that a fully masked block changes nothing: exp(MASKED - MASKED) is 1, not NaN


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("keys", "values", "key_scales", "value_scales"),
    meta_fields=("backend", "invariant"),
)
@dataclass(frozen=True)
class XlaKV:
    """K and V pages, each `[pages, kv_heads, page_size, head_dim]`; int4 is packed into uint8 of half that width.

    Other backends use them too and put their name on them.
    """

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None = None  # f32[pages, kv_heads, page_size]
    value_scales: jax.Array | None = None
    backend: str = "xla"
    invariant: bool = False  # a query's bits must not depend on its neighbours, in bfloat16 either

    @property
    def spec(self) -> KVSpec:
        _, kv_heads, page_size, width = self.keys.shape
        if self.keys.dtype == jnp.uint8:
            return KVSpec(kv_heads, 2 * width, page_size, jnp.dtype("int4"))
        return KVSpec(kv_heads, width, page_size, self.keys.dtype)


class Queries(NamedTuple):
    """A tile of query tokens of each of `seqs` sequences."""

    q: jax.Array  # [seqs, kv_heads, tokens * group, head_dim]
    position: jax.Array  # i32[seqs, tokens]
    ancestors: jax.Array | None  # u32[seqs, tokens, words]
    first_row: jax.Array  # i32[seqs]: the row of the sequence's first query token in this call
    first_seen: jax.Array | None  # i32[seqs, tokens]: the first row each sees, where no window says it


class Softmax(NamedTuple):
    """Running online softmax of a tile: f32, `[seqs, kv_heads, tokens * group (, head_dim)]`."""

    highest: jax.Array
    total: jax.Array
    weighted: jax.Array


class Rules(NamedTuple):
    """What is static about one call."""

    window: int | None
    softcap: float | None
    scale: float


def refuse(*, spec: KVSpec, q_heads: int, device: Device) -> str | None:
    """None, or why these pages cannot be served."""
    if jnp.dtype(spec.dtype).name not in storage.DTYPES:
        return f"K/V dtype {jnp.dtype(spec.dtype).name} is not one of {', '.join(storage.DTYPES)}"
    if jnp.dtype(spec.dtype).name == "int4" and spec.head_dim % 2:
        return f"head_dim {spec.head_dim} must be even for int4"
    if BLOCK % spec.page_size and spec.page_size % BLOCK:
        return f"page_size {spec.page_size} must divide {BLOCK} or be a multiple of it"
    return None


def allocate(spec: KVSpec, num_pages: int, *, backend: str = "xla", invariant: bool = False) -> XlaKV:
    packed = jnp.dtype(spec.dtype).name == "int4"
    rows = (num_pages, spec.kv_heads, spec.page_size)
    width, dtype = (spec.head_dim // 2, jnp.uint8) if packed else (spec.head_dim, spec.dtype)
    keys, values = (jnp.zeros((*rows, width), dtype) for _ in range(2))
    if not spec.quantized:
        return XlaKV(keys, values, backend=backend, invariant=invariant)
    return XlaKV(keys, values, jnp.zeros(rows, jnp.float32), jnp.zeros(rows, jnp.float32), backend, invariant)


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
    num_tokens = q.shape[0]
    if k is not None and v is not None:
        kv = write(kv, k, v, ragged)
    ragged, window, first = strided.view(ragged, kv.spec.page_size, window)
    rules = Rules(window, softcap, scale)
    parts = []
    if kv.invariant and q.dtype != jnp.float32:  # in float32 the number of rows of a dot does not matter
        parts.append(_prefill(q, 0, kv, _without_decoding(ragged), first, rules, INVARIANT_TOKENS))
    else:
        decode_tokens = ragged.num_decode_seqs * ragged.width
        if decode_tokens:
            parts.append(_decode(q[:decode_tokens], kv, ragged, first, rules))
        if num_tokens > decode_tokens:
            size = min(Q_BLOCK, max(2, num_tokens - decode_tokens))
            parts.append(_prefill(q, decode_tokens, kv, ragged, first, rules, size))
    highest, total, weighted = (jnp.concatenate(arrays) for arrays in zip(*parts, strict=True))
    used = total != 0  # NaN counts: it must be seen; an unused sequence's tokens see nothing, sinks included
    if sinks is not None:
        above = jnp.maximum(highest, sinks[None, :])
        shrink = jnp.exp(highest - above)
        total = total * shrink + jnp.exp(sinks[None, :] - above)
        highest, weighted = above, weighted * shrink[..., None]
    out = jnp.where(used[..., None], weighted / jnp.where(used, total, 1.0)[..., None], 0.0)
    lse = jnp.where(used, highest + jnp.log(jnp.where(used, total, 1.0)), -jnp.inf)
    return out.astype(q.dtype), lse, kv


def write(kv: XlaKV, k: jax.Array, v: jax.Array, ragged: Ragged) -> XlaKV:
    page, offset, _ = token_rows(ragged, k.shape[0], kv.spec.page_size)
    values, scales = zip(*(_stored(kv.spec, rows) for rows in (k, v)), strict=True)
    return _each(kv, lambda pool, new: pool.at[page, :, offset].set(new, mode="promise_in_bounds"), values, scales)


def _stored(spec: KVSpec, rows: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """`rows [..., head_dim]` as the pools hold them, and their scales `[...]`."""
    if not spec.quantized:
        return rows.astype(spec.dtype), None
    values, scales = tensors.quantize_rows(rows, spec.dtype)
    return _packed(spec, values), scales


def _packed(spec: KVSpec, values: jax.Array) -> jax.Array:
    return storage.pack_int4(values) if jnp.dtype(spec.dtype).name == "int4" else values.astype(spec.dtype)


def _each(kv: XlaKV, change: Any, *new: Any) -> XlaKV:
    """`change(pool)` for all pools; or with `new` = (of K and V, of their scales): `change(pool, new)`."""
    pools = ("keys", "values", "key_scales", "value_scales")
    rows = [(x,) for pair in new for x in pair] if new else [()] * 4
    changed = {
        name: change(getattr(kv, name), *extra)
        for name, extra in zip(pools, rows, strict=True)
        if getattr(kv, name) is not None
    }
    return replace(kv, **changed)


def _decode(q: jax.Array, kv: XlaKV, ragged: Ragged, first: jax.Array | None, rules: Rules) -> Softmax:
    """All decode sequences side by side, as many blocks as the longest of them needs."""
    seqs, width, (_, q_heads, head_dim) = ragged.num_decode_seqs, ragged.width, q.shape
    kv_heads = kv.spec.kv_heads
    group = q_heads // kv_heads
    tiles = q.reshape(seqs, width, kv_heads, group, head_dim).transpose(0, 2, 1, 3, 4)
    tiles = tiles.reshape(seqs, kv_heads, width * group, head_dim)
    if width * group == 1:  # one-row dots differ in their last bits from all others
        tiles = jnp.concatenate([tiles, tiles], axis=2)
    rows = tiles.shape[2]
    kv_len, table = ragged.kv_len[:seqs], ragged.page_table[:seqs]
    words = None if ragged.ancestors is None else ragged.ancestors[: seqs * width].reshape(seqs, width, -1)
    position = ragged.q_position[: seqs * width].reshape(seqs, width)
    first = None if first is None else first[: seqs * width].reshape(seqs, width)
    tile = Queries(tiles, position, words, kv_len - width, first)
    kv_position = None if ragged.kv_position is None else ragged.kv_position[:seqs]
    result = _attend_tile(tile, kv, table, kv_len, kv_position, rules)
    return Softmax(*(_tokens_first(x, seqs, width, rows // width, group) for x in result))


def _tokens_first(x: jax.Array, seqs: int, tokens: int, rows_per_token: int, group: int) -> jax.Array:
    """`[seqs, kv_heads, tokens * rows, ...]` -> `[seqs * tokens, kv_heads * group, ...]`."""
    x = x.reshape(seqs, x.shape[1], tokens, rows_per_token, *x.shape[3:])[:, :, :, :group]
    x = jnp.moveaxis(x, 2, 1)
    return x.reshape(seqs * tokens, -1, *x.shape[4:])


def _without_decoding(ragged: Ragged) -> Ragged:
    """The same sequences, all of them of any length."""
    seq = jnp.arange(ragged.q_start.shape[0], dtype=jnp.int32)
    starts = jnp.where(seq < ragged.num_decode_seqs, seq * ragged.width, ragged.q_start)
    return replace(ragged, q_start=starts, num_decode_seqs=0)


def _prefill(
    q: jax.Array, first_token: int, kv: XlaKV, ragged: Ragged, first: jax.Array | None, rules: Rules, size: int
) -> Softmax:
    """Tile by tile of `size` query tokens of one sequence; the number of tiles and blocks is dynamic."""
    num_tokens, q_heads, head_dim = q.shape
    kv_heads = kv.spec.kv_heads
    group = q_heads // kv_heads
    pad = [(0, size), (0, 0)]
    q_padded = jnp.pad(q, [*pad, (0, 0)])
    position = jnp.pad(ragged.q_position, pad[0])
    words = None if ragged.ancestors is None else jnp.pad(ragged.ancestors, pad)
    first = None if first is None else jnp.pad(first, pad[0])

    def tile_of(s: jax.Array, index: jax.Array, carry: Softmax) -> Softmax:
        start, end = ragged.q_start[s] + index * size, ragged.q_start[s + 1]
        tile = lax.dynamic_slice_in_dim(q_padded, start, size).reshape(size, kv_heads, group, head_dim)
        queries = Queries(
            tile.transpose(1, 0, 2, 3).reshape(1, kv_heads, size * group, head_dim),
            # rows past the end see nothing, so that they cost no further blocks
            lax.dynamic_slice_in_dim(jnp.where(jnp.arange(position.shape[0]) < end, position, -1), start, size)[None],
            None if words is None else lax.dynamic_slice_in_dim(words, start, size)[None],
            (ragged.kv_len[s] - (end - ragged.q_start[s]))[None],
            None if first is None else lax.dynamic_slice_in_dim(first, start, size)[None],
        )
        kv_position = None if ragged.kv_position is None else ragged.kv_position[s][None]
        result = _attend_tile(queries, kv, ragged.page_table[s][None], ragged.kv_len[s][None], kv_position, rules)
        mine = start + jnp.arange(size) < end
        merged = []
        for old, new in zip(carry, result, strict=True):
            new = _tokens_first(new, 1, size, group, group)
            keep = lax.dynamic_slice_in_dim(old, start, size)
            new = jnp.where(mine.reshape(-1, *([1] * (new.ndim - 1))), new, keep)
            merged.append(lax.dynamic_update_slice_in_dim(old, new, start, axis=0))
        return Softmax(*merged)

    def sequence(s: jax.Array, carry: Softmax) -> Softmax:
        length = jnp.where(ragged.kv_len[s] > 0, ragged.q_start[s + 1] - ragged.q_start[s], 0)
        return lax.fori_loop(0, (length + size - 1) // size, lambda i, c: tile_of(s, i, c), carry)

    empty = _empty((num_tokens + size, q_heads), head_dim)
    result = lax.fori_loop(ragged.num_decode_seqs, ragged.kv_len.shape[0], sequence, empty)
    return Softmax(*(x[first_token:num_tokens] for x in result))


def _empty(shape: tuple[int, ...], head_dim: int) -> Softmax:
    return Softmax(
        jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros((*shape, head_dim), jnp.float32)
    )


def _attend_tile(
    tile: Queries, kv: XlaKV, table: jax.Array, kv_len: jax.Array, kv_position: jax.Array | None, rules: Rules
) -> Softmax:
    """Online softmax of each sequence's tile over the blocks that any of its queries can see.

    Blocks [first, first + count) per sequence: from the window's start of its earliest query to its last row seen.
    """
    page_size, head_dim = kv.spec.page_size, kv.spec.head_dim
    block = max(BLOCK, page_size)
    pages_per_block = block // page_size
    table = jnp.pad(table, [(0, 0), (0, -table.shape[1] % pages_per_block)])
    if kv_position is None:
        last_row = jnp.minimum(kv_len, jnp.max(tile.position, axis=1) + 1)
        if tile.ancestors is not None:
            last_row = kv_len
        since = tile.first_seen if rules.window is None else tile.position - rules.window + 1
        if since is None:
            first = jnp.zeros_like(kv_len)
        else:
            earliest = jnp.min(jnp.where(tile.position < 0, jnp.iinfo(jnp.int32).max, since), axis=1)
            first = jnp.maximum(earliest, 0) // block
    else:
        last_row, first = kv_len, jnp.zeros_like(kv_len)
    count = jnp.max(jnp.maximum((last_row + block - 1) // block - first, 0))

    def step(i: jax.Array, state: Softmax) -> Softmax:
        start = (first + i) * block
        columns = jnp.minimum((first + i)[:, None] * pages_per_block + jnp.arange(pages_per_block), table.shape[1] - 1)
        pages = jnp.take_along_axis(table, columns, axis=1)
        row = start[:, None] + jnp.arange(block)[None, :]
        seen = _visible(tile, row, row < kv_len[:, None], kv_position, rules.window)
        keys, key_scales = _rows(kv.keys, kv.key_scales, pages, tile.q.dtype)
        values, value_scales = _rows(kv.values, kv.value_scales, pages, tile.q.dtype)
        # what nobody sees, unwritten or slid out of the window, may be NaN, and 0 * NaN is NaN
        values = jnp.where(jnp.any(seen, axis=1)[:, None, :, None], values, 0)
        if head_dim < LANES:  # XLA:CPU adds narrow products up in an order that depends on the number of queries
            values = jnp.pad(values, [(0, 0)] * 3 + [(0, LANES - head_dim)])
        scores = _dot("skqh,skrh->skqr", tile.q, keys) * (rules.scale * key_scales)
        if rules.softcap is not None:
            scores = rules.softcap * jnp.tanh(scores / rules.softcap)
        seen = jnp.repeat(seen, scores.shape[2] // seen.shape[1], axis=1)[:, None]
        highest = jnp.maximum(state.highest, jnp.max(jnp.where(seen, scores, MASKED), axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - highest[..., None]), 0.0)
        shrink = jnp.exp(state.highest - highest)
        scaled = weights if kv.value_scales is None else jnp.where(seen, weights * value_scales, 0.0)
        gained = _dot("skqr,skrh->skqh", scaled.astype(values.dtype), values)[..., :head_dim]
        return Softmax(
            highest,
            state.total * shrink + row_sums(weights),
            state.weighted * shrink[..., None] + gained,
        )

    return lax.fori_loop(0, count, step, _empty(tile.q.shape[:3], head_dim))


def _dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """In float32; without HIGHEST, TPUs and GPUs would round float32 operands."""
    precision = lax.Precision.HIGHEST if jnp.float32 in (x.dtype, y.dtype) else None
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)


def _rows(
    pool: jax.Array, scales: jax.Array | None, pages: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array | float]:
    """`pages: i32[seqs, n]` -> rows `[seqs, kv_heads, n * page_size, head_dim]`, scales `[seqs, kv_heads, 1, rows]`."""
    rows = _gather(pool, pages)
    if scales is None:
        return rows, 1.0
    if pool.dtype == jnp.uint8:
        rows = storage.unpack_int4(rows)
    return rows.astype(dtype), _gather(scales, pages)[:, :, None, :]


def _gather(pool: jax.Array, pages: jax.Array) -> jax.Array:
    """`[pages, kv_heads, page_size, ...]` -> `[seqs, kv_heads, n * page_size, ...]`, copied by page and head."""
    num_pages, kv_heads, page_size, *rest = pool.shape
    index = pages[:, None, :] * kv_heads + jnp.arange(kv_heads, dtype=pages.dtype)[None, :, None]
    flat = pool.reshape(num_pages * kv_heads, -1)
    rows = flat.at[index.reshape(-1)].get(mode="clip")
    return rows.reshape(pages.shape[0], kv_heads, pages.shape[1] * page_size, *rest)


def _visible(
    tile: Queries, row: jax.Array, in_use: jax.Array, kv_position: jax.Array | None, window: int | None
) -> jax.Array:
    """bool[seqs, tokens, rows]: which of these rows each query token sees."""
    if kv_position is None:
        position = row
    else:
        position = jnp.take_along_axis(kv_position, jnp.minimum(row, kv_position.shape[1] - 1), axis=1)
    seen = in_use[:, None, :] & (position[:, None, :] <= tile.position[:, :, None])
    if tile.ancestors is not None:
        node = row - tile.first_row[:, None]
        at = jnp.broadcast_to(jnp.clip(node, 0, 32 * tile.ancestors.shape[2] - 1)[:, None, :], seen.shape)
        bit = (jnp.take_along_axis(tile.ancestors, at // 32, axis=2) >> (at % 32).astype(jnp.uint32)) & 1
        seen &= (node < 0)[:, None, :] | (bit == 1)
    if window is not None:
        seen &= position[:, None, :] > tile.position[:, :, None] - window
    if tile.first_seen is not None:
        seen &= row[:, None, :] >= tile.first_seen[:, :, None]
    return seen


def read_pages(kv: XlaKV, pages: jax.Array) -> PageRows:
    values = jnp.stack([kv.keys[pages], kv.values[pages]], axis=1).transpose(0, 3, 1, 2, 4)
    if kv.key_scales is None or kv.value_scales is None:
        return PageRows(values)
    values = storage.unpack_int4(values) if kv.keys.dtype == jnp.uint8 else values
    return PageRows(values, jnp.stack([kv.key_scales[pages], kv.value_scales[pages]], axis=1).transpose(0, 3, 1, 2))


def write_pages(kv: XlaKV, pages: jax.Array, rows: PageRows) -> XlaKV:
    values = [_packed(kv.spec, rows.values[:, :, i].swapaxes(1, 2)) for i in (0, 1)]
    scales = [None if rows.scales is None else rows.scales[:, :, i].swapaxes(1, 2) for i in (0, 1)]
    return _each(kv, lambda pool, new: pool.at[pages].set(new), values, scales)


def copy_pages(kv: XlaKV, source: jax.Array, target: jax.Array) -> XlaKV:
    return _each(kv, lambda pool: pool.at[target].set(pool[source]))


def move_rows(kv: XlaKV, source: Any, target: Any) -> XlaKV:
    return _each(kv, lambda pool: pool.at[target[0], :, target[1]].set(pool[source[0], :, source[1]]))
