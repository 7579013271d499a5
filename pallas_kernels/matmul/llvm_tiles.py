"""LLVM IR that multiplies bfloat16 rows by bfloat16 weights `[out, in]`, or uint8 by int8, on one core.

Hides the instruction set, register blocking, prefetching and the order of additions. Every output is one accumulator
vector that walks along `in`, then a fixed tree over its lanes. So the bits of a row do not depend on which tile it
fell into, hence neither on the number of rows nor on the number of cores.
"""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.native.code import Code, constants, round_to_bf16, splat, sum_lanes

OUTS = 4  # rows of weight per tile, and vectors that one lane reduction sums at once
NEAR_BYTES = 512  # how far ahead in its own row a weight is fetched into L1
X_BYTES = 1 << 18  # of x that stay in a core's L2 while weights stream past
LEAST_ROWS = 16  # of x at a time, however long its rows are: fewer would read weights too often
MANY_BLOCKS = 9  # row blocks from which on arithmetic is the limit: weights are fetched at leisure
L1 = 3  # locality of llvm.prefetch


@dataclass(frozen=True)
class Isa:
    """An instruction set seen from here."""

    bf16_dot: bool  # AVX512-BF16's vdpbf16ps; else bfloat16 is widened and multiplied in float32
    lanes: int  # 32-bit values per vector
    tile_rows: int  # rows of x per tile: tile_rows * OUTS accumulators fit the registers
    most_rows: int | None  # where XLA's dot gets faster; None: nowhere
    integers: bool = False  # uint8 times int8 by AVX512-VNNI's vpdpbusd, else bfloat16

    @property
    def value_bytes(self) -> int:
        """Of an operand."""
        return 1 if self.integers else 2

    @property
    def step(self) -> int:
        """Operand values per vector."""
        return 4 * self.lanes // self.value_bytes

    @property
    def value(self) -> str:
        return f"i{8 * self.value_bytes}"

    @property
    def vector(self) -> str:
        return f"<{self.step} x {self.value}>"

    @property
    def acc(self) -> str:
        return f"<{self.lanes} x {self.out}>"

    @property
    def out(self) -> str:
        return "i32" if self.integers else "float"

    @property
    def words(self) -> str:
        return f"<{self.lanes} x i32>"


AVX512_BF16 = Isa(bf16_dot=True, lanes=16, tile_rows=4, most_rows=None)
AMX_HOST = Isa(
    bf16_dot=True, lanes=16, tile_rows=4, most_rows=32
)  # XLA has matrix units there, which this does not use
AVX512 = Isa(bf16_dot=False, lanes=16, tile_rows=4, most_rows=32)
AVX2 = Isa(bf16_dot=False, lanes=8, tile_rows=2, most_rows=32)
NEON = Isa(bf16_dot=False, lanes=4, tile_rows=4, most_rows=32)
AVX512_VNNI = Isa(bf16_dot=False, lanes=16, tile_rows=4, most_rows=None, integers=True)


def module(isa: Isa) -> str:
    """IR of `@panel(x, w, out, rows, in, outs, out_stride, wide)`: `outs` outputs of `rows` rows.

    `x` and `w` are bfloat16 rows of `in` values; `out` is float32 if `wide`, else bfloat16, `out_stride` values a row.
    With integers `x` is uint8 that stands for values 128 less, `w` is int8, and `out` is int32.
    """
    variants = [(rows, outs, ahead) for rows in range(1, isa.tile_rows + 1) for outs, ahead in _shapes()]
    tiles = (_tile(isa, *variant) for variant in variants)
    return "\n".join([_declarations(isa), *tiles, _row_group(isa), _panel(isa)])


def _shapes() -> list[tuple[int, int]]:
    """(outs, ahead) of the tiles: `ahead` is how many rows of the next tile are fetched while this one is computed.

    With n row blocks a tile is walked n times, so 1/n of the next one per walk is enough; with few blocks, where
    memory is the limit, more is better, though walks then fetch the same rows again.
    """
    return [(1, 0), (OUTS, 1), (OUTS, 2), (OUTS, OUTS)]


