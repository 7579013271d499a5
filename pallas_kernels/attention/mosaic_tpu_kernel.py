"""The Mosaic kernel of paged attention on TPUs: one body for decode and prefill, over a list of work items.

Hides the page pipeline (asynchronous copies that run ahead across items), how new rows enter their pages in VMEM, and
the online softmax. Tokens lie along lanes everywhere, so that nothing changes layout between HBM and the matrix unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SLOTS = 2  # page buffers: one computed on, one being filled
UNROLLED_ROWS = 128  # query rows, over KV heads, whose steps the compiler may interleave: one head of a few rows idles
MASKED = -1e30  # the score of a row that is not visible
LOWEST = MASKED / 2  # what the running maximum begins with: exp(MASKED - LOWEST) is 0, not NaN


@dataclass(frozen=True)
class Plan:
    """What is static about one call; `kv_heads` is what one core handles of `splits` times as many."""

    kv_heads: int
    splits: int
    group: int  # query heads per KV head
    head_dim: int
    page_size: int
    kv_dtype: str  # of KVSpec
    compute: Any  # bfloat16 or float32: what enters the matrix unit
    q_rows: int  # rows of a query block: (token, query head of the group), token-major, padded
    token_lanes: int  # packed tokens per block of new rows
    pages_per_step: int
    window: int | None
    softcap: float | None
    scale: float
    vmem_bytes: int
    writes: bool  # whether the call brings new rows
    attends: bool = True  # whether it has queries
    bounded: bool = False  # whether tokens come with the first row they see
    page_stride: int = 1  # columns of the whole page table from one page that lies here to the next

    @property
    def step_rows(self) -> int:
        """K/V rows a step attends to."""
        return self.pages_per_step * self.page_size

    @property
    def precision(self) -> lax.Precision:
        return lax.Precision.HIGHEST if self.compute == jnp.float32 else lax.Precision.DEFAULT


class Items(NamedTuple):
    """Work items, i32[items] each: consecutive tokens of one sequence against its pages; unused with no tokens."""

    q_block: Any  # ascending; an output block is written once, after its last item
    token_block: Any  # where the tokens' positions, ancestors and new rows are
    seq: Any
    first_token: Any  # lane of the first token in its token block
    num_tokens: Any
    first_lane: Any  # lane of the token that row 0 of the query block stands for
    first_row: Any  # the first token's row among the sequence's that lie here; the others follow, or lie elsewhere
    end_row: Any  # one past the last row that any token sees; where rows are written, past the last token's own
    first_page: Any  # first column of the page table that any token sees
    query_row: Any  # the sequence's first query token's row: bit 0 of `ancestors`
    slot: Any  # buffer of the first step
    following: Any  # the next used item, -1 for none
    new_row: Any = None  # the first token's row in its whole sequence, where that is not first_row
    page_offset: Any = None  # i32[1]: the first column of the whole page table that lies here


class Inputs(NamedTuple):
    """Blocks and pools of one call; None where a call has none."""

    table: Any  # SMEM i32[1, pages_per_seq]: the item's sequence
    next_table: Any  # SMEM i32[1, pages_per_seq]: the following item's
    sinks: Any  # SMEM f32[q_heads]
    tokens: Any  # i32[words, token_lanes]: position, the first row seen where bounded, then words of ancestors
    q: Any  # [kv_heads, q_rows, head_dim]
    new: Any  # [kv_heads, 2 * rows, token_lanes]: K above V, as the pool holds them
    new_scales: Any  # f32[kv_heads, 2, token_lanes]
    positions: Any  # i32[pages_per_seq, page_size]: kv_position of the item's sequence
    pool: Any  # HBM [pages, splits * kv_heads, 2 * rows, page_size]
    scales: Any  # HBM f32[pages, splits * kv_heads, 2, page_size]


class Outputs(NamedTuple):
    """`pool` and `scales` are the inputs' own memory; None where nothing is written."""

    out: Any  # [kv_heads, q_rows, head_dim]; None, as lse, where there are no queries
    lse: Any  # f32[kv_heads, lines, LANES]: query row r at line r // LANES, lane r % LANES
    pool: Any
    scales: Any


