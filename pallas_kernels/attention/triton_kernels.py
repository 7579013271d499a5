"""The Triton kernels of paged attention: `attend`, a tile of queries against a range of K/V rows, and `merge`.

A tile holds every query head of one KV head for some tokens of one sequence, so that a K/V row is read once for all of
them. Softmax is online and in base 2 (Milakov & Gimelshein 2018; FlashAttention-2, Dao 2023); ranges of rows run side
by side and are merged by log-sum-exp (Flash-Decoding, Dao et al. 2023).
"""

# mypy: disable-error-code=no-untyped-def
# (Triton finds out its arguments' types when it compiles)

import triton
import triton.language as tl

MASKED = tl.constexpr(-1e30)  # finite: what was summed before the first visible row is later multiplied by exp(-huge)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INT32_MAX = tl.constexpr(2147483647)


@triton.jit
def attend(
    q,  # [tokens, Q_HEADS, HEAD_DIM]
    keys,  # [pages, KV_HEADS, PAGE_SIZE, HEAD_DIM], or uint8 with HEAD_DIM / 2 bytes a row
    values,
    key_scales,  # f32[pages, KV_HEADS, PAGE_SIZE], where QUANTIZED
    value_scales,
    items,  # i32[items, 5]: sequence, first token, token after the last, queries of the sequence, its kv_len
    page_table,  # i32[seqs, pages_per_seq]
    q_position,  # i32[tokens]
    q_first,  # i32[tokens]: the first row each sees, where HAS_FIRST
    kv_position,  # i32[seqs, position_rows], where HAS_POSITIONS
    ancestors,  # u32[tokens, WORDS], where WORDS
    sinks,  # f32[Q_HEADS], where HAS_SINKS
    pages_per_seq,
    position_rows,
    first_token,  # the token that `out` begins with
    num_tokens,  # of `out`
    out,  # [splits, num_tokens, Q_HEADS, HEAD_DIM], normalized
    lse,  # f32[splits, num_tokens, Q_HEADS]
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PACKED: tl.constexpr,  # int4: two values a byte, the second half of the head in the high nibbles
    QUANTIZED: tl.constexpr,
    COMPUTE: tl.constexpr,  # what a dot's operands are
    HAS_FIRST: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    WORDS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: all rows
    SOFTCAP: tl.constexpr,  # 0: none
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,  # of the tile: tokens x query heads of a KV head, padded
    BLOCK: tl.constexpr,  # K/V rows per step
    LANES: tl.constexpr,  # values of a row that are read together, padded
    SPLITS: tl.constexpr,
    LEAST_BLOCKS: tl.constexpr,  # of a split
):
    """One tile (grid axis 0) of one KV head (1) against one split of its sequence's rows (2)."""
    kv_head = tl.program_id(1)
    item = items + tl.program_id(0) * 5
    sequence = tl.load(item)
    first = tl.load(item + 1)
    stop = tl.load(item + 2)
    kv_len = tl.load(item + 4)
    first_row = kv_len - tl.load(item + 3)  # of the queries of this call

    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    ROW_VALUES: tl.constexpr = HEAD_DIM // 2 if PACKED else HEAD_DIM  # that lie side by side
    tile_row = tl.arange(0, ROWS)
    token = first + tile_row // GROUP
    head = kv_head * GROUP + tile_row % GROUP
    valid = token < stop
    query = tl.load(q_position + token, mask=valid, other=-1)
    if HAS_FIRST:
        since = tl.load(q_first + token, mask=valid, other=INT32_MAX)
    lane = tl.arange(0, LANES)
    in_head = lane < ROW_VALUES
    q_row = q + (token.to(tl.int64) * Q_HEADS + head)[:, None] * HEAD_DIM + lane[None, :]
    q_mask = valid[:, None] & in_head[None, :]
    q_low = tl.load(q_row, mask=q_mask, other=0.0).to(COMPUTE)
    acc_low = tl.zeros([ROWS, LANES], tl.float32)
    if PACKED:
        q_high = tl.load(q_row + ROW_VALUES, mask=q_mask, other=0.0).to(COMPUTE)
        acc_high = tl.zeros([ROWS, LANES], tl.float32)
    highest = tl.full([ROWS], MASKED, tl.float32)
    total = tl.zeros([ROWS], tl.float32)

    # rows [begin, end) are those that some query of the tile may see: nothing else is read
    begin = 0
    end = tl.where(stop > first, kv_len, 0)
    if not HAS_POSITIONS:
        end = tl.minimum(end, tl.max(query, 0) + 1)
        if WINDOW > 0:
            begin = tl.maximum(tl.min(tl.where(valid, query, INT32_MAX), 0) - WINDOW + 1, 0)
        if HAS_FIRST:
            begin = tl.min(since, 0)
    begin_block = begin // BLOCK
    end_block = tl.cdiv(end, BLOCK)
    if SPLITS > 1:
        share = tl.maximum(tl.cdiv(end_block - begin_block, SPLITS), LEAST_BLOCKS)
        begin_block += tl.program_id(2) * share
        end_block = tl.minimum(begin_block + share, end_block)

    for block in tl.range(begin_block, end_block):
        row = block * BLOCK + tl.arange(0, BLOCK)
        used = (row >= begin) & (row < end)
        page = tl.load(page_table + sequence * pages_per_seq + row // PAGE_SIZE, mask=used, other=0)
        pool_row = (page.to(tl.int64) * KV_HEADS + kv_head) * PAGE_SIZE + row % PAGE_SIZE
        offsets = pool_row[:, None] * ROW_VALUES + lane[None, :]
        k = tl.load(keys + offsets, mask=used[:, None] & in_head[None, :], other=0.0)
        if PACKED:
            scores = tl.dot(q_low, tl.trans(_low(k).to(COMPUTE)), input_precision="ieee")
            scores = tl.dot(q_high, tl.trans(_high(k).to(COMPUTE)), scores, input_precision="ieee")
        else:
            scores = tl.dot(q_low, tl.trans(k.to(COMPUTE)), input_precision="ieee")
        if QUANTIZED:
            scores *= tl.load(key_scales + pool_row, mask=used, other=0.0)[None, :]
        if SOFTCAP > 0:
            scores = (SOFTCAP * LOG2_E) * _tanh(scores * (SCALE / SOFTCAP))
        else:
            scores *= SCALE * LOG2_E

        position = row
        if HAS_POSITIONS:
            position = tl.load(kv_position + sequence * position_rows + row, mask=used, other=0)
        seen = used[None, :] & (position[None, :] <= query[:, None])
        if WINDOW > 0:
            seen &= position[None, :] > query[:, None] - WINDOW
        if HAS_FIRST:
            seen &= row[None, :] >= since[:, None]
        if WORDS > 0:  # noqa: SIM102 (the one is decided when this is compiled)
            if (block + 1) * BLOCK > first_row:
                seen &= _in_tree(ancestors, token, row - first_row, seen, WORDS)

        scores = tl.where(seen, scores, MASKED)
        above = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - above[:, None])
        shrink = tl.exp2(highest - above)
        highest = above
        total = total * shrink + tl.sum(weights, 1)
        if HAS_POSITIONS:  # a row that nobody sees, evicted or never written, may hold NaN, and 0 * NaN is NaN
            used = tl.max(seen.to(tl.int32), 0) > 0
        if QUANTIZED:
            weights *= tl.load(value_scales + pool_row, mask=used, other=0.0)[None, :]
        weights = weights.to(COMPUTE)
        v = tl.load(values + offsets, mask=used[:, None] & in_head[None, :], other=0.0)
        if PACKED:
            acc_high = tl.dot(weights, _high(v).to(COMPUTE), acc_high * shrink[:, None], input_precision="ieee")
            acc_low = tl.dot(weights, _low(v).to(COMPUTE), acc_low * shrink[:, None], input_precision="ieee")
        else:
            acc_low = tl.dot(weights, v.to(COMPUTE), acc_low * shrink[:, None], input_precision="ieee")

    # else `total` counts rows that nobody sees; a maximum passes over NaN, which must come out as NaN
    some = (highest > MASKED / 2) | (total != total)
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=valid, other=0.0) * LOG2_E
        above = tl.maximum(highest, sink)
        shrink = tl.exp2(highest - above)
        highest = above
        total = total * shrink + tl.exp2(sink - above)
        acc_low *= shrink[:, None]
        if PACKED:
            acc_high *= shrink[:, None]
    share_of = tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)[:, None]
    log_sum = tl.where(some, (highest + tl.log2(tl.where(some, total, 1.0))) * LN_2, float("-inf"))
    index = (tl.program_id(2).to(tl.int64) * num_tokens + token - first_token) * Q_HEADS + head
    tl.store(lse + index, log_sum, mask=valid)
    kept = valid & some if SPLITS > 1 else valid  # `merge` does not read the output of an empty split
    out_row = out + index[:, None] * HEAD_DIM + lane[None, :]
    out_mask = kept[:, None] & in_head[None, :]
    tl.store(out_row, (acc_low * share_of).to(out.dtype.element_ty), mask=out_mask)
    if PACKED:
        tl.store(out_row + ROW_VALUES, (acc_high * share_of).to(out.dtype.element_ty), mask=out_mask)


