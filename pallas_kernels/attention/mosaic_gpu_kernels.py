"""The Hopper kernel of paged attention: one producer warpgroup streams pages, the others multiply.

Hides shared memory, barriers and the tensor cores. It sees tiles of query rows of one KV head of one sequence and
nothing of batches; prefill and decode differ in the numbers of a `Plan` alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import KVSpec

WARPGROUP_ROWS = 64  # the M of a wgmma
SWIZZLE_BYTES = 128  # the width of a swizzled tile in shared memory
FLOOR = -1e30  # the running maximum of a row that has seen nothing: finite, so that exp2(-inf - FLOOR) is 0, not NaN
REDUCTION_BYTES = 512  # of shared memory: rows lie within warps, so that no reduction crosses them
RESERVED_BYTES = REDUCTION_BYTES + 1536  # barriers and alignment too
CLEARED = 2048  # values that are cleared at a time: 8 registers, as the loading warpgroup has few
LOG2_E = math.log2(math.e)
SEQ, BEGIN, END, FULL_BEGIN, FULL_END, KV_LEN = range(6)  # columns of a tile's bounds


@dataclass(frozen=True)
class Plan:
    """What is static about one call: the mask's rules and how the work is cut."""

    window: int | None
    softcap: float | None
    scale: float
    consumers: int  # warpgroups that multiply
    streams: int  # 1: consumers share K/V and own 64 query rows each; consumers: each reads its own part of the K/V
    splits: int  # parts of the K/V rows in separate work items; there are `splits * streams` partial results
    block: int  # K/V rows per step
    slots: int  # blocks a stream can hold in shared memory
    programs: int  # persistent thread blocks
    probabilities: str  # the route from softmax to the second product: "registers" | "smem"
    bounded: bool = False  # whether query rows come with the first K/V row they see, which then no window says

    @property
    def rows(self) -> int:
        """Query rows of a tile."""
        return WARPGROUP_ROWS * (self.consumers // self.streams)

    @property
    def parts(self) -> int:
        return self.splits * self.streams

    @property
    def takes_turns(self) -> bool:
        """Whether one warpgroup's softmax runs while the other multiplies (FlashAttention-3, section 3.1)."""
        return self.streams == 1 and self.consumers == 2


def attend_tiles(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    table: jax.Array,
    bounds: jax.Array,
    position: jax.Array,
    plan: Plan,
) -> tuple[jax.Array, jax.Array]:
    """Attention of every tile of query rows, in `plan.parts` partial results that merge by log-sum-exp.

    `q [tiles, kv_heads, rows, head_dim]` with `rows` a multiple of 8 up to `plan.rows`; `keys, values [pages, kv_heads,
    page_size, head_dim]`; `table i32[seqs, pages_per_seq]`; `bounds i32[tiles, 6]`; `position i32[tiles, plan.rows]`,
    and where `plan.bounded` as many columns more: the first K/V row that each query row sees.
    Returns `out [tiles, kv_heads, parts, rows, head_dim]`, `lse f32[tiles, kv_heads, parts, plan.rows]`.
    """
    tiles, kv_heads, rows, head_dim = q.shape
    out_dtype = q.dtype if plan.parts == 1 else jnp.float32
    kernel = plgpu.kernel(
        lambda *refs: _block(Refs(*refs), plan),
        out_type=(
            jax.ShapeDtypeStruct((tiles, kv_heads, plan.parts, rows, head_dim), out_dtype),
            jax.ShapeDtypeStruct((tiles, kv_heads, plan.parts, plan.rows), jnp.float32),
        ),
        scratch_types=_scratch(plan, keys.shape[2], head_dim, keys.dtype, out_dtype),
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=plan.consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=REDUCTION_BYTES),
    )
    return kernel(q, keys, values, table, bounds, position)


@dataclass(frozen=True)
class Refs:
    """The kernel's arrays, its shared memory and its barriers; `ring` = streams * slots."""

    q: Any  # GMEM, as attend_tiles takes and returns them
    keys: Any
    values: Any
    table: Any
    bounds: Any
    position: Any
    out: Any
    lse: Any
    q_tile: Any  # SMEM [rows / 64, 64, head_dim]
    k_ring: Any  # SMEM [ring, block, head_dim]
    v_ring: Any
    weights: Any  # SMEM [consumers, 64, block], or None where they stay in registers
    out_stage: Any  # SMEM [consumers, 64, values of a swizzled row]
    lse_stage: Any  # SMEM f32[consumers, 64]
    q_full: Any
    q_empty: Any
    k_full: Any  # [ring]
    k_empty: Any
    v_full: Any
    v_empty: Any
    v_raw: Any  # rows that nobody wrote have arrived with a page, and have yet to be cleared
    turn: Any  # both of two warpgroups that take turns have come to the end of theirs


