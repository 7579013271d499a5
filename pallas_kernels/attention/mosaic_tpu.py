"""Paged attention for TPUs: what is refused, the block sizes, the list of work items, and two calls of one kernel.

Sources: Ragged Paged Attention (2604.15464), FlashAttention-2 (Dao 2023), online softmax (1805.02867).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import devices, tuning
from pallas_kernels.attention import KVSpec, Ragged, UnsupportedError, storage, strided
from pallas_kernels.attention import mosaic_tpu_kernel as kernel
from pallas_kernels.attention.mosaic_tpu_kernel import LANES, Inputs, Items, Plan
from pallas_kernels.attention.mosaic_tpu_pages import (
    MosaicKV,
    allocate,
    copy_pages,
    move_rows,
    read_pages,
    stored,
    write_pages,
)
from pallas_kernels.devices import MIB, Device

__all__ = ["allocate", "attend", "copy_pages", "move_rows", "read_pages", "refuse", "write", "write_pages"]

LEAST_TOKENS = 16  # of a prefill block
HEAD_DIM_STEP = 16  # rows of a 16-bit tile: K and V halves of a page stay aligned


def refuse(*, spec: KVSpec, q_heads: int, device: Device) -> str | None:
    """None, or why these pages cannot be served on `device`."""
    name = jnp.dtype(spec.dtype).name
    if name not in storage.DTYPES or name == "float16":
        return f"K/V dtype {name} is not one of bfloat16, float32, {', '.join(storage.QUANTIZED)}"
    if spec.page_size % LANES:
        return f"page_size {spec.page_size} must be a multiple of {LANES}: tokens lie along lanes; use {LANES}"
    if spec.head_dim % HEAD_DIM_STEP or spec.head_dim > 512:
        return f"head_dim {spec.head_dim} must be a multiple of {HEAD_DIM_STEP} and at most 512"
    if q_heads % spec.kv_heads:
        return f"{q_heads} query heads are not a multiple of {spec.kv_heads} KV heads"
    needed, limit = _vmem_bytes(spec, q_heads, LEAST_TOKENS, 1) // _splits(spec, device), _vmem_budget(device)
    if needed > limit:
        return (
            f"{LEAST_TOKENS} tokens x {q_heads} query heads and pages of {spec.page_size} tokens need "
            f"{needed // MIB} MiB of VMEM, the limit is {limit // MIB}; use smaller pages, or more devices per layer"
        )
    return None


class Batch(NamedTuple):
    """The sequences of a call."""

    whole: Ragged  # as the caller has them
    here: Ragged  # in terms of the rows that lie here; the same where all do
    first: jax.Array | None  # i32[tokens]: the first row here that each token sees, where no window says it
    span: int | None  # rows, of those that lie here, that a token sees at most; None: all


class Phase(NamedTuple):
    """The part of a call that one kernel call serves, in the kernel's own terms."""

    plan: Plan
    items: Items
    tiles: Callable[[jax.Array], jax.Array]  # q of the call -> [q_blocks, kv_heads, q_rows, head_dim]
    lanes: Callable[[jax.Array], jax.Array]  # [tokens, ...] of the call -> [token_blocks * token_lanes, ...]
    unblock: Callable[[jax.Array], jax.Array]  # tiles, head_dim or not -> [tokens of the phase, q_heads, ...]