class Scratch(NamedTuple):
    """VMEM that lives across steps and items."""

    pages: Any  # [SLOTS, pages_per_step, kv_heads, 2 * rows, page_size]
    scales: Any  # f32[SLOTS, pages_per_step, kv_heads, 2, page_size] | None
    highest: Any  # f32[kv_heads, q_rows, LANES], equal along lanes
    total: Any  # f32[kv_heads, q_rows, LANES], equal along lanes
    weighted: Any  # f32[kv_heads, q_rows, head_dim]
    columns: Any  # i32[words, q_rows, LANES]: the block's tokens turned into a column, equal along lanes
    arrived: Any  # DMA semaphores [SLOTS]
    written: Any  # DMA semaphore


@dataclass(frozen=True)
class Work:
    """Everything the body of one item needs."""

    plan: Plan
    items: Items
    inputs: Inputs
    outputs: Outputs
    scratch: Scratch
    split: Any  # i32: which share of the KV heads
    item: Any  # i32

    @property
    def first_row(self) -> Any:
        return self.items.first_row[self.item]

    @property
    def end_row(self) -> Any:
        return self.items.end_row[self.item]

    def end_page(self, item: Any) -> Any:
        return pl.cdiv(self.items.end_row[item], self.plan.page_size)

    def token_shift(self, column: Any) -> Any:
        """The lane, in the page of a column, of the token at lane 0 of the token block."""
        new_row = self.first_row
        if self.plan.page_stride > 1:
            new_row = self.items.new_row[self.item]
            column = column * self.plan.page_stride + self.items.page_offset[0]
        return new_row - self.items.first_token[self.item] - column * self.plan.page_size

    @property
    def num_steps(self) -> Any:
        """0 for an unused item."""
        pages = self.end_page(self.item) - self.items.first_page[self.item]
        return jnp.where(self.items.num_tokens[self.item] > 0, pl.cdiv(pages, self.plan.pages_per_step), 0)

    def pools(self) -> Iterator[tuple[Any, Any]]:
        """(HBM, VMEM) of the values and, where pages are quantized, of the scales."""
        source = self.outputs if self.plan.writes else self.inputs
        yield source.pool, self.scratch.pages
        if source.scales is not None:
            yield source.scales, self.scratch.scales

    def transfers(self, page: Any, slot: Any, place: Any) -> Iterator[tuple[Any, Any]]:
        """(HBM, VMEM) of this core's heads of a page that is the `place`-th of a step."""
        heads = pl.ds(self.split * self.plan.kv_heads, self.plan.kv_heads)
        for pool, buffer in self.pools():
            yield pool.at[page, heads], buffer.at[slot, place]


def body(items: Items, inputs: Inputs, outputs: Outputs, scratch: Scratch, *, plan: Plan) -> None:
    """One work item; the grid is (splits, items)."""
    item, last = pl.program_id(1), pl.num_programs(1) - 1
    work = Work(plan, items, inputs, outputs, scratch, pl.program_id(0), item)
    before, after = jnp.maximum(item - 1, 0), jnp.minimum(item + 1, last)
    if plan.attends:
        pl.when((item == 0) | (items.q_block[before] != items.q_block[item]))(partial(_begin, work))
    pl.when(item == 0)(partial(_prime, work))
    lax.fori_loop(0, work.num_steps, lambda step, _: _step(work, step), None)
    if plan.attends:
        pl.when((item == last) | (items.q_block[after] != items.q_block[item]))(partial(_finish, work))