def _scratch(plan: Plan, page_size: int, head_dim: int, dtype: Any, out_dtype: Any) -> list[Any]:
    """What Refs lists after the outputs, in its order."""
    ring, readers = plan.streams * plan.slots, plan.consumers // plan.streams
    copies = plan.block // min(plan.block, page_size)
    weights = plgpu.SMEM((plan.consumers, WARPGROUP_ROWS, plan.block), dtype, transforms=_swizzled(dtype))
    return [
        plgpu.SMEM((readers, WARPGROUP_ROWS, head_dim), dtype, transforms=_swizzled(dtype)),
        plgpu.SMEM((ring, plan.block, head_dim), dtype, transforms=_swizzled(dtype)),
        plgpu.SMEM((ring, plan.block, head_dim), dtype, transforms=_swizzled(dtype)),
        weights if plan.probabilities == "smem" else None,
        plgpu.SMEM((plan.consumers, WARPGROUP_ROWS, _chunk(out_dtype)), out_dtype, transforms=_swizzled(out_dtype)),
        plgpu.SMEM((plan.consumers, WARPGROUP_ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=readers),
        plgpu.Barrier(num_arrivals=plan.consumers),
        plgpu.Barrier(num_arrivals=copies, num_barriers=ring),
        plgpu.Barrier(num_arrivals=readers, num_barriers=ring),
        plgpu.Barrier(num_arrivals=copies, num_barriers=ring),
        plgpu.Barrier(num_arrivals=readers, num_barriers=ring),
        plgpu.Barrier(num_arrivals=copies),
        plgpu.Barrier(num_arrivals=plan.consumers),
    ]


def _swizzled(dtype: Any) -> tuple[Any, ...]:
    """How wgmma and the copy engine want matrices in shared memory: tiles of 8 rows x 128 bytes, swizzled."""
    tiling = plgpu.TilingTransform((8, _chunk(dtype)))  # type: ignore[abstract]
    return tiling, plgpu.SwizzleTransform(SWIZZLE_BYTES)  # type: ignore[abstract]


def _chunk(dtype: Any) -> int:
    """Values in a swizzled tile's row."""
    return SWIZZLE_BYTES // jnp.dtype(dtype).itemsize


def smem_bytes(plan: Plan, spec: KVSpec) -> int:
    """Shared memory of one thread block: what `_scratch` lists, reductions and barriers."""
    value_bytes = jnp.dtype(spec.dtype).itemsize
    ring = 2 * plan.streams * plan.slots * plan.block * spec.head_dim
    weights = plan.consumers * WARPGROUP_ROWS * plan.block if plan.probabilities == "smem" else 0
    stage = plan.consumers * WARPGROUP_ROWS * (SWIZZLE_BYTES + 4)
    return (ring + plan.rows * spec.head_dim + weights) * value_bytes + stage + RESERVED_BYTES


def _block(refs: Refs, plan: Plan) -> None:
    """One thread block: the last warpgroup loads, the others multiply, until all work items are done."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < plan.consumers)
    def _() -> None:
        if plan.consumers > 1:
            plgpu.set_max_registers(232, action="increase")
        _consume(refs, plan, warpgroup)

    @pl.when(warpgroup == plan.consumers)
    def _() -> None:
        if plan.consumers > 1:
            plgpu.set_max_registers(40, action="decrease")
        _produce(refs, plan)


def _for_each_item(refs: Refs, plan: Plan, body: Any, init: Any) -> Any:
    """`carry = body(i, tile, head, split, carry)` over this program's work items; returns the last carry.

    The last tiles see the most rows of their sequence, so they come first; and every other wave goes backwards, so
    that no program always gets the longest item of a wave.
    """
    tiles, kv_heads = refs.out.shape[:2]
    items, programs = tiles * kv_heads * plan.splits, plan.programs
    waves = pl.cdiv(items, programs)
    program = lax.axis_index("program")

    def index(wave: Any) -> Any:
        return wave * programs + jnp.where(lax.rem(wave, 2) == 0, program, programs - 1 - program)

    def step(wave: Any, carry: Any) -> Any:
        item = index(wave)
        tile = tiles - 1 - lax.div(item, kv_heads * plan.splits)
        return body(wave, tile, lax.rem(lax.div(item, plan.splits), kv_heads), lax.rem(item, plan.splits), carry)

    last_exists = index(jnp.int32(waves - 1)) < items
    return lax.fori_loop(0, waves - 1 + last_exists.astype(jnp.int32), step, init)


def _blocks_of(refs: Refs, plan: Plan, tile: Any, part: Any) -> tuple[Any, Any]:
    """Blocks [first, end) of one part of what a tile sees."""
    first = lax.div(refs.bounds[tile, BEGIN], plan.block)
    end = lax.div(refs.bounds[tile, END] + (plan.block - 1), plan.block)
    share = lax.div(end - first + (plan.parts - 1), plan.parts)
    begin = jnp.minimum(first + part * share, end)
    return begin, jnp.minimum(begin + share, end)


def _produce(refs: Refs, plan: Plan) -> None:
    """Copy each item's queries and pages into shared memory, as far ahead as the rings allow."""

    def item(i: Any, tile: Any, head: Any, split: Any, steps: tuple[Any, ...]) -> tuple[Any, ...]:
        pl.when(i > 0)(lambda: plgpu.barrier_wait(refs.q_empty))
        rows = min(refs.q.shape[2], WARPGROUP_ROWS)
        for reader in range(plan.rows // WARPGROUP_ROWS):
            source = refs.q.at[tile, head, pl.ds(reader * WARPGROUP_ROWS, rows)]
            plgpu.copy_gmem_to_smem(source, refs.q_tile.at[reader, pl.ds(0, rows)], refs.q_full)
        ranges = [_blocks_of(refs, plan, tile, split * plan.streams + stream) for stream in range(plan.streams)]
        counts = [end - first for first, end in ranges]

        def load(j: Any, _: None) -> None:
            for stream, (first, _end) in enumerate(ranges):
                copy = lambda s=stream, f=first: _load_block(refs, plan, tile, head, f + j, s, steps[s] + j)
                pl.when(j < counts[stream])(copy)

        longest = counts[0]
        for count in counts[1:]:
            longest = jnp.maximum(longest, count)
        lax.fori_loop(0, longest, load, None)
        return tuple(step + count for step, count in zip(steps, counts, strict=True))

    steps = _for_each_item(refs, plan, item, (jnp.int32(0),) * plan.streams)
    plgpu.barrier_wait(refs.q_empty)  # leave no barrier with a phase that nobody saw
    for stream, step in enumerate(steps):
        for slot in range(plan.slots):
            for empty in (refs.k_empty, refs.v_empty):
                wait = lambda barrier=empty.at[stream * plan.slots + slot]: plgpu.barrier_wait(barrier)
                pl.when(step > slot)(wait)


def _load_block(refs: Refs, plan: Plan, tile: Any, head: Any, block: Any, stream: int, step: Any) -> None:
    """Copy one block's pages into a stream's next slot; V comes without NaN in rows that nobody wrote."""
    slot = stream * plan.slots + lax.rem(step, plan.slots)
    begin, kv_len = block * plan.block, refs.bounds[tile, KV_LEN]
    pieces = _pieces(refs, plan, tile, begin)
    used_before = step >= plan.slots

    pl.when(used_before)(lambda: plgpu.barrier_wait(refs.k_empty.at[slot]))
    _copy(refs.keys, head, pieces, refs.k_ring.at[slot], refs.k_full.at[slot])
    pl.when(used_before)(lambda: plgpu.barrier_wait(refs.v_empty.at[slot]))
    # a weight of 0 does not hide a NaN: the unwritten tail and what slid out of the window must be cleared
    clean = (begin >= refs.bounds[tile, BEGIN]) & (begin + plan.block <= kv_len)

    @pl.when(clean)
    def _() -> None:
        _copy(refs.values, head, pieces, refs.v_ring.at[slot], refs.v_full.at[slot])

    @pl.when(jnp.logical_not(clean))
    def _() -> None:
        _copy(refs.values, head, pieces, refs.v_ring.at[slot], refs.v_raw)
        plgpu.barrier_wait(refs.v_raw)
        _clear_rows(refs.v_ring.at[slot], refs.bounds[tile, BEGIN] - begin, kv_len - begin)
        for _ in pieces:
            plgpu.barrier_arrive(refs.v_full.at[slot])


def _pieces(refs: Refs, plan: Plan, tile: Any, begin: Any) -> list[tuple[Any, Any]]:
    """Where rows [begin, begin + block) of a tile's sequence lie, in pieces of one page: its number, row in it."""
    page_size = refs.keys.shape[2]
    span = min(page_size, plan.block)
    seq, last_column = refs.bounds[tile, SEQ], refs.table.shape[1] - 1
    rows = [begin + first for first in range(0, plan.block, span)]
    columns = [jnp.minimum(lax.div(row, page_size), last_column) for row in rows]  # a block may reach past the last
    offsets = [pl.multiple_of(lax.rem(row, page_size), span) for row in rows]
    return [(refs.table[seq, column], offset) for column, offset in zip(columns, offsets, strict=True)]


def _copy(pool: Any, head: Any, pieces: list[tuple[Any, Any]], target: Any, barrier: Any) -> None:
    """Start copying the pieces of a block, each of which arrives at `barrier`."""
    span = target.shape[0] // len(pieces)
    for i, (page, offset) in enumerate(pieces):
        source = pool.at[page, head, pl.ds(offset, span)]
        plgpu.copy_gmem_to_smem(source, target.at[pl.ds(i * span, span)], barrier)


def _clear_rows(target: Any, begin: Any, end: Any) -> None:
    """Zero the rows of a slot outside [begin, end), and let the tensor cores see it."""
    rows, head_dim = target.shape
    shape = (CLEARED // head_dim, head_dim)
    layout = plgpu.Layout.SMEM_GMEM_COPY(shape, target.dtype, SWIZZLE_BYTES)
    for first in range(0, rows, shape[0]):
        part = target.at[pl.ds(first, shape[0])]

        @pl.when((first < begin) | (first + shape[0] > end))
        def _(part: Any = part, first: int = first) -> None:
            row = first + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
            old = plgpu.load(part, layout=layout)
            part[...] = jnp.where((row >= begin) & (row < end), old, jnp.zeros_like(old))

    plgpu.commit_smem()


def _consume(refs: Refs, plan: Plan, warpgroup: Any) -> None:
    """Online softmax of 64 query rows over the blocks of a stream, item after item."""
    shared = plan.streams == 1
    reader, stream = (warpgroup, 0) if shared else (0, warpgroup)
    head_dim = refs.q.shape[-1]

    def item(_i: Any, tile: Any, head: Any, split: Any, step: Any) -> Any:
        part = split * plan.streams + stream
        first, end = _blocks_of(refs, plan, tile, part)
        plgpu.barrier_wait(refs.q_full)
        position = _of_rows(refs, tile, 0, reader)
        since = _of_rows(refs, tile, plan.rows, reader) if plan.bounded else None

        def attend(masked: bool, block: Any, state: Any) -> Any:
            slot = stream * plan.slots + lax.rem(step + block - first, plan.slots)
            mask = (block * plan.block, position, since, refs.bounds[tile, KV_LEN]) if masked else None
            return _attend_block(refs, plan, warpgroup, reader, slot, state, mask)

        # blocks [full_begin, full_end) are seen by all rows of the tile
        full_begin = lax.div(refs.bounds[tile, FULL_BEGIN] + (plan.block - 1), plan.block)
        full_begin = jnp.clip(full_begin, first, end)
        full_end = jnp.clip(lax.div(refs.bounds[tile, FULL_END], plan.block), full_begin, end)
        state = _empty(head_dim)
        # half a step apart: the second warpgroup begins when the first has issued its first product
        pl.when(warpgroup == 1)(lambda: _end_turn(refs, plan))
        if plan.window is not None or plan.bounded:
            state = lax.fori_loop(first, full_begin, partial(attend, True), state)
        state = lax.fori_loop(full_begin, full_end, partial(attend, False), state)
        state = lax.fori_loop(full_end, end, partial(attend, True), state)
        pl.when(warpgroup == 0)(lambda: _end_turn(refs, plan))
        plgpu.barrier_arrive(refs.q_empty)
        _emit(refs, warpgroup, state, (tile, head, part), reader)
        return step + end - first

    _for_each_item(refs, plan, item, jnp.int32(0))


def _of_rows(refs: Refs, tile: Any, first: int, reader: Any) -> Any:
    """What `position` has, from column `first` on, for the 64 query rows of a warpgroup."""
    columns = refs.position.at[tile, pl.ds(first + reader * WARPGROUP_ROWS, WARPGROUP_ROWS)]
    return plgpu.load(columns, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _end_turn(refs: Refs, plan: Plan) -> None:
    """Let the other warpgroup multiply, or wait until it lets this one; nothing where they do not take turns."""
    if plan.takes_turns:
        plgpu.barrier_arrive(refs.turn)
        plgpu.barrier_wait(refs.turn)


def _empty(head_dim: int) -> tuple[Any, Any, Any]:
    """(weighted values, running maximum in log2 units, running total) of 64 rows that have seen nothing."""
    by_row = plgpu.Layout.WGMMA.reduce(1)
    return (
        plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, head_dim), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), FLOOR, jnp.float32), by_row),
        plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), by_row),
    )