def _declarations(isa: Isa) -> str:
    lines = ["declare void @llvm.prefetch.p0(ptr, i32, i32, i32)"]
    mask = f"<{isa.step} x i1>"
    lines.append(f"declare {isa.vector} {_masked_load(isa)}(ptr, i32, {mask}, {isa.vector})")
    if isa.integers:
        lines.append(f"declare {isa.acc} @llvm.x86.avx512.vpdpbusd.512({isa.acc}, {isa.acc}, {isa.acc})")
    elif isa.bf16_dot:
        vector = f"<{isa.step} x bfloat>"
        lines.append(f"declare {isa.acc} @llvm.x86.avx512bf16.dpbf16ps.512({isa.acc}, {vector}, {vector})")
    else:
        lines.append(f"declare {isa.acc} @llvm.fma.v{isa.lanes}f32({isa.acc}, {isa.acc}, {isa.acc})")
    return "\n".join(lines) + "\n"


def _masked_load(isa: Isa) -> str:
    return f"@llvm.masked.load.v{isa.step}{isa.value}.p0"


def _tile(isa: Isa, rows: int, outs: int, ahead: int) -> str:
    """`rows` rows of x times `outs` rows of weight: one accumulator each, along all of `in`."""
    code = Code()
    count = rows * outs + (outs if isa.integers else 0)  # integers: the weights' sums too
    code.do(f"%row_bytes = mul i64 %in, {isa.value_bytes}", f"%full = and i64 %in, -{isa.step}")
    xs, ws = _row_pointers(code, "%x", rows), _row_pointers(code, "%w", outs)
    nexts = _row_pointers(code, "%next", ahead)
    code.do("%any = icmp ne i64 %full, 0", "br i1 %any, label %loop, label %rest")
    code.label("loop")
    code.do("%k = phi i64 [0, %entry], [%k_next, %loop]")
    code.do(*(f"%a{i} = phi {isa.acc} [zeroinitializer, %entry], [%b{i}, %loop]" for i in range(count)))
    for target in nexts:
        _prefetch(code, code.at(target, isa.value, "%k"))
    if ahead > 1:
        for w in ws:
            _prefetch(code, code.at(code.at(w, isa.value, "%k"), "i8", NEAR_BYTES))
    load = lambda base: code.let(f"load {isa.vector}, ptr {code.at(base, isa.value, '%k')}, align {isa.value_bytes}")
    _accumulate(code, isa, [load(w) for w in ws], [load(x) for x in xs], "a", "b")
    code.do(f"%k_next = add i64 %k, {isa.step}", "%more = icmp ult i64 %k_next, %full")
    code.do("br i1 %more, label %loop, label %rest")
    code.label("rest")
    code.do(*(f"%c{i} = phi {isa.acc} [zeroinitializer, %entry], [%b{i}, %loop]" for i in range(count)))
    code.do("%left = sub i64 %in, %full", "%ragged = icmp ne i64 %left, 0")
    code.do("br i1 %ragged, label %tail, label %reduce")
    code.label("tail")
    _tail(code, isa, ws, xs)
    code.label("reduce")
    code.do(*(f"%e{i} = phi {isa.acc} [%c{i}, %rest], [%d{i}, %tail]" for i in range(count)))
    blocks = [[f"%e{first + c}" for c in range(outs)] for first in range(0, count, outs)]
    sums = [sum_lanes(code, accumulators, isa.lanes, isa.out) for accumulators in blocks]
    if isa.integers:
        _store_integers(code, sums[:-1], sums[-1], outs)
    else:
        _store(code, sums, outs)
    signature = "ptr noalias %x, ptr noalias %w, ptr noalias %out, i64 %in, i64 %out_stride, i1 %wide, ptr %next"
    body = "\n".join(code.lines)
    return f"define internal void {_name(rows, outs, ahead)}({signature}) nounwind {{\nentry:\n{body}\n}}\n"


