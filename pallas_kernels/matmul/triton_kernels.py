"""The Triton kernel of products with quantized weights: stored values are read once and widened in registers.

Scales wait until after the dots: values are exact in the operands' type, scaled ones would not be. Nibbles become
bfloat16 by bits and one addition, two at a time (Kim et al. 2022, arXiv 2211.10017; Marlin, arXiv 2408.11743).
"""

# mypy: disable-error-code=no-untyped-def
# (Triton finds out its arguments' types when it compiles)

import triton
import triton.language as tl

# Four bytes of two's-complement nibbles -> two registers of low ones, two of high ones. Two bytes are spread over
# 16-bit lanes; a nibble n, its sign bit flipped, becomes the last bits of 128 (f16: 1024), hence 136 + n, less 136.
_WIDEN_NIBBLES = """
{{
    .reg .b32 even, odd, one, offset;
    prmt.b32 even, $4, 0, 0x4140;
    prmt.b32 odd, $4, 0, 0x4342;
    mov.b32 one, {one};
    mov.b32 offset, {offset};
    lop3.b32 $0, even, 0x000F000F, {base}, 0x6A;
    lop3.b32 $1, odd, 0x000F000F, {base}, 0x6A;
    shr.b32 even, even, 4;
    shr.b32 odd, odd, 4;
    lop3.b32 $2, even, 0x000F000F, {base}, 0x6A;
    lop3.b32 $3, odd, 0x000F000F, {base}, 0x6A;
    fma.rn.{type} $0, $0, one, offset;
    fma.rn.{type} $1, $1, one, offset;
    fma.rn.{type} $2, $2, one, offset;
    fma.rn.{type} $3, $3, one, offset;
}}
"""
BF16_NIBBLES = tl.constexpr(
    _WIDEN_NIBBLES.format(type="bf16x2", base="0x43084308", one="0x3F803F80", offset="0xC308C308")
)
F16_NIBBLES = tl.constexpr(
    _WIDEN_NIBBLES.format(type="f16x2", base="0x64086408", one="0x3C003C00", offset="0xE408E408")
)