def _attend_block(
    refs: Refs, plan: Plan, warpgroup: Any, reader: Any, slot: Any, state: tuple[Any, Any, Any], mask: Any
) -> tuple[Any, Any, Any]:
    """One step of online softmax over the block in `slot`; `mask`: what `_seen` takes, None where all is seen."""
    weighted, highest, total = state
    shape = (WARPGROUP_ROWS, plan.block)

    def scores_of(scores: Any) -> Any:
        plgpu.wgmma(scores, refs.q_tile.at[reader], refs.k_ring.at[slot].transpose((1, 0)))
        _end_turn(refs, plan)
        return scores[...]

    plgpu.barrier_wait(refs.k_full.at[slot])
    scores = pl.run_scoped(scores_of, plgpu.ACC(shape, jnp.float32))
    plgpu.barrier_arrive(refs.k_empty.at[slot])
    unit = plan.scale * LOG2_E  # scores stay unscaled, so that the exponent below is one multiply-add
    if plan.softcap is not None:
        scores = jnp.tanh(scores * (plan.scale / plan.softcap))
        unit = plan.softcap * LOG2_E
    if mask is not None:
        scores = jnp.where(_seen(plan, shape, *mask), scores, -jnp.inf)
    above = jnp.maximum(highest, jnp.max(scores, axis=1) * unit)
    weights = jnp.exp2(scores * unit - lax.broadcast_in_dim(above, shape, [0]))
    shrink = jnp.exp2(highest - above)
    total = total * shrink + jnp.sum(weights, axis=1)
    weighted = weighted * lax.broadcast_in_dim(shrink, weighted.shape, [0])
    weighted = _add_weighted(refs, plan, warpgroup, slot, weighted, weights.astype(refs.v_ring.dtype))
    plgpu.barrier_arrive(refs.v_empty.at[slot])
    return weighted, above, total


