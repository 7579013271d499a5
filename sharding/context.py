"""Attention over sequences whose K/V pages are spread over devices (context parallelism), inside shard_map.

Hides who holds which rows and what travels: queries do, round a ring, and partial results back to their owners in one
exchange; pages never move. Ring Attention (Liu et al. 2023, 2310.01889); its pass-Q form for K/V that stays where it
is cached: Context Parallelism for Scalable Million-Token Inference (Yang et al. 2024, 2411.01783).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import attention
from pallas_kernels.attention import LayerKV, Ragged


class Rules(NamedTuple):
    """What is static about one call, beside shapes."""

    axes: tuple[str, ...]
    shards: int
    window: int | None
    softcap: float | None
    scale: float | None


def spread(ragged: Ragged, *, axes: tuple[str, ...], shards: int) -> Ragged:
    """The sequences of one device as each of `shards` along mesh `axes` has them."""
    if shards == 1:
        return ragged
    return replace(ragged, page_stride=shards, page_offset=lax.axis_index(axes))


def attend(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    kv: LayerKV,
    ragged: Ragged,
    *,
    axes: tuple[str, ...],
    shards: int,
    window: int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, LayerKV]:
    """`attention.attend` by the `shards` devices along mesh `axes`; page i of a sequence lies on shard `i % shards`.

    `q [rows, q_heads, head_dim]`, `k, v [rows, kv_heads, head_dim]`: all decode rows, the same on every shard, then
    this shard's part, 1/shards in one run, of the packed prefill tokens. `ragged`, of `spread`, says of all rows and
    tokens what it says on one device. Returns `out` like q, of these rows, and the pages. Raises ValueError where parts
    do not fit.
    """
    if shards == 1:
        out, _, kv = attention.attend(q, k, v, kv, ragged, window=window, softcap=softcap, sinks=sinks, scale=scale)
        return out, kv
    rules = Rules(axes, shards, window, softcap, scale)
    decode_rows = ragged.num_decode_seqs * ragged.width
    _check(q, ragged, decode_rows, shards)
    decoding, prefill = _phases(ragged, decode_rows)
    size = q.shape[0] - decode_rows
    (decode_k, own_k), (decode_v, own_v) = (_cut(x, decode_rows) for x in (k, v))
    # all writes come before the first call that only reads, so that no pool is copied to keep what was
    if size and own_k is not None and own_v is not None:
        kv = _write(own_k, own_v, kv, prefill, rules)
    results = jnp.zeros((0, q.shape[1] * (q.shape[2] + 1)), jnp.float32)
    if decode_rows:
        out, lse, kv = _partial(q[:decode_rows], decode_k, decode_v, kv, decoding, rules)
        results = _packed(out, lse)
    if size:
        parts = lax.all_to_all(_ring(q[decode_rows:], kv, prefill, results, rules), axes, 0, 0)
    else:
        # one step: a maximum and two sums would be three, and of as many hops each
        parts = lax.all_gather(results, axes)
    return _merged(parts, q, sinks), kv


def _check(q: jax.Array, ragged: Ragged, decode_rows: int, shards: int) -> None:
    if ragged.page_stride != shards:
        raise ValueError(f"ragged is for pages over {ragged.page_stride} devices, not over {shards}: spread makes it")
    tokens = ragged.q_position.shape[0] - decode_rows
    if q.shape[0] == 0 or (q.shape[0] - decode_rows) * shards != tokens:
        raise ValueError(
            f"{q.shape[0]} rows of q are not {decode_rows} decode rows and one of {shards} equal parts of {tokens} "
            "prefill tokens, at least one row in all"
        )


def _cut(x: jax.Array | None, at: int) -> tuple[jax.Array | None, jax.Array | None]:
    return (None, None) if x is None else (x[:at], x[at:])


def _phases(ragged: Ragged, decode_rows: int) -> tuple[Ragged, Ragged]:
    """The decode sequences, and the others; token 0 is the first of either."""
    seqs = ragged.num_decode_seqs
    decoding = replace(
        ragged,
        q_start=ragged.q_start[: seqs + 1],
        kv_len=ragged.kv_len[:seqs],
        page_table=ragged.page_table[:seqs],
        q_position=ragged.q_position[:decode_rows],
    )
    prefill = replace(
        ragged,
        q_start=ragged.q_start[seqs:] - decode_rows,
        kv_len=ragged.kv_len[seqs:],
        page_table=ragged.page_table[seqs:],
        q_position=ragged.q_position[decode_rows:],
        num_decode_seqs=0,
    )
    return decoding, prefill


def _write(k: jax.Array, v: jax.Array, kv: LayerKV, prefill: Ragged, rules: Rules) -> LayerKV:
    """Every shard gets all new rows and writes those of its pages."""
    rows = lax.all_gather(jnp.stack([k, v], axis=1), rules.axes, tiled=True)  # [tokens, 2, kv_heads, head_dim]
    return attention.write(kv, rows[:, 0], rows[:, 1], prefill)


def _partial(
    q: jax.Array, k: jax.Array | None, v: jax.Array | None, kv: LayerKV, ragged: Ragged, rules: Rules
) -> tuple[jax.Array, jax.Array, LayerKV]:
    """What this shard's pages give: `(out, lse, kv)`."""
    return attention.attend(q, k, v, kv, ragged, window=rules.window, softcap=rules.softcap, scale=rules.scale)