@triton.jit
def merge(
    parts,  # f32[splits, tokens, q_heads, HEAD_DIM]
    part_lse,  # f32[splits, tokens, q_heads]
    sinks,  # f32[q_heads], where HAS_SINKS
    num_tokens,
    q_heads,
    out,  # [tokens, q_heads, HEAD_DIM]
    lse,  # f32[tokens, q_heads]
    HEAD_DIM: tl.constexpr,
    LANES: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """One query head (grid axis 1) of one token (0): the splits' outputs, weighted by their sums of exponentials."""
    head = tl.program_id(1)
    index = tl.program_id(0).to(tl.int64) * q_heads + head
    split = tl.arange(0, PADDED_SPLITS).to(tl.int64)
    lane = tl.arange(0, LANES)
    at = split * num_tokens * q_heads + index
    sums = tl.load(part_lse + at, mask=split < SPLITS, other=float("-inf"))
    used = sums != float("-inf")  # a sum of NaN is: it must come out as NaN, and a maximum passes over it
    some = tl.max(used.to(tl.int32), 0) > 0
    highest = tl.max(sums, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head)
        highest = tl.maximum(highest, sink)
    highest = tl.where(some, highest, 0.0)
    weights = tl.exp2((sums - highest) * LOG2_E)
    total = tl.sum(weights, 0)
    if HAS_SINKS:
        total += tl.exp2((sink - highest) * LOG2_E)
    total = tl.where(some, total, 1.0)
    mask = used[:, None] & (lane < HEAD_DIM)[None, :]
    part = tl.load(parts + at[:, None] * HEAD_DIM + lane[None, :], mask=mask, other=0.0)
    result = tl.sum(part * (weights / total)[:, None], 0)
    tl.store(out + index * HEAD_DIM + lane, result.to(out.dtype.element_ty), mask=lane < HEAD_DIM)
    tl.store(lse + index, tl.where(some, highest + tl.log2(total) * LN_2, float("-inf")))


@triton.jit
def _in_tree(ancestors, token, node, seen, WORDS: tl.constexpr):
    """int1[ROWS, BLOCK]: which of the query tokens `node` each token sees; rows before those have node < 0."""
    bit = tl.minimum(tl.maximum(node, 0), 32 * WORDS - 1)
    words = ancestors + token[:, None] * WORDS + (bit // 32)[None, :]
    word = tl.load(words, mask=seen & (node >= 0)[None, :], other=0)
    return (node < 0)[None, :] | (((word >> (bit % 32)[None, :].to(tl.uint32)) & 1) == 1)


@triton.jit
def _low(packed):
    """The low nibbles of bytes, as signed integers."""
    return (packed.to(tl.int8, bitcast=True) << 4) >> 4


@triton.jit
def _high(packed):
    return packed.to(tl.int8, bitcast=True) >> 4


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2 * LOG2_E)))