def _seen(plan: Plan, shape: tuple[int, int], begin: Any, position: Any, since: Any, kv_len: Any) -> Any:
    """bool[64, block]: which rows each query row sees."""
    row = begin + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    query = lax.broadcast_in_dim(position, shape, [0])
    seen = (row <= query) & (row < kv_len)
    if plan.bounded:
        seen &= row >= lax.broadcast_in_dim(since, shape, [0])
    return seen if plan.window is None else seen & (row > query - plan.window)


def _add_weighted(refs: Refs, plan: Plan, warpgroup: Any, slot: Any, weighted: Any, weights: Any) -> Any:
    """`weighted + weights @ V`. From registers the sum stays in the tensor cores' accumulator."""
    values = refs.v_ring.at[slot]
    if plan.probabilities == "registers":
        plgpu.barrier_wait(refs.v_full.at[slot])
        _end_turn(refs, plan)
        accumulate = lambda sums: plgpu.wgmma(sums, weights, values)
        return pl.run_state(accumulate)(plgpu.ACC.init(weighted))
    stage = refs.weights.at[warpgroup]
    stage[...] = weights
    plgpu.commit_smem()
    plgpu.barrier_wait(refs.v_full.at[slot])
    _end_turn(refs, plan)

    def product(sums: Any) -> Any:
        plgpu.wgmma(sums, stage, values)
        return sums[...]

    return weighted + pl.run_scoped(product, plgpu.ACC(weighted.shape, jnp.float32))