def _ring(q: jax.Array, kv: LayerKV, prefill: Ragged, before: jax.Array, rules: Rules) -> jax.Array:
    """`[shards, rows, packed]`: for each shard the decode rows' results `before`, then those of its block of queries.

    The next block is on its way while this one is attended to. A loop, so that the kernel is compiled once; its last
    step sends the blocks home, which nobody waits for.
    """
    size, me = q.shape[0], lax.axis_index(rules.axes)
    to_next = [(shard, (shard + 1) % rules.shards) for shard in range(rules.shards)]
    first_row = before.shape[0]
    results = jnp.zeros((rules.shards, first_row + size, before.shape[1]), before.dtype)
    results = results.at[:, :first_row].set(before)

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        block, results = carry
        following = lax.ppermute(block, rules.axes, to_next)
        owner = (me - i) % rules.shards
        out, lse, _ = _partial(block, None, None, kv, _block(prefill, owner * size, size), rules)
        return following, lax.dynamic_update_slice(results, _packed(out, lse)[None], (owner, first_row, 0))

    return lax.fori_loop(0, rules.shards, step, (q, results))[1]


def _block(prefill: Ragged, first: jax.Array, size: int) -> Ragged:
    """Tokens [first, first + size); a sequence may have some of them, or none."""
    return replace(
        prefill,
        q_start=jnp.clip(prefill.q_start - first, 0, size),
        q_position=lax.dynamic_slice_in_dim(prefill.q_position, first, size),
    )


def _packed(out: jax.Array, lse: jax.Array) -> jax.Array:
    """`out [rows, heads, head_dim]` and `lse f32[rows, heads]` as one array f32[rows, heads * (head_dim + 1)].

    As words of 16 bits they would be half as many bytes, and a TPU would spend a dozen operations on cutting them up.
    """
    return jnp.concatenate([out.astype(jnp.float32).reshape(out.shape[0], -1), lse], axis=1)


def _merged(parts: jax.Array, q: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """`out` like q of all shards' packed results `[shards, rows, packed]`, joined in float32 in the order of shards."""
    rows, heads, head_dim = q.shape
    outs, lse = jnp.split(parts, [heads * head_dim], axis=2)
    merged = attention.merge(list(zip(outs.reshape(-1, rows, heads, head_dim), lse, strict=True)))
    return attention.with_sinks(*merged, sinks)[0].astype(q.dtype)
