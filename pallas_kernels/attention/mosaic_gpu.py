"""Paged attention for Hopper in Pallas Mosaic GPU: asynchronous page copies, warp specialisation, wgmma.

Hides how tokens become tiles of query rows, how K/V rows are split between thread blocks, and block sizes. Its pages
are those of the `xla` backend; tree drafts, rows with gaps and queries of another dtype run there, on the same pages.
Sources: FlashAttention-3 (Shah et al. 2024, 2407.08608), Flash-Decoding (Dao et al. 2023).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import devices, tuning
from pallas_kernels.attention import KVSpec, Ragged, merge, strided, with_sinks, xla
from pallas_kernels.attention import mosaic_gpu_kernels as kernels
from pallas_kernels.attention.mosaic_gpu_kernels import WARPGROUP_ROWS, Plan
from pallas_kernels.attention.xla import XlaKV, copy_pages, move_rows, read_pages, write, write_pages
from pallas_kernels.devices import Device

__all__ = ["allocate", "attend", "copy_pages", "move_rows", "read_pages", "refuse", "write", "write_pages"]

ARCH = "sm_90a"
DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128, 256)
PAGE_STEP = 64  # rows: a page is whole swizzled tiles, and whole blocks or a whole part of one
PREFILL_CONSUMERS = 2  # warpgroups that multiply
DECODE_CONSUMERS = {64: 2, 128: 2, 256: 1}  # by head_dim: each has its own ring, and a ring at least two blocks
PREFILL_BLOCK = {64: 128, 128: 128, 256: 64}  # K/V rows per step, by head_dim: scores and sums share 232 registers
DECODE_BLOCK = 64
MOST_SLOTS = {"prefill": 4, "decode": 8}  # per stream: more would not hide more latency
LEAST_PART_BLOCKS = 4  # K/V blocks of a part: fewer cost more in merging than they gain
WAVES = {"prefill": 1, "decode": 2}  # work items per core that splitting aims at


class Rules(NamedTuple):
    """What is static about one call."""

    window: int | None
    softcap: float | None
    scale: float


class Phase(NamedTuple):
    """The decode sequences of a call, or the others; token 0 is the phase's first."""

    name: str  # "decode" | "prefill"
    first_seq: int
    start: jax.Array  # i32[seqs]: each sequence's first token
    queries: jax.Array  # i32[seqs]: its tokens; 0 where it is unused
    most: int  # tokens that any of them can have
    kv_len: jax.Array  # i32[seqs]
    position: jax.Array  # i32[tokens]
    first: jax.Array | None  # i32[tokens]: the first row each sees, where no window says it


class Tiles(NamedTuple):
    """Query rows in tiles of `size`; row `token * group + head` of a KV head, sequence by sequence."""

    bounds: jax.Array  # i32[tiles, 6]: see the kernel's columns
    token: jax.Array  # i32[tiles, size]: each row's token and its head in the group; any where there is none
    head: jax.Array
    position: jax.Array  # i32[tiles, size]: of each row's token; -1 where there is none
    first: jax.Array | None  # i32[tiles, size]: the first K/V row that it sees, where no window says it
    tile: jax.Array  # i32[tokens * group]: where each row of the phase is
    row: jax.Array
    valid: jax.Array  # bool[tokens * group]: whether it belongs to a sequence in use


def refuse(*, spec: KVSpec, q_heads: int, device: Device) -> str | None:
    """None, or why these pages cannot be served."""
    dtype = jnp.dtype(spec.dtype).name
    if device.arch != ARCH:
        return f"it is for Hopper (h100, h200), the device is {device}"
    if dtype not in DTYPES:
        return f"K/V dtype {dtype} is not one of {', '.join(DTYPES)}; triton and xla take others"
    if spec.head_dim not in HEAD_DIMS:
        return f"head_dim {spec.head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}; triton and xla take others"
    if spec.page_size % PAGE_STEP:
        return f"page_size {spec.page_size} must be a multiple of {PAGE_STEP}; triton and xla take others"
    return xla.refuse(spec=spec, q_heads=q_heads, device=device)


def allocate(spec: KVSpec, num_pages: int) -> XlaKV:
    return xla.allocate(spec, num_pages, backend="mosaic_gpu")


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
    plain = ragged.ancestors is None and ragged.kv_position is None and q.dtype == kv.keys.dtype
    if not plain or scale <= 0:  # a maximum of scaled scores is the scaled maximum only above 0
        return xla.attend(q, k, v, kv, ragged, window=window, softcap=softcap, sinks=sinks, scale=scale)
    if k is not None and v is not None:
        kv = write(kv, k, v, ragged)
    ragged, window, first = strided.view(ragged, kv.spec.page_size, window)
    device, rules = devices.current(), Rules(window, softcap, scale)
    decode_tokens = ragged.num_decode_seqs * ragged.width
    phases = ((_decode_phase(ragged, first), q[:decode_tokens]), (_prefill_phase(ragged, first), q[decode_tokens:]))
    parts = [_attend_phase(phase, rows, kv, ragged.page_table, rules, device) for phase, rows in phases if rows.size]
    out, lse = (jnp.concatenate(arrays) for arrays in zip(*parts, strict=True))
    out, lse = with_sinks(out, lse, sinks)
    return out.astype(q.dtype), lse, kv