def attend(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    kv: MosaicKV,
    ragged: Ragged,
    *,
    window: int | None,
    softcap: float | None,
    sinks: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array, MosaicKV]:
    page_size = kv.spec.page_size
    view = strided.view(ragged, page_size, window)
    span = window if window is None or ragged.page_stride == 1 else -(-window // ragged.page_stride) + page_size
    batch = Batch(ragged, view.ragged, view.first, span)
    rules = {"window": view.window, "softcap": softcap, "scale": scale, "writes": k is not None}
    outs, lses = [], []
    for phase in _phases(jax.typeof(q), kv, batch, rules):
        out, lse, kv = _run(phase, q, k, v, kv, batch, sinks)
        outs.append(phase.unblock(out))
        lses.append(phase.unblock(lse[..., : phase.plan.q_rows]))
    padding = q.shape[0] - sum(map(len, outs))  # tokens after the last decode sequence where no others are
    outs.append(jnp.zeros((padding, *q.shape[1:]), q.dtype))
    lses.append(jnp.full((padding, q.shape[1]), -jnp.inf))
    return jnp.concatenate(outs), jnp.concatenate(lses), kv


def write(kv: MosaicKV, k: jax.Array, v: jax.Array, ragged: Ragged) -> MosaicKV:
    """By the same kernel, without queries: each page that gets new rows is read, completed and written back."""
    batch = Batch(ragged, strided.view(ragged, kv.spec.page_size, None).ragged, None, 0)
    rules = {"window": None, "softcap": None, "scale": 1.0, "writes": True, "attends": False}
    for phase in _phases(jax.ShapeDtypeStruct(k.shape, jnp.bfloat16), kv, batch, rules):
        _, _, kv = _run(phase, None, k, v, kv, batch, None)
    return kv


def _phases(q: Any, kv: MosaicKV, batch: Batch, rules: dict[str, Any]) -> list[Phase]:
    """`q`: its shape and dtype."""
    decode_seqs, width = batch.whole.num_decode_seqs, batch.whole.width
    phases = [_decode(q, kv, batch, rules)] if decode_seqs else []
    if batch.whole.kv_len.shape[0] > decode_seqs and q.shape[0] > decode_seqs * width:
        phases.append(_prefill(q, kv, batch, rules))
    return phases


def _run(
    phase: Phase,
    q: jax.Array | None,
    k: jax.Array | None,
    v: jax.Array | None,
    kv: MosaicKV,
    batch: Batch,
    sinks: jax.Array | None,
) -> tuple[Any, Any, MosaicKV]:
    plan, ragged = phase.plan, batch.here
    tokens = None
    if plan.attends:
        words = [phase.lanes(x)[None] for x in (ragged.q_position, batch.first) if x is not None]
        if ragged.ancestors is not None:
            words.append(phase.lanes(lax.bitcast_convert_type(ragged.ancestors, jnp.int32)).T)
        tokens = jnp.concatenate(words)
    new = new_scales = None
    if k is not None and v is not None:
        new, new_scales = _new_rows(k, v, kv.spec, phase.lanes)
    table = ragged.page_table[:, None, :]
    positions = None
    if ragged.kv_position is not None:
        rows = ragged.page_table.shape[1] * plan.page_size
        positions = _pad(ragged.kv_position[:, :rows], 1, rows)
        positions = positions.reshape(len(table), -1, plan.page_size)
    inputs = Inputs(
        table=table,
        next_table=table,
        sinks=None if sinks is None else sinks.astype(jnp.float32),
        tokens=tokens,
        q=None if q is None else phase.tiles(q),
        new=new,
        new_scales=new_scales,
        positions=positions,
        pool=kv.values,
        scales=kv.scales,
    )
    out, lse, values, scales = kernel.call(phase.items, inputs, plan=plan)
    return out, lse, replace(kv, values=values, scales=scales)


def _new_rows(
    k: jax.Array, v: jax.Array, spec: KVSpec, lanes: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array | None]:
    """`[tokens, kv_heads, head_dim]` twice -> `[kv_heads, 2 * rows, lanes]` and scales, as pages have them."""
    (keys, key_scales), (values, value_scales) = stored(spec, k), stored(spec, v)
    new = lanes(jnp.concatenate([keys, values], axis=2)).transpose(1, 2, 0)
    if key_scales is None or value_scales is None:
        return new, None
    return new, lanes(jnp.stack([key_scales, value_scales], axis=2)).transpose(1, 2, 0)


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    """`x` with zeros after it along `axis`, up to `size`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


# ---- decode: an item is a sequence -------------------------------------------------------------------------------


def _decode(q: Any, kv: MosaicKV, batch: Batch, rules: dict[str, Any]) -> Phase:
    """The decode sequences, `width` tokens each at lanes that no token block boundary cuts."""
    seqs, width, (_, q_heads, head_dim) = batch.whole.num_decode_seqs, batch.whole.width, q.shape
    kv_heads = kv.spec.kv_heads
    group = q_heads // kv_heads
    stride = 1 << (width - 1).bit_length()  # lanes per sequence
    token_lanes = max(stride, LANES)
    rows = _round_up(width * group, 16 if q.dtype == jnp.bfloat16 else 8)
    plan = _plan("decode", q, kv, rules, batch, q_rows=lambda _: rows, decode_lanes=token_lanes)
    items = _decode_items(plan, batch, stride)

    def tiles(x: jax.Array) -> jax.Array:
        x = x[: seqs * width].reshape(seqs, width, kv_heads, group, head_dim).transpose(0, 2, 1, 3, 4)
        return _pad(x.reshape(seqs, kv_heads, width * group, head_dim), 2, rows)

    def lanes(x: jax.Array) -> jax.Array:
        x = _pad(x[: seqs * width].reshape(seqs, width, *x.shape[1:]), 1, stride)
        return _pad(x.reshape(seqs * stride, *x.shape[2:]), 0, _round_up(seqs * stride, token_lanes))

    def unblock(x: jax.Array) -> jax.Array:
        """`[seqs, kv_heads, q_rows, ...]` -> `[tokens, q_heads, ...]`"""
        x = x[:, :, : width * group].reshape(seqs, kv_heads, width, group, *x.shape[3:])
        return jnp.moveaxis(x, 2, 1).reshape(seqs * width, q_heads, *x.shape[4:])

    return Phase(plan, items, tiles, lanes, unblock)


def _decode_items(plan: Plan, batch: Batch, stride: int) -> Items:
    """`stride`: lanes per sequence."""
    ragged = batch.whole
    seqs, width = ragged.num_decode_seqs, ragged.width
    seq = jnp.arange(seqs, dtype=jnp.int32)
    lane = seq * stride % plan.token_lanes
    first_row = ragged.kv_len[:seqs] - width
    positions, firsts = (x[: seqs * width].reshape(seqs, width) for x in _bounds(batch))
    return _items(
        plan,
        batch,
        q_block=seq,
        token_block=seq * stride // plan.token_lanes,
        seq=seq,
        first_token=lane,
        num_tokens=jnp.where(ragged.kv_len[:seqs] > 0, width, 0),
        first_lane=lane,
        first_row=first_row,
        query_row=first_row,
        lowest=jnp.min(firsts, axis=1),
        highest=jnp.max(positions, axis=1),
    )


# ---- prefill: an item is what a block of packed tokens shares with a sequence ------------------------------------


def _prefill(q: Any, kv: MosaicKV, batch: Batch, rules: dict[str, Any]) -> Phase:
    """All other tokens in aligned blocks, so that nothing is sliced where no tile begins; items cut blocks in masks."""
    first = batch.whole.num_decode_seqs * batch.whole.width
    num_tokens, (_, q_heads, head_dim) = q.shape[0] - first, q.shape
    kv_heads = kv.spec.kv_heads
    group = q_heads // kv_heads
    plan = _plan("prefill", q, kv, rules, batch, q_rows=lambda tokens: tokens * group)
    block = plan.q_rows // group  # tokens
    padded = _round_up(num_tokens, plan.token_lanes)
    blocks = padded // block
    items = _prefill_items(plan, batch, padded)

    def tiles(x: jax.Array) -> jax.Array:
        x = _pad(x[first:], 0, padded).reshape(blocks, block, kv_heads, group, head_dim).transpose(0, 2, 1, 3, 4)
        return x.reshape(blocks, kv_heads, block * group, head_dim)

    def unblock(x: jax.Array) -> jax.Array:
        """`[blocks, kv_heads, block * group, ...]` -> `[tokens, q_heads, ...]`"""
        x = jnp.moveaxis(x.reshape(blocks, kv_heads, block, group, *x.shape[3:]), 2, 1)
        return x.reshape(padded, q_heads, *x.shape[4:])[:num_tokens]

    return Phase(plan, items, tiles, lambda x: _pad(x[first:], 0, padded), unblock)


def _prefill_items(plan: Plan, batch: Batch, num_lanes: int) -> Items:
    """Cut the packed tokens, padded to `num_lanes`, where a block or a sequence begins; some cuts coincide."""
    ragged = batch.whole
    first, block = ragged.num_decode_seqs * ragged.width, plan.q_rows // plan.group
    blocks = num_lanes // block
    starts = ragged.q_start[ragged.num_decode_seqs : -1] - first  # i32[seqs]: where sequences begin
    points = jnp.sort(jnp.concatenate([jnp.arange(blocks, dtype=jnp.int32) * block, jnp.minimum(starts, num_lanes)]))
    after = jnp.minimum(jnp.append(points[1:], num_lanes), ragged.q_start[-1] - first)
    nth = jnp.sum(points[:, None] >= starts[None, :], axis=1, dtype=jnp.int32) - 1  # the last that begins there
    seq = ragged.num_decode_seqs + jnp.maximum(nth, 0)
    start = starts[seq - ragged.num_decode_seqs]
    query_row = ragged.kv_len[seq] - (ragged.q_start[seq + 1] - ragged.q_start[seq])
    used = (nth >= 0) & (ragged.kv_len[seq] > 0)
    q_block = jnp.minimum(points // block, blocks - 1)
    lane = q_block * block % plan.token_lanes
    by_block = (_pad(x[first:], 0, num_lanes).reshape(blocks, block) for x in _bounds(batch))
    positions, firsts = (x[q_block] for x in by_block)  # i32[items, block]
    token = q_block[:, None] * block + jnp.arange(block)[None, :]
    mine = (token >= points[:, None]) & (token < after[:, None])
    return _items(
        plan,
        batch,
        q_block=q_block,
        token_block=q_block * block // plan.token_lanes,
        seq=seq,
        first_token=points - q_block * block + lane,
        num_tokens=jnp.where(used, jnp.maximum(after - points, 0), 0),
        first_lane=lane,
        first_row=query_row + points - start,
        query_row=query_row,
        lowest=jnp.min(jnp.where(mine, firsts, jnp.iinfo(jnp.int32).max), axis=1),
        highest=jnp.max(jnp.where(mine, positions, -1), axis=1),
    )


# ---- both --------------------------------------------------------------------------------------------------------


def _bounds(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """i32[tokens] twice: positions, and what says where the rows that tokens see begin: their own, or positions."""
    positions = batch.here.q_position
    return positions, positions if batch.first is None else batch.first


def _items(plan: Plan, batch: Batch, *, lowest: jax.Array, highest: jax.Array, **fields: jax.Array) -> Items:
    """The work items. `lowest`, `highest`: of what `_bounds` gives of an item's tokens."""
    ragged, seq, num_tokens, new_row = batch.here, fields["seq"], fields.pop("num_tokens"), fields["first_row"]
    end_row = new_row + num_tokens
    if plan.page_stride > 1:
        fields["new_row"] = new_row
        fields["page_offset"] = strided.offset(batch.whole)[None]
        fields["first_row"], end_row = (strided.held(batch.whole, x, plan.page_size) for x in (new_row, end_row))
    first_seen = _first_seen(plan, batch, seq, lowest)
    first_row, kv_len = fields["first_row"], ragged.kv_len[seq]
    if plan.writes:  # later rows of the call are not there yet
        first_seen = jnp.minimum(first_seen, first_row) if plan.attends else first_row
    else:
        end_row = kv_len if ragged.kv_position is not None else jnp.minimum(kv_len, highest + 1)
    first_page = jnp.maximum(first_seen, 0) // plan.page_size
    pages = -(-end_row // plan.page_size) - first_page
    used = (num_tokens > 0) & (pages > 0)  # tokens before row 0 see nothing
    steps = jnp.where(used, -(-pages // plan.pages_per_step), 0)
    index = jnp.arange(len(seq), dtype=jnp.int32)
    # Pairs of items, not cumulative sums: those XLA:TPU writes out, a hundred times as long.
    after = used[None, :] & (index[None, :] > index[:, None])
    following = jnp.min(jnp.where(after, index[None, :], len(seq)), axis=1)
    steps_before = jnp.sum(jnp.where(index[None, :] < index[:, None], steps[None, :], 0), axis=1, dtype=jnp.int32)
    return Items(
        **{name: field.astype(jnp.int32) for name, field in fields.items()},
        num_tokens=jnp.where(used, num_tokens, 0).astype(jnp.int32),
        end_row=end_row.astype(jnp.int32),
        first_page=first_page,
        slot=steps_before % kernel.SLOTS,
        following=jnp.where(following < len(seq), following, -1).astype(jnp.int32),
    )


def _first_seen(plan: Plan, batch: Batch, seq: jax.Array, lowest: jax.Array) -> jax.Array:
    """i32[items]: the first row that any of an item's tokens sees."""
    if plan.bounded:
        return lowest
    if plan.window is None:
        return jnp.zeros_like(lowest)
    gone = lowest - plan.window  # the highest position that has slid out
    kv_position = batch.here.kv_position
    if kv_position is None:
        return gone + 1
    in_use = jnp.arange(kv_position.shape[1]) < batch.here.kv_len[seq][:, None]
    return jnp.sum(in_use & (kv_position[seq] <= gone[:, None]), axis=1, dtype=jnp.int32)


def _plan(
    phase: str,
    q: Any,
    kv: MosaicKV,
    rules: dict[str, Any],
    batch: Batch,
    *,
    q_rows: Callable[[int], int],
    decode_lanes: int | None = None,
) -> Plan:
    """Block sizes for a phase: those measured for the device, or the defaults. `q_rows`: of a block of tokens."""
    spec, device = kv.spec, devices.current()
    if device.platform != "tpu":
        device = devices.named("v5e")  # interpreted: the smallest
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise UnsupportedError(f"q dtype {q.dtype} is not one of bfloat16, float32, which TPUs compute in")
    q_heads = q.shape[1]
    blocks = {} if decode_lanes else {"tokens": _prefill_tokens(spec, q_heads, q.shape[0], device)}
    tokens = blocks.get("tokens", batch.whole.width)
    seen_rows = batch.here.page_table.shape[1] * spec.page_size
    if batch.span is not None:
        seen_rows = min(seen_rows, batch.span + tokens)
    default = {"pages_per_step": _pages_per_step(spec, q_heads, tokens, seen_rows, device), **blocks}
    sizes = tuning.block_sizes(
        "attention.mosaic_tpu",
        device,
        default,
        phase=phase if rules.get("attends", True) else f"write {phase}",
        dtype=q.dtype.name,
        kv_dtype=kv.dtype,
        q_heads=q_heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        page_size=spec.page_size,
        window=batch.span,
    )
    tokens = decode_lanes or sizes["tokens"]
    token_lanes = max(tokens, LANES)
    if token_lanes % LANES or token_lanes % tokens or (token_lanes % spec.page_size and spec.page_size % token_lanes):
        raise ValueError(
            f"tokens {tokens} must divide {LANES} or be a multiple of it, and fit pages of {spec.page_size}"
        )
    splits = _splits(spec, device)
    bf16 = q.dtype == jnp.bfloat16 and kv.dtype != "float32"
    return Plan(
        kv_heads=spec.kv_heads // splits,
        splits=splits,
        group=q_heads // spec.kv_heads,
        head_dim=spec.head_dim,
        page_size=spec.page_size,
        kv_dtype=kv.dtype,
        compute=jnp.bfloat16 if bf16 else jnp.float32,
        q_rows=q_rows(tokens),
        token_lanes=token_lanes,
        pages_per_step=sizes["pages_per_step"],
        vmem_bytes=_vmem_budget(device) * 3 // 2,
        bounded=batch.first is not None,
        page_stride=batch.whole.page_stride,
        **rules,
    )


def _pages_per_step(spec: KVSpec, q_heads: int, tokens: int, seen_rows: int, device: Device) -> int:
    """Pages for about 512 rows or 2 MiB, so that copies are long and the matrix unit is full; no more than are seen."""
    page_bytes = spec.page_size * spec.token_bytes
    pages = max(1, min(512 // spec.page_size, 2 * MIB // page_bytes, -(-seen_rows // spec.page_size)))
    while pages > 1 and _vmem_bytes(spec, q_heads, tokens, pages) // _splits(spec, device) > _vmem_budget(device):
        pages -= 1
    return pages


def _prefill_tokens(spec: KVSpec, q_heads: int, num_tokens: int, device: Device) -> int:
    """Tokens per query block: about 512 query rows per KV head, as far as they fit; whole pages or a part of one."""
    fits = lambda n: _vmem_bytes(spec, q_heads, n, 1) // _splits(spec, device) <= _vmem_budget(device)
    tokens = LANES
    while tokens < min(512 * spec.kv_heads // q_heads, num_tokens) and fits(2 * tokens):
        tokens *= 2
    while tokens > LEAST_TOKENS and not fits(tokens):
        tokens //= 2
    return tokens if tokens <= LANES or tokens % spec.page_size == 0 or spec.page_size % tokens == 0 else LANES


def _splits(spec: KVSpec, device: Device) -> int:
    """Cores that share the KV heads."""
    return device.num_cores if spec.kv_heads % device.num_cores == 0 else 1


def _vmem_budget(device: Device) -> int:
    """What blocks are planned for; the compiler gets half as much again for what it spills."""
    return device.fast_memory_bytes // 2


def _vmem_bytes(spec: KVSpec, q_heads: int, tokens: int, pages: int) -> int:
    """About what a step keeps in VMEM: page buffers, new rows, and per query row q, out, sums and scores."""
    row_bytes = 12 * _round_up(spec.head_dim, LANES) + 8 * LANES  # bfloat16 q and out twice, f32 sum; maximum, total
    scores_bytes = 12 * pages * spec.page_size * tokens * q_heads // spec.kv_heads
    stored_rows = kernel.SLOTS * (pages * spec.page_size + tokens)
    return tokens * q_heads * row_bytes + scores_bytes + stored_rows * spec.token_bytes