def _begin(work: Work) -> None:
    """A new query block: empty softmax, and its tokens turned from lanes into a column."""
    plan, scratch = work.plan, work.scratch
    scratch.highest[...] = jnp.full(scratch.highest.shape, LOWEST, jnp.float32)
    scratch.total[...] = jnp.zeros(scratch.total.shape, jnp.float32)
    scratch.weighted[...] = jnp.zeros(scratch.weighted.shape, jnp.float32)
    lane = lax.broadcasted_iota(jnp.int32, (plan.q_rows, plan.token_lanes), 1)
    mine = lane == _token_lane(work, (plan.q_rows, plan.token_lanes))
    for word in range(scratch.columns.shape[0]):
        row = work.inputs.tokens[pl.ds(word, 1), :]  # [1, token_lanes]
        # One lane is selected, so the sums of its halves are exact in the float32 lane reduction.
        low = jnp.sum(jnp.where(mine, (row & 0xFFFF).astype(jnp.float32), 0.0), axis=1, keepdims=True)
        high = jnp.sum(jnp.where(mine, ((row >> 16) & 0xFFFF).astype(jnp.float32), 0.0), axis=1, keepdims=True)
        column = low.astype(jnp.int32) | (high.astype(jnp.int32) << 16)
        scratch.columns[word] = jnp.broadcast_to(column, scratch.columns.shape[1:])


def _token_lane(work: Work, shape: tuple[int, int]) -> jax.Array:
    """i32 of `shape [q_rows, ...]`: the lane, in its token block, of the token a query row stands for."""
    return work.items.first_lane[work.item] + lax.broadcasted_iota(jnp.int32, shape, 0) // work.plan.group


def _prime(work: Work) -> None:
    """The first copies of all: nobody was there to start them ahead."""
    used = work.items.num_tokens[work.item] > 0
    pl.when(used)(lambda: _fetch(work, 0))
    pl.when(jnp.logical_not(used))(lambda: _fetch_following(work, True))


def _copies(work: Work, item: Any, step: Any, table: Any, act: Callable[[Any], None]) -> None:
    """`act` on the copy of every page that `step` of `item` reads, found in `table`, the item's row of page numbers."""
    slot = (work.items.slot[item] + step) % SLOTS
    first = work.items.first_page[item] + step * work.plan.pages_per_step  # column of the page at place 0

    def copy(place: Any, _: None) -> None:
        for hbm, vmem in work.transfers(table[0, first + place], slot, place):
            act(pltpu.make_async_copy(hbm, vmem, work.scratch.arrived.at[slot]))

    lax.fori_loop(0, jnp.minimum(work.plan.pages_per_step, work.end_page(item) - first), copy, None)


def _fetch(work: Work, step: Any) -> None:
    _copies(work, work.item, step, work.inputs.table, lambda copy: copy.start())


def _fetch_following(work: Work, allowed: Any) -> None:
    """Start copying the first pages of the next used item, if there is one."""
    following = work.items.following[work.item]
    start = partial(_copies, work, following, 0, work.inputs.next_table, lambda copy: copy.start())
    pl.when((following >= 0) & allowed)(start)


def _step(work: Work, step: Any) -> None:
    """Attend to `pages_per_step` pages while the next ones arrive and the ones that got new rows leave."""
    plan, items = work.plan, work.items
    slot = (items.slot[work.item] + step) % SLOTS
    is_last = step == work.num_steps - 1
    pl.when(jnp.logical_not(is_last))(lambda: _fetch(work, step + 1))
    following = jnp.maximum(items.following[work.item], 0)
    reads_what_is_written = jnp.bool_(False)
    if work.plan.writes:  # the following block of the same sequence may begin with a page that is still being written
        same = items.seq[following] == items.seq[work.item]
        reads_what_is_written = same & (
            items.first_page[following] + plan.pages_per_step > work.first_row // plan.page_size
        )
    _fetch_following(work, is_last & jnp.logical_not(reads_what_is_written))
    _copies(work, work.item, step, work.inputs.table, lambda copy: copy.wait())
    _complete(work, step, slot)
    if work.plan.writes:
        _write_back(work, step, slot, lambda copy: copy.start())
    if work.plan.attends:
        _attend(work, step, slot)
    if work.plan.writes:
        _write_back(work, step, slot, lambda copy: copy.wait())
        _fetch_following(work, is_last & reads_what_is_written)