def _decode_phase(ragged: Ragged, first: jax.Array | None) -> Phase:
    seqs, width = ragged.num_decode_seqs, ragged.width
    kv_len = ragged.kv_len[:seqs]
    start = jnp.arange(seqs, dtype=jnp.int32) * width
    queries = jnp.where(kv_len > 0, width, 0)
    first = None if first is None else first[: seqs * width]
    return Phase("decode", 0, start, queries, width, kv_len, ragged.q_position[: seqs * width], first)


def _prefill_phase(ragged: Ragged, first: jax.Array | None) -> Phase:
    seqs, decode_tokens = ragged.num_decode_seqs, ragged.num_decode_seqs * ragged.width
    kv_len, start, position = ragged.kv_len[seqs:], ragged.q_start[seqs:], ragged.q_position[decode_tokens:]
    queries = jnp.where(kv_len > 0, start[1:] - start[:-1], 0)
    first = None if first is None else first[decode_tokens:]
    return Phase("prefill", seqs, start[:-1] - decode_tokens, queries, len(position), kv_len, position, first)


def _attend_phase(
    phase: Phase, q: jax.Array, kv: XlaKV, table: jax.Array, rules: Rules, device: Device
) -> tuple[jax.Array, jax.Array]:
    """`(out [tokens, q_heads, head_dim], lse f32[tokens, q_heads])` of a phase's tokens."""
    (num_tokens, q_heads, head_dim), kv_heads = q.shape, kv.spec.kv_heads
    if not len(phase.kv_len):  # nothing but padding
        return jnp.zeros_like(q), jnp.full((num_tokens, q_heads), -jnp.inf, jnp.float32)
    group = q_heads // kv_heads
    size = WARPGROUP_ROWS * (1 if phase.name == "decode" else PREFILL_CONSUMERS)
    tiles = _tiles(phase, group, size, rules.window)
    cut = plan(phase.name, kv.spec, q_heads, len(tiles.bounds), table.shape[1], rules, device)
    cut = replace(cut, bounded=tiles.first is not None)
    # a tile of one warpgroup may have fewer rows than wgmma takes: no more than these are copied
    rows = size if size > WARPGROUP_ROWS else min(size, phase.most * group + -phase.most * group % 8)
    grouped = q.reshape(num_tokens, kv_heads, group, head_dim)
    tiled = grouped[tiles.token[:, :rows, None], jnp.arange(kv_heads), tiles.head[:, :rows, None]].swapaxes(1, 2)
    position = tiles.position if tiles.first is None else jnp.concatenate([tiles.position, tiles.first], axis=1)
    out, lse = kernels.attend_tiles(tiled, kv.keys, kv.values, table, tiles.bounds, position, cut)
    return _untiled(tiles, out, lse[..., :rows], num_tokens)