def _name(rows: int, outs: int, ahead: int) -> str:
    return f"@tile_{rows}x{outs}_{ahead}"


def _row_pointers(code: Code, base: str, count: int) -> list[str]:
    pointers = [base]
    while len(pointers) < count:
        pointers.append(code.at(pointers[-1], "i8", "%row_bytes"))
    return pointers[:count]


def _prefetch(code: Code, pointer: str) -> None:
    code.do(f"call void @llvm.prefetch.p0(ptr {pointer}, i32 0, i32 {L1}, i32 1)")


def _accumulate(code: Code, isa: Isa, ws: list[str], xs: list[str], old: str, new: str) -> None:
    """`%new[r, c] = %old[r, c] + xs[r] * ws[c]`, lane by lane, two products a lane; integers: four, and sums of ws."""
    outs = len(ws)
    if isa.integers:
        as_words = lambda value: code.let(f"bitcast {isa.vector} {value} to {isa.words}")
        ws, xs = [as_words(w) for w in ws], [*(as_words(x) for x in xs), splat(0x01010101, isa.lanes)]
        for i in range(len(xs) * outs):
            operands = f"{isa.acc} %{old}{i}, {isa.words} {xs[i // outs]}, {isa.words} {ws[i % outs]}"
            code.do(f"%{new}{i} = call {isa.acc} @llvm.x86.avx512.vpdpbusd.512({operands})")
        return
    if isa.bf16_dot:
        vector = f"<{isa.step} x bfloat>"
        as_bf16 = lambda value: code.let(f"bitcast {isa.vector} {value} to {vector}")
        ws, xs = [as_bf16(w) for w in ws], [as_bf16(x) for x in xs]
        for i in range(len(xs) * outs):
            operands = f"{isa.acc} %{old}{i}, {vector} {ws[i % outs]}, {vector} {xs[i // outs]}"
            code.do(f"%{new}{i} = call {isa.acc} @llvm.x86.avx512bf16.dpbf16ps.512({operands})")
        return
    middle = f"{new}m"
    for odd, source, target in ((False, old, middle), (True, middle, new)):
        wide_ws = [_widen(code, isa, w, odd) for w in ws]
        for r, x in enumerate(xs):
            wide_x = _widen(code, isa, x, odd)
            for c, w in enumerate(wide_ws):
                i = r * outs + c
                operands = f"{isa.acc} {w}, {isa.acc} {wide_x}, {isa.acc} %{source}{i}"
                code.do(f"%{target}{i} = call {isa.acc} @llvm.fma.v{isa.lanes}f32({operands})")


def _widen(code: Code, isa: Isa, value: str, odd: bool) -> str:
    """The even (or odd) bfloat16 values as float32: a bfloat16 is the upper half of its float32."""
    words = code.let(f"bitcast {isa.vector} {value} to {isa.words}")
    if odd:
        bits = code.let(f"and {isa.words} {words}, {splat(-65536, isa.lanes)}")
    else:
        bits = code.let(f"shl {isa.words} {words}, {splat(16, isa.lanes)}")
    return code.let(f"bitcast {isa.words} {bits} to {isa.acc}")


def _tail(code: Code, isa: Isa, ws: list[str], xs: list[str]) -> None:
    """The last `in % step` values; lanes past the end load zeros and touch no memory."""
    vector = f"<{isa.step} x i32>"
    left = code.let("trunc i64 %left to i32")
    first = code.let(f"insertelement {vector} poison, i32 {left}, i32 0")
    limit = code.let(f"shufflevector {vector} {first}, {vector} poison, {vector} zeroinitializer")
    mask = code.let(f"icmp ult {vector} {constants(list(range(isa.step)))}, {limit}")

    def load(base: str) -> str:
        pointer, align = code.at(base, isa.value, "%full"), isa.value_bytes
        operands = f"ptr {pointer}, i32 {align}, <{isa.step} x i1> {mask}, {isa.vector} zeroinitializer"
        return code.let(f"call {isa.vector} {_masked_load(isa)}({operands})")

    _accumulate(code, isa, [load(w) for w in ws], [load(x) for x in xs], "c", "d")
    code.do("br label %reduce")