def _complete(work: Work, step: Any, slot: Any) -> None:
    """Put the item's new rows into the step's pages, and zeros where nothing is written yet.

    New rows are consecutive in both the token block and the page, so a rotation along lanes puts them in place: exact
    for every dtype, and no other sequence's NaN can enter. Zeros keep 0 * NaN of unwritten rows out of the sums.
    """
    plan = work.plan
    first = work.items.first_page[work.item] + step * plan.pages_per_step
    changed_from = (work.first_row if work.plan.writes else work.end_row) // plan.page_size
    copied = jnp.minimum(plan.pages_per_step, work.end_page(work.item) - first)

    def complete(n: Any, _: None) -> None:
        place, h = n // plan.kv_heads, n % plan.kv_heads
        _complete_head(work, slot, place, h, first + place)

    def clear(place: Any, _: None) -> None:
        for _, buffer in work.pools():
            buffer[slot, place] = jnp.zeros(buffer.shape[2:], buffer.dtype)

    lax.fori_loop(jnp.maximum(changed_from - first, 0) * plan.kv_heads, copied * plan.kv_heads, complete, None)
    lax.fori_loop(copied, plan.pages_per_step, clear, None)


def _complete_head(work: Work, slot: Any, place: Any, h: Any, column: Any) -> None:
    """One head of the page in a column of the table."""
    inputs, size = work.inputs, work.plan.page_size
    row = column * size + lax.broadcasted_iota(jnp.int32, (1, size), 1)
    is_old, is_new = row < work.first_row, (row >= work.first_row) & (row < work.end_row)
    for (_, buffer), new in zip(work.pools(), (inputs.new, inputs.new_scales), strict=False):
        old = pltpu.bitcast(buffer[slot, place, h], jnp.int32)
        if new is None:
            page = jnp.where(row < work.end_row, old, 0)
        else:
            rotated = _rotated(new[h], work.token_shift(column), size)
            page = jnp.where(is_new, rotated, jnp.where(is_old, old, 0))
        buffer[slot, place, h] = pltpu.bitcast(page, buffer.dtype)