def _untiled(tiles: Tiles, out: jax.Array, lse: jax.Array, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Merge `out [tiles, kv_heads, parts, size, head_dim]` and `lse [tiles, kv_heads, parts, size]`; order by token."""
    _, kv_heads, parts, _, head_dim = out.shape
    if parts == 1:
        merged, total = out[:, :, 0], lse[:, :, 0]
    else:
        merged, total = merge([(out[:, :, i], lse[:, :, i]) for i in range(parts)])
    index = (tiles.tile[:, None], jnp.arange(kv_heads)[None, :], tiles.row[:, None])
    by_row = jnp.where(tiles.valid[:, None, None], merged[index], 0)  # [tokens * group, kv_heads, head_dim]
    lse_by_row = jnp.where(tiles.valid[:, None], total[index], -jnp.inf)
    by_head = by_row.reshape(num_tokens, -1, kv_heads, head_dim).swapaxes(1, 2)
    lse_by_head = lse_by_row.reshape(num_tokens, -1, kv_heads).swapaxes(1, 2)
    return by_head.reshape(num_tokens, -1, head_dim), lse_by_head.reshape(num_tokens, -1)


def _tiles(phase: Phase, group: int, size: int, window: int | None) -> Tiles:
    """Cut the query rows of each sequence into tiles, as many as there can be."""
    num_tokens, seqs = len(phase.position), len(phase.kv_len)
    # each sequence has one tile that is not full, at most
    num_tiles = min(seqs * -(-phase.most * group // size), num_tokens * group // size + seqs)
    first_tile = jnp.cumulative_sum(-(-phase.queries * group // size), include_initial=True).astype(jnp.int32)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    seq = jnp.minimum(jnp.sum(tile[:, None] >= first_tile[None, 1:], axis=1, dtype=jnp.int32), seqs - 1)
    local = ((tile - first_tile[seq]) * size)[:, None] + jnp.arange(size, dtype=jnp.int32)  # row in the sequence
    used = (local < (phase.queries * group)[seq][:, None]) & (tile < first_tile[-1])[:, None]
    token = jnp.clip(phase.start[seq][:, None] + local // group, 0, num_tokens - 1)
    position = jnp.where(used, phase.position[token], -1)
    first = None if phase.first is None else phase.first[token]
    bounds = _bounds(seq + phase.first_seq, used, position, first, phase.kv_len[seq], window)
    return Tiles(bounds, token, local % group, position, first, *_places(phase, group, size, first_tile))


def _places(phase: Phase, group: int, size: int, first_tile: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The way back: tile, row in it, and whether there is one, of each of the phase's rows."""
    row = jnp.arange(len(phase.position) * group, dtype=jnp.int32)
    seq = jnp.sum((row // group)[:, None] >= phase.start[None, 1:], axis=1, dtype=jnp.int32)
    local = row - (phase.start * group)[seq]
    valid = (local >= 0) & (local < (phase.queries * group)[seq])
    return jnp.where(valid, first_tile[seq] + local // size, 0), jnp.where(valid, local % size, 0), valid


def _bounds(
    seq: jax.Array, used: jax.Array, position: jax.Array, first: jax.Array | None, kv_len: jax.Array, window: int | None
) -> jax.Array:
    """i32[tiles, 6]: sequence, rows [begin, end) that any and that all its rows see, rows in use."""
    lowest = lambda x: jnp.min(jnp.where(used, x, jnp.iinfo(jnp.int32).max), axis=1)
    highest = lambda x: jnp.max(jnp.where(used, x, -1), axis=1)
    if first is None:
        first = jnp.zeros_like(position) if window is None else jnp.maximum(position - window + 1, 0)
    until = lambda query: jnp.minimum(query + 1, kv_len)
    latest = highest(position)
    earliest = jnp.minimum(lowest(position), latest)
    columns = (seq, jnp.minimum(lowest(first), latest + 1), until(latest), highest(first), until(earliest), kv_len)
    return jnp.stack([column.astype(jnp.int32) for column in columns], axis=1)


def plan(
    phase: str, spec: KVSpec, q_heads: int, num_tiles: int, pages_per_seq: int, rules: Rules, device: Device
) -> Plan:
    """How the work is cut on `device`: block sizes from the tuning table or computed, K/V splits to fill all cores."""
    key = {
        "phase": phase,
        "dtype": jnp.dtype(spec.dtype).name,
        "kv_dtype": jnp.dtype(spec.dtype).name,
        "q_heads": q_heads,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "page_size": spec.page_size,
        "window": rules.window,
    }
    consumers = DECODE_CONSUMERS[spec.head_dim] if phase == "decode" else PREFILL_CONSUMERS
    cut = Plan(
        *rules,
        consumers=consumers,
        streams=consumers if phase == "decode" else 1,
        splits=1,
        block=_default_block(phase, spec),
        slots=1,
        programs=1,
        probabilities="registers" if device.arch == ARCH else "smem",  # wgmma from registers cannot be interpreted
    )
    target = device if device.arch == ARCH else devices.named("h200")  # interpreted: as on the real thing
    fits = lambda slots: kernels.smem_bytes(replace(cut, slots=slots), spec) <= target.fast_memory_bytes
    slots = max(n for n in range(1, MOST_SLOTS[phase] + 1) if n == 1 or fits(n))
    blocks = tuning.block_sizes("attention.mosaic_gpu", target, {"block": cut.block, "slots": slots}, **key)
    cut = replace(cut, block=blocks["block"], slots=blocks["slots"])
    assert spec.page_size % cut.block == 0 or cut.block % spec.page_size == 0, f"{cut.block=} {spec.page_size=}"
    most_blocks = pages_per_seq * spec.page_size // cut.block
    items = num_tiles * spec.kv_heads
    wanted = WAVES[phase] * target.num_cores // items
    splits = max(1, min(wanted, most_blocks // (LEAST_PART_BLOCKS * cut.streams)))
    return replace(cut, splits=splits, programs=min(items * splits, target.num_cores))


def _default_block(phase: str, spec: KVSpec) -> int:
    """K/V rows per step: whole pages or a whole part of one."""
    block = DECODE_BLOCK if phase == "decode" else PREFILL_BLOCK[spec.head_dim]
    return PAGE_STEP if spec.page_size % block and block % spec.page_size else block