def _store(code: Code, sums: list[str], outs: int) -> None:
    """One vector of `outs` results per row, as float32 or rounded to bfloat16."""
    offsets = [code.let(f"mul i64 %out_stride, {r}") for r in range(len(sums))]
    code.do("br i1 %wide, label %store_wide, label %store_narrow")
    code.label("store_wide")
    for offset, value in zip(offsets, sums, strict=True):
        code.do(f"store <{outs} x float> {value}, ptr {code.at('%out', 'float', offset)}, align 4")
    code.do("ret void")
    code.label("store_narrow")
    for offset, value in zip(offsets, sums, strict=True):
        rounded = round_to_bf16(code, value, outs)
        code.do(f"store <{outs} x i16> {rounded}, ptr {code.at('%out', 'i16', offset)}, align 2")
    code.do("ret void")


def _store_integers(code: Code, sums: list[str], weight_sums: str, outs: int) -> None:
    """One vector of `outs` results per row: what the 128 that x is above its values adds is taken away."""
    excess = code.let(f"shl <{outs} x i32> {weight_sums}, {splat(7, outs)}")
    for r, value in enumerate(sums):
        result = code.let(f"sub <{outs} x i32> {value}, {excess}")
        offset = code.let(f"mul i64 %out_stride, {r}")
        code.do(f"store <{outs} x i32> {result}, ptr {code.at('%out', 'i32', offset)}, align 4")
    code.do("ret void")


_SIGNATURE = "ptr %x, ptr %w, ptr %out, i64 %rows, i64 %in, i64 %outs, i64 %out_stride, i1 %wide"


def _panel(isa: Isa) -> str:
    """Groups of rows that fit a core's L2, about equal."""
    return f"""
define internal void @panel({_SIGNATURE}) nounwind {{
entry:
  %value_bytes = select i1 %wide, i64 4, i64 2
  %out_row_bytes = mul i64 %out_stride, %value_bytes
  %row_bytes = mul i64 %in, {isa.value_bytes}
  %fitting = udiv i64 {X_BYTES}, %row_bytes
  %most = call i64 @llvm.umax.i64(i64 %fitting, i64 {LEAST_ROWS})
  %rows_up = add i64 %rows, %most
  %rows_ceil = sub i64 %rows_up, 1
  %groups = udiv i64 %rows_ceil, %most
  br label %loop
loop:
  %r = phi i64 [0, %entry], [%r_next, %loop]
  %group = phi i64 [0, %entry], [%group_next, %loop]
  %r_left = sub i64 %rows, %r
  %groups_left = sub i64 %groups, %group
  %sum = add i64 %r_left, %groups_left
  %ceil = sub i64 %sum, 1
  %size = udiv i64 %ceil, %groups_left
  %x_offset = mul i64 %r, %row_bytes
  %x_group = getelementptr i8, ptr %x, i64 %x_offset
  %out_offset = mul i64 %r, %out_row_bytes
  %out_group = getelementptr i8, ptr %out, i64 %out_offset
  call void @row_group(ptr %x_group, ptr %w, ptr %out_group, i64 %size, i64 %in, i64 %outs, i64 %out_stride, i1 %wide)
  %r_next = add i64 %r, %size
  %group_next = add i64 %group, 1
  %more = icmp ult i64 %group_next, %groups
  br i1 %more, label %loop, label %exit
exit:
  ret void
}}
"""