def _emit(refs: Refs, warpgroup: Any, state: tuple[Any, Any, Any], target: Any, reader: Any) -> None:
    """Write a part's result and log-sum-exp, through shared memory."""
    weighted, highest, total = state
    used = total != 0  # a NaN stays one
    inverse = jnp.where(used, 1.0 / jnp.where(used, total, 1.0), 0.0)
    lse = jnp.where(used, highest / LOG2_E + jnp.log(jnp.where(used, total, 1.0)), -jnp.inf)
    refs.lse_stage.at[warpgroup][...] = lse
    out = (weighted * lax.broadcast_in_dim(inverse, weighted.shape, [0])).astype(refs.out.dtype)
    rows = min(refs.q.shape[2], WARPGROUP_ROWS)
    stage, first = refs.out_stage.at[warpgroup], reader * WARPGROUP_ROWS
    width = stage.shape[1]
    for column in range(0, out.shape[1], width):
        stage[...] = out[:, column : column + width]
        plgpu.commit_smem()
        target_rows = refs.out.at[(*target, pl.ds(first, rows), pl.ds(column, width))]
        plgpu.copy_smem_to_gmem(stage.at[pl.ds(0, rows)], target_rows)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.copy_smem_to_gmem(refs.lse_stage.at[warpgroup], refs.lse.at[(*target, pl.ds(first, WARPGROUP_ROWS))])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