@triton.jit
def multiply(
    x,  # [rows, IN_SIZE]
    weight,  # int8, fp8 or x's type [..., OUT_SIZE, IN_SIZE], or uint8 [..., OUT_SIZE, IN_SIZE / 2]
    scales,  # f32 or bf16 [..., IN_SIZE / GROUP, OUT_SIZE], where HAS_SCALES
    row_scales,  # f32[rows], where HAS_ROW_SCALES
    tiles,  # i32[tiles, 3], where OWNERS: whose weight, first row, row after the last
    rows,
    out,  # [splits, rows, OUT_SIZE]: sums over each split's inputs
    IN_SIZE: tl.constexpr,
    OUT_SIZE: tl.constexpr,
    OWNERS: tl.constexpr,  # of weights, one each; 0: there is one weight, and tiles follow one another
    GROUP: tl.constexpr,  # inputs that share a scale; IN_SIZE: one scale per output
    HALF: tl.constexpr,  # inputs in the low nibbles of a block, which the block's high ones follow; 0: not packed
    PTX: tl.constexpr,  # whether the device runs the assembly above
    HAS_SCALES: tl.constexpr,
    HAS_ROW_SCALES: tl.constexpr,
    INTEGER: tl.constexpr,  # x and weight are multiplied as int8
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    STEP: tl.constexpr,  # stored values of a row of weight that are read together
    STEPS: tl.constexpr,  # of one split
):
    """A tile of OUTS outputs (grid axis 0) and ROWS rows (1), summed over one split of the inputs (2)."""
    STORED: tl.constexpr = IN_SIZE // 2 if HALF else IN_SIZE
    split = tl.program_id(2)
    begin = split * STEPS
    end = tl.minimum(begin + STEPS, tl.cdiv(STORED, STEP))
    if OWNERS:
        tile = tiles + tl.program_id(1) * 3
        owner, first_row, rows_end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
        end = tl.where((owner < OWNERS) & (first_row < rows_end), end, begin)  # rows of nobody give zeros
        weight += owner.to(tl.int64) * (OUT_SIZE * STORED)
        scales += owner.to(tl.int64) * (IN_SIZE // GROUP * OUT_SIZE)
    else:
        first_row, rows_end = tl.program_id(1) * ROWS, rows
    output = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    row = first_row + tl.arange(0, ROWS)
    inside = tl.arange(0, STEP)
    in_rows, in_outs = row < rows_end, output < OUT_SIZE
    x_row = x + row[:, None].to(tl.int64) * IN_SIZE
    weight_row = weight + output[None, :].to(tl.int64) * STORED
    acc = tl.zeros([ROWS, OUTS], tl.int32 if INTEGER else tl.float32)
    if GROUP < IN_SIZE:
        low_scale, high_scale = _scales(scales, begin, output, in_outs & (begin < end), GROUP, HALF, OUT_SIZE, STEP)
    for step in tl.range(begin, end):
        stored_at = step * STEP + inside
        in_row = stored_at < STORED
        stored = tl.load(weight_row + stored_at[:, None], mask=in_outs[None, :] & in_row[:, None], other=0.0)
        first = _first_input(step, HALF, STEP) + inside
        x_mask = in_rows[:, None] & in_row[None, :]
        x_low = tl.load(x_row + first[None, :], mask=x_mask, other=0.0)
        if GROUP < IN_SIZE:  # the next step's: they come while this one is computed
            more = in_outs & (step + 1 < end)
            next_low, next_high = _scales(scales, step + 1, output, more, GROUP, HALF, OUT_SIZE, STEP)
        if HALF:
            x_high = tl.load(x_row + (first + HALF)[None, :], mask=x_mask, other=0.0)
            low, high = _nibbles(stored, x.dtype.element_ty, PTX)
            if GROUP < IN_SIZE:
                acc += tl.dot(x_low, low) * low_scale[None, :]
                acc += tl.dot(x_high, high) * high_scale[None, :]
            else:
                acc = tl.dot(x_high, high, tl.dot(x_low, low, acc))
        elif GROUP < IN_SIZE:
            acc += tl.dot(x_low, stored.to(x.dtype.element_ty)) * low_scale[None, :]
        elif INTEGER:
            acc = tl.dot(x_low, stored, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(x_low, stored.to(x.dtype.element_ty), acc, max_num_imprecise_acc=STEP)
        if GROUP < IN_SIZE:
            low_scale, high_scale = next_low, next_high

    product = acc.to(tl.float32)
    if HAS_SCALES and GROUP == IN_SIZE:
        scale_mask = in_outs & (begin < end)  # nobody has scales
        product *= tl.load(scales + output, mask=scale_mask, other=0.0).to(tl.float32)[None, :]
    if HAS_ROW_SCALES:
        product *= tl.load(row_scales + row, mask=in_rows, other=0.0)[:, None]
    at = (split * rows + row).to(tl.int64)[:, None] * OUT_SIZE + output[None, :]
    tl.store(out + at, product.to(out.dtype.element_ty), mask=in_rows[:, None] & in_outs[None, :])


@triton.jit
def _first_input(step, HALF: tl.constexpr, STEP: tl.constexpr):
    """The input that a step's first stored value, or its low nibble, belongs to.

    Written so that Triton sees a multiple of STEP: it fetches ahead only what is aligned.
    """
    if HALF == 0:
        first = step * STEP
    elif HALF == STEP:
        first = step * (2 * STEP)
    else:
        PER_HALF: tl.constexpr = HALF // STEP
        first = (step // PER_HALF * (2 * PER_HALF) + step % PER_HALF) * STEP
    return first


@triton.jit
def _scales(
    scales,
    step,
    output,
    mask,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    OUT_SIZE: tl.constexpr,
    STEP: tl.constexpr,
):
    """f32[OUTS] twice: the scales of a step's values or low nibbles, and of its high nibbles."""
    first = _first_input(step, HALF, STEP)
    low = tl.load(scales + first // GROUP * OUT_SIZE + output, mask=mask, other=0.0)
    high = low
    if HALF:
        high = tl.load(scales + (first + HALF) // GROUP * OUT_SIZE + output, mask=mask, other=0.0)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _nibbles(stored, dtype: tl.constexpr, PTX: tl.constexpr):
    """uint8 -> the low nibbles and the high ones, as numbers between -8 and 7 of type `dtype`."""
    if PTX and dtype == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            BF16_NIBBLES, "=r,=r,=r,=r,r", [stored], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    elif PTX:
        low, high = tl.inline_asm_elementwise(
            F16_NIBBLES, "=r,=r,=r,=r,r", [stored], (tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        signed = stored.to(tl.int8, bitcast=True)
        low, high = ((signed << 4) >> 4).to(dtype), (signed >> 4).to(dtype)
    return low, high