def _row_group(isa: Isa) -> str:
    """Tiles over `outs`; within each, blocks of rows as equal as they can be (5 rows are 3 + 2, not 4 + 1)."""
    cases = "".join(_cases(isa, outs, ahead) for outs, ahead in _shapes())
    choices = " ".join(f"i64 {ahead}, label %tiles_{outs}_{ahead}" for outs, ahead in _shapes()[1:])
    return f"""
define internal void @row_group({_SIGNATURE}) nounwind {{
entry:
  %rows_up = add i64 %rows, {isa.tile_rows - 1}
  %blocks = udiv i64 %rows_up, {isa.tile_rows}
  %one_block = icmp eq i64 %blocks, 1
  %many_blocks = icmp uge i64 %blocks, {MANY_BLOCKS}
  %some = select i1 %many_blocks, i64 1, i64 2
  %ahead = select i1 %one_block, i64 {OUTS}, i64 %some
  %value_bytes = select i1 %wide, i64 4, i64 2
  %out_row_bytes = mul i64 %out_stride, %value_bytes
  %row_bytes = mul i64 %in, {isa.value_bytes}
  br label %outs_loop
outs_loop:
  %c = phi i64 [0, %entry], [%c_next, %outs_end]
  %c_left = sub i64 %outs, %c
  %is_full = icmp uge i64 %c_left, {OUTS}
  %width = select i1 %is_full, i64 {OUTS}, i64 1
  %w_offset = mul i64 %c, %row_bytes
  %w_tile = getelementptr i8, ptr %w, i64 %w_offset
  %c_offset = mul i64 %c, %value_bytes
  %out_tile = getelementptr i8, ptr %out, i64 %c_offset
  br label %rows_loop
rows_loop:
  %r = phi i64 [0, %outs_loop], [%r_next, %rows_end]
  %block = phi i64 [0, %outs_loop], [%block_next, %rows_end]
  %r_left = sub i64 %rows, %r
  %blocks_left = sub i64 %blocks, %block
  %sum = add i64 %r_left, %blocks_left
  %ceil = sub i64 %sum, 1
  %size = udiv i64 %ceil, %blocks_left
  %x_offset = mul i64 %r, %row_bytes
  %x_tile = getelementptr i8, ptr %x, i64 %x_offset
  %r_offset = mul i64 %r, %out_row_bytes
  %out_block = getelementptr i8, ptr %out_tile, i64 %r_offset
  %fetched = mul i64 %block, %ahead
  %fetch_row = urem i64 %fetched, {OUTS}
  %next_row = add i64 %fetch_row, {OUTS}
  %next_offset = mul i64 %next_row, %row_bytes
  %next = getelementptr i8, ptr %w_tile, i64 %next_offset
  br i1 %is_full, label %tiles, label %tiles_1_0
tiles:
  switch i64 %ahead, label %never [{choices}]
{cases}
never:
  unreachable
rows_end:
  %r_next = add i64 %r, %size
  %block_next = add i64 %block, 1
  %more_rows = icmp ult i64 %r_next, %rows
  br i1 %more_rows, label %rows_loop, label %outs_end
outs_end:
  %c_next = add i64 %c, %width
  %more_outs = icmp ult i64 %c_next, %outs
  br i1 %more_outs, label %outs_loop, label %exit
exit:
  ret void
}}
"""


def _cases(isa: Isa, outs: int, ahead: int) -> str:
    """A switch over the rows of a block, to the tiles of one shape."""
    arguments = "ptr %x_tile, ptr %w_tile, ptr %out_block, i64 %in, i64 %out_stride, i1 %wide, ptr %next"
    sizes = range(1, isa.tile_rows + 1)
    labels = {rows: f"rows_{rows}_{outs}_{ahead}" for rows in sizes}
    lines = [f"tiles_{outs}_{ahead}:"]
    lines.append(f"  switch i64 %size, label %never [{' '.join(f'i64 {n}, label %{labels[n]}' for n in sizes)}]")
    for rows in sizes:
        lines += [f"{labels[rows]}:", f"  call void {_name(rows, outs, ahead)}({arguments})", "  br label %rows_end"]
    return "\n".join(lines) + "\n"