def _rotated(rows: jax.Array, shift: Any, page_size: int) -> jax.Array:
    """`rows [n, token_lanes]` as 32-bit words, token t at lane (t + shift) mod token_lanes of `page_size`."""
    words = pltpu.bitcast(rows, jnp.int32)
    if words.shape[1] < page_size:
        words = jnp.concatenate([words] * (page_size // words.shape[1]), axis=1)
    return pltpu.roll(words, jnp.mod(shift, words.shape[1]), 1)[:, :page_size]


def _write_back(work: Work, step: Any, slot: Any, act: Callable[[Any], None]) -> None:
    """`act` on the copy to the pool of every page of the step that got new rows."""
    plan = work.plan
    first = work.items.first_page[work.item] + step * plan.pages_per_step

    def copy(place: Any, _: None) -> None:
        for hbm, vmem in work.transfers(work.inputs.table[0, first + place], slot, place):
            act(pltpu.make_async_copy(vmem, hbm, work.scratch.written))

    lowest = jnp.maximum(work.first_row // plan.page_size - first, 0)
    lax.fori_loop(lowest, jnp.minimum(plan.pages_per_step, work.end_page(work.item) - first), copy, None)


def _attend(work: Work, step: Any, slot: Any) -> None:
    """One step of the online softmax, head by head."""
    plan, scratch = work.plan, work.scratch
    mine = _mine(work)
    visible = mine & _visible(work, step)

    def side_by_side(buffer: Any, h: Any) -> jax.Array:
        return jnp.concatenate([buffer[slot, place, h] for place in range(plan.pages_per_step)], axis=1)

    def head(h: Any, _: None) -> None:
        keys, values = widen(side_by_side(scratch.pages, h), plan)
        scores = _dot(work.inputs.q[h].astype(plan.compute), keys, 0, plan) * plan.scale
        scales = None if scratch.scales is None else side_by_side(scratch.scales, h)  # f32[2, step_rows]
        if scales is not None:
            scores *= scales[0:1]
        if plan.softcap is not None:
            scores = plan.softcap * jnp.tanh(scores / plan.softcap)
        scores = jnp.where(visible, scores, MASKED)
        before = scratch.highest[h][:, :1]
        highest = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - highest)
        shrink = jnp.exp(before - highest)
        total = scratch.total[h][:, :1] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        if scales is not None:
            weights *= scales[1:2]
        gained = _dot(weights.astype(plan.compute), values, 1, plan)
        gained = jnp.where(mine, gained, 0.0)  # 0 * NaN of this sequence must not enter the block's other sequences
        scratch.weighted[h] = scratch.weighted[h] * shrink + gained
        scratch.highest[h] = jnp.broadcast_to(highest, scratch.highest.shape[1:])
        scratch.total[h] = jnp.broadcast_to(total, scratch.total.shape[1:])

    lax.fori_loop(0, plan.kv_heads, head, None, unroll=max(1, min(plan.kv_heads, UNROLLED_ROWS // plan.q_rows)))


def _dot(x: jax.Array, y: jax.Array, contracted: int, plan: Plan) -> jax.Array:
    """f32 product over the lanes of `x` and axis `contracted` of `y`."""
    dimensions = (((1,), (contracted,)), ((), ()))
    return lax.dot_general(x, y, dimensions, precision=plan.precision, preferred_element_type=jnp.float32)


def _mine(work: Work) -> jax.Array:
    """bool[q_rows, 1]: which query rows stand for tokens of the item."""
    token = _token_lane(work, (work.plan.q_rows, 1)) - work.items.first_token[work.item]
    return (token >= 0) & (token < work.items.num_tokens[work.item])


def _visible(work: Work, step: Any) -> jax.Array:
    """bool[q_rows, step_rows]: which rows of the step each query row of the item sees."""
    plan, items, item = work.plan, work.items, work.item
    column = items.first_page[item] + step * plan.pages_per_step
    row = column * plan.page_size + lax.broadcasted_iota(jnp.int32, (1, plan.step_rows), 1)
    position = row if work.inputs.positions is None else _positions(work, column)
    query = work.scratch.columns[0][:, :1]  # [q_rows, 1]
    visible = (position <= query) & (row < work.end_row)
    if plan.window is not None:
        visible &= position > query - plan.window
    if plan.bounded:
        visible &= row >= work.scratch.columns[1][:, :1]
    node = row - items.query_row[item]
    first_word = 2 if plan.bounded else 1
    for word in range(first_word, work.scratch.columns.shape[0]):
        bits = work.scratch.columns[word][:, :1]
        seen = (lax.shift_right_logical(*jnp.broadcast_arrays(bits, node & 31)) & 1) == 1
        visible &= seen | (node < 0) | (node // 32 != word - first_word)
    return visible


def _positions(work: Work, column: Any) -> jax.Array:
    """i32[1, step_rows]: the positions of the rows of a step's pages."""
    last = work.inputs.positions.shape[0] - 1
    places = range(work.plan.pages_per_step)
    return jnp.concatenate([work.inputs.positions[pl.ds(jnp.minimum(column + p, last), 1), :] for p in places], axis=1)


def widen(stored: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """K and V `[head_dim, tokens]` in the compute dtype, of `[2 * rows, tokens]` as a page holds them."""
    if plan.kv_dtype in ("int4", "float8_e4m3fn"):  # held as bytes; a byte's two int4 are neighbours in head_dim
        stored = pltpu.bitcast(stored, jnp.dtype(plan.kv_dtype))
    wide = stored.astype(plan.compute)
    return wide[: plan.head_dim], wide[plan.head_dim :]


def _finish(work: Work) -> None:
    """Normalise a query block that has seen all its rows; rows that saw nothing give 0 and -inf."""
    plan, scratch, outputs = work.plan, work.scratch, work.outputs

    def head(h: Any, _: None) -> None:
        highest, total, weighted = scratch.highest[h], scratch.total[h], scratch.weighted[h]
        used = total != 0  # [q_rows, LANES]; NaN counts: it must be seen
        if work.inputs.sinks is not None:
            sink = _sink_column(work, h)
            above = jnp.maximum(highest, sink)
            shrink = jnp.exp(highest - above)
            weighted *= shrink[:, :1]
            total = jnp.where(used, total * shrink + jnp.exp(sink - above), total)
            highest = above
        divisor = jnp.where(used, total, 1.0)
        outputs.out[h] = (weighted / divisor[:, :1]).astype(outputs.out.dtype)
        _store_lse(outputs.lse, h, jnp.where(used, highest + jnp.log(divisor), -jnp.inf))

    lax.fori_loop(0, plan.kv_heads, head, None)


def _sink_column(work: Work, h: Any) -> jax.Array:
    """f32[q_rows, LANES]: the sink of each query row's head."""
    plan = work.plan
    member = lax.broadcasted_iota(jnp.int32, (plan.q_rows, LANES), 0) % plan.group
    first = (work.split * plan.kv_heads + h) * plan.group
    column = jnp.zeros((plan.q_rows, LANES), jnp.float32)
    for g in range(plan.group):
        column = jnp.where(member == g, work.inputs.sinks[first + g], column)
    return column


def _store_lse(target: Any, h: Any, lse: jax.Array) -> None:
    """`lse f32[q_rows, LANES]`, equal along lanes, turned into `target[h]`: each diagonal block gives LANES rows."""
    for line in range(target.shape[1]):
        part = lse[line * LANES : (line + 1) * LANES]
        diagonal = lax.broadcasted_iota(jnp.int32, part.shape, 0) == lax.broadcasted_iota(jnp.int32, part.shape, 1)
        target[h, line : line + 1, :] = jnp.sum(jnp.where(diagonal, part, 0.0), axis=0, keepdims=True)


def call(
    items: Items, inputs: Inputs, *, plan: Plan
) -> tuple[jax.Array | None, jax.Array | None, jax.Array, jax.Array | None]:
    """Run the kernel on whole arrays: tables `[seqs, 1, pages_per_seq]`, positions `[seqs, pages_per_seq, page_size]`,
    q `[q_blocks, kv_heads, q_rows, head_dim]`, tokens and new rows with all tokens in their last axis.

    Returns out like q, lse `f32[q_blocks, kv_heads, LANES * n]` (None without queries), and the pools after the call.
    """
    pool = pl.BlockSpec(memory_space=pl.ANY)
    out_shape, out_specs = _output_blocks(inputs, plan, pool)
    num_before = len(jax.tree.leaves((items, inputs._replace(pool=None, scales=None))))
    num_pools = len(jax.tree.leaves((inputs.pool, inputs.scales)))
    num_results = 2 if plan.attends else 0
    (out,) = pl.pallas_call(
        partial(body, plan=plan),
        out_shape=[out_shape],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(plan.splits, items.seq.shape[0]),
            in_specs=[_input_blocks(inputs, plan, pool)],
            out_specs=[out_specs],
            scratch_shapes=[_scratch(inputs, plan)],
        ),
        input_output_aliases={num_before + n: num_results + n for n in range(num_pools)} if plan.writes else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=plan.vmem_bytes
        ),
        name=f"paged_attention_{plan.kv_dtype}" if plan.attends else f"paged_write_{plan.kv_dtype}",
    )(items, inputs)
    after = out if plan.writes else inputs
    lse = None if out.lse is None else out.lse.reshape(*out.lse.shape[:2], -1)
    return out.out, lse, after.pool, after.scales


def _output_blocks(inputs: Inputs, plan: Plan, pool: Any) -> tuple[Outputs, Outputs]:
    """Shapes and BlockSpecs of the results that the call has."""
    pools = (_shape_of(inputs.pool), _shape_of(inputs.scales)) if plan.writes else (None, None)
    specs = tuple(None if x is None else pool for x in pools)
    if not plan.attends:
        return Outputs(None, None, *pools), Outputs(None, None, *specs)
    lines = pl.cdiv(plan.q_rows, LANES)
    lse = jax.ShapeDtypeStruct((*inputs.q.shape[:2], lines, LANES), jnp.float32)
    lse_block = pl.BlockSpec((None, plan.kv_heads, lines, LANES), lambda c, i, items: (items.q_block[i], c, 0, 0))
    return Outputs(_shape_of(inputs.q), lse, *pools), Outputs(_q_block(inputs, plan), lse_block, *specs)


def _q_block(inputs: Inputs, plan: Plan) -> Any:
    return pl.BlockSpec((None, plan.kv_heads, *inputs.q.shape[2:]), lambda c, i, items: (items.q_block[i], c, 0, 0))


def _shape_of(x: jax.Array | None) -> Any:
    return None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype)


def _input_blocks(inputs: Inputs, plan: Plan, pool: Any) -> Inputs:
    """The BlockSpec of each input that the call has."""
    _, _, pages_per_seq = inputs.table.shape
    row = (None, 1, pages_per_seq)
    after = lambda items, i: jnp.maximum(items.following[i], 0)
    words, rows = (0 if x is None else x.shape[axis] for x, axis in ((inputs.tokens, 0), (inputs.new, 1)))
    new = lambda size: pl.BlockSpec(
        (plan.kv_heads, size, plan.token_lanes), lambda c, i, items: (c, 0, items.token_block[i])
    )
    specs = Inputs(
        table=pl.BlockSpec(row, lambda c, i, items: (items.seq[i], 0, 0), memory_space=pltpu.SMEM),
        next_table=pl.BlockSpec(row, lambda c, i, items: (items.seq[after(items, i)], 0, 0), memory_space=pltpu.SMEM),
        sinks=pl.BlockSpec(memory_space=pltpu.SMEM),
        tokens=pl.BlockSpec((words, plan.token_lanes), lambda c, i, items: (0, items.token_block[i])),
        q=_q_block(inputs, plan) if plan.attends else None,
        new=new(rows),
        new_scales=new(2),
        positions=pl.BlockSpec((None, pages_per_seq, plan.page_size), lambda c, i, items: (items.seq[i], 0, 0)),
        pool=pool,
        scales=pool,
    )
    return Inputs(*(None if array is None else spec for array, spec in zip(inputs, specs, strict=True)))


def _scratch(inputs: Inputs, plan: Plan) -> Scratch:
    _, _, rows, _ = inputs.pool.shape
    buffer = lambda n, dtype: pltpu.VMEM((SLOTS, plan.pages_per_step, plan.kv_heads, n, plan.page_size), dtype)
    pages = Scratch(
        pages=buffer(rows, inputs.pool.dtype),
        scales=None if inputs.scales is None else buffer(2, jnp.float32),
        highest=None,
        total=None,
        weighted=None,
        columns=None,
        arrived=pltpu.SemaphoreType.DMA((SLOTS,)),
        written=pltpu.SemaphoreType.DMA(()),
    )
    if not plan.attends:
        return pages
    column = pltpu.VMEM((plan.kv_heads, plan.q_rows, LANES), jnp.float32)
    return pages._replace(
        highest=column,
        total=column,
        weighted=pltpu.VMEM((plan.kv_heads, plan.q_rows, plan.head_dim), jnp.float32),
        columns=pltpu.VMEM((inputs.tokens.shape[0], plan.q_rows, LANES), jnp.int32),
    )
