"""LLVM IR of paged attention for CPUs: one KV head of one run of query tokens at a time, a block of pages at a time.

Hides blocking, masking and the order of additions. Up to four query rows share every load of K and V; pages are read
where they lie. Row i of a block always falls into lane i % 16 of its query's running sum and blocks come in order, so
the bits of a query depend neither on its neighbours nor on whether it was decoded or prefilled, in any dtype.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

from pallas_kernels.native.code import Code, broadcast, constants, round_to_bf16, sum_lanes
from pallas_kernels.native.handler import F32

LANES = 16
ROWS = 4  # query rows that share the loads of K and V
KEYS = 4  # K rows whose dots are summed at once; divides the page size
BLOCK = 128  # rows per step of the online softmax; a page may be larger, then it is one
MOST_PAGES = BLOCK // KEYS  # of a block
VECTOR = f"<{LANES} x float>"
WORDS = f"<{LANES} x i32>"
MASKED = -1e30  # below every score, and finite: exp(MASKED - MASKED) is 1, not NaN
SETTINGS = ("decode_seqs", "width", "window", "tile_tokens", "scale")  # the last operand, i32 each; scale: float32 bits

# %Work's fields in order: operands, results, then sizes; all i64 but for the pointers.
_OPERANDS = ("q", "keys", "values", "table", "q_start", "kv_len", "position", "first")
_POINTERS = (*_OPERANDS, "out", "highest", "total")
_SIZES = (
    *("tokens", "q_heads", "dim", "pages", "kv_heads", "page_size", "seqs", "table_width"),
    *(*SETTINGS, "q_wide", "kv_wide", "out_wide"),
)
_FIELDS = {name: ("ptr", place) for place, name in enumerate(_POINTERS)}
_FIELDS |= {name: ("i64", len(_POINTERS) + place) for place, name in enumerate(_SIZES)}


def module() -> str:
    """IR of `@execute` and `@compute`, which `native.handler` calls."""
    kinds = ", ".join(kind for kind, _ in _FIELDS.values())
    tiles = [_tile(rows, wide) for wide in (False, True) for rows in range(1, ROWS + 1)]
    return "\n".join(
        [_DECLARATIONS, f"%Work = type {{ {kinds} }}", _exp(), *tiles, _run_tokens(), _compute(), _execute()]
    )


_DECLARATIONS = f"""
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare void @abort()
declare i64 @llvm.smin.i64(i64, i64)
declare i64 @llvm.smax.i64(i64, i64)
declare {VECTOR} @llvm.fma.v{LANES}f32({VECTOR}, {VECTOR}, {VECTOR})
declare float @llvm.vector.reduce.fmax.v{LANES}f32({VECTOR})
"""


def _float(value: float) -> str:
    """A float32 constant; LLVM writes it as the double of the same value."""
    (exact,) = struct.unpack("f", struct.pack("f", value))
    return f"0x{struct.unpack('<Q', struct.pack('<d', exact))[0]:016X}"


def _splat(value: float) -> str:
    return "<" + ", ".join([f"float {_float(value)}"] * LANES) + ">"


def _fma(code: Code, a: str, b: str, c: str) -> str:
    return code.let(f"call {VECTOR} @llvm.fma.v{LANES}f32({VECTOR} {a}, {VECTOR} {b}, {VECTOR} {c})")


def _smaller(code: Code, a: str | int, b: str | int) -> str:
    return code.let(f"call i64 @llvm.smin.i64(i64 {a}, i64 {b})")


def _larger(code: Code, a: str | int, b: str | int) -> str:
    return code.let(f"call i64 @llvm.smax.i64(i64 {a}, i64 {b})")


def _exp() -> str:
    """e^x for x <= 0, about 2 ulp: Cephes' expf (Moshier), lane by lane. exp(0) is 1 exactly; NaN stays NaN."""
    code = Code()
    magic = 12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    low = code.let(f"fcmp olt {VECTOR} %x0, {_splat(-87.0)}")
    x = code.let(f"select <{LANES} x i1> {low}, {VECTOR} {_splat(-87.0)}, {VECTOR} %x0")
    shifted = _fma(code, x, _splat(1.44269504088896341), _splat(magic))
    n = code.let(f"fsub {VECTOR} {shifted}, {_splat(magic)}")
    r = _fma(code, n, _splat(-0.693359375), x)
    r = _fma(code, n, _splat(2.12194440e-4), r)
    series = _splat(1.9875691500e-4)
    for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        series = _fma(code, series, r, _splat(term))
    square = code.let(f"fmul {VECTOR} {r}, {r}")
    series = code.let(f"fadd {VECTOR} {_fma(code, series, square, r)}, {_splat(1.0)}")
    bits = code.let(f"shl {WORDS} {code.let(f'bitcast {VECTOR} {shifted} to {WORDS}')}, {constants([23] * LANES)}")
    power = code.let(f"add {WORDS} {bits}, {constants([0x3F800000] * LANES)}")
    result = code.let(f"fmul {VECTOR} {series}, {code.let(f'bitcast {WORDS} {power} to {VECTOR}')}")
    body = "\n".join(code.lines)
    return (
        f"define internal {VECTOR} @exp({VECTOR} %x0) alwaysinline nounwind {{\n{body}\n  ret {VECTOR} {result}\n}}\n"
    )


def _load_f32(code: Code, base: str, index: str, wide: bool) -> str:
    """LANES values from `base[index]`, float32 or bfloat16, as float32."""
    if wide:
        return code.let(f"load {VECTOR}, ptr {code.at(base, 'float', index)}, align 4")
    halves = code.let(f"load <{LANES} x i16>, ptr {code.at(base, 'i16', index)}, align 2")
    words = code.let(f"zext <{LANES} x i16> {halves} to {WORDS}")
    return code.let(f"bitcast {WORDS} {code.let(f'shl {WORDS} {words}, {constants([16] * LANES)}')} to {VECTOR}")


def _prefetch(code: Code, base: str, index: str, wide: bool) -> None:
    address = code.at(base, "float" if wide else "i16", index)
    code.do(f"call void @llvm.prefetch.p0(ptr {address}, i32 0, i32 3, i32 1)")


def _tile(rows: int, wide: bool) -> str:
    """`rows` query rows over one block: scores, the online softmax (1805.02867), and the weighted values.

    Rows see block rows [lo, hi) - base each; what none of them sees, which may be NaN, is not multiplied. Page p of the
    block lies at `keys[p]` and `values[p]`. Page p + ahead is fetched line by line while p is read: all at once it
    would wait for the buffers of outstanding misses.
    """
    code = Code()
    each = range(rows)
    lows = [code.let(f"sub i64 {code.load('i64', '%lo', r)}, %base") for r in each]
    highs = [_smaller(code, code.let(f"sub i64 {code.load('i64', '%hi', r)}, %base"), "%block_rows") for r in each]
    first, last = lows[0], highs[0]
    for low, high in zip(lows[1:], highs[1:], strict=True):
        first, last = _smaller(code, first, low), _larger(code, last, high)
    first = _larger(code, first, 0)
    with code.when(code.let(f"icmp slt i64 {first}, {last}")):
        _scores(code, each, wide, (first, last))
        shrink = [_softmax(code, r, lows[r], highs[r], first, last) for r in each]
        whole = code.let("and i64 %dim, -32")
        for chunks, begin, end in ((2, "0", whole), (1, whole, "%dim")):
            _weigh(code, each, wide, shrink, (first, last), (chunks, begin, end))
    signature = "ptr %q, ptr %acc, ptr %highest, ptr %total, ptr %keys, ptr %values, ptr %lo, ptr %hi, ptr %scores"
    sizes = "i64 %base, i64 %block_rows, i64 %page_size, i64 %dim, i64 %stride, i64 %ahead"
    return code.function(f"internal void {_tile_name(rows, wide)}({signature}, {sizes}) nounwind")


@contextmanager
def _each_page(code: Code, pointers: str, seen: tuple[str, str]) -> Iterator[tuple[str, str, str, str, str]]:
    """For each page with rows in [first, last) of the block: it, the page to fetch, its first row, its rows seen."""
    first, last = seen
    past = code.let(f"add i64 {last}, {code.let('sub i64 %page_size, 1')}")
    end = code.let(f"sdiv i64 {past}, %page_size")
    with code.loop(code.let(f"sdiv i64 {first}, %page_size"), end) as p:
        offset = code.let(f"mul i64 {p}, %page_size")
        begin = _larger(code, code.let(f"sub i64 {first}, {offset}"), 0)
        stop = _smaller(code, code.let(f"sub i64 {last}, {offset}"), "%page_size")
        following = code.load("ptr", pointers, code.let(f"add i64 {p}, %ahead"))
        yield code.load("ptr", pointers, p), following, offset, begin, stop


def _tile_name(rows: int, wide: bool) -> str:
    return f"@tile_{rows}_{'f32' if wide else 'bf16'}"


def _scores(code: Code, each: range, wide: bool, seen: tuple[str, str]) -> None:
    """`scores[r, i] = q[r] . k[i]`, KEYS page rows at a time; q is scaled already."""
    with (
        _each_page(code, "%keys", seen) as (keys, following, offset, begin, stop),
        code.loop(code.let(f"and i64 {begin}, -{KEYS}"), stop, KEYS) as i,
    ):
        sums = [[code.variable(VECTOR, "zeroinitializer") for _ in range(KEYS)] for _ in each]
        starts = [code.let(f"mul i64 {code.let(f'add i64 {i}, {key}')}, %dim") for key in range(KEYS)]
        with code.loop(0, "%dim", LANES) as d:
            places = [code.let(f"add i64 {start}, {d}") for start in starts]
            for place in places:
                _prefetch(code, following, place, wide)
            ks = [_load_f32(code, keys, place, wide) for place in places]
            for r in each:
                q = _load_f32(code, "%q", code.let(f"add i64 {code.let(f'mul i64 %dim, {r}')}, {d}"), True)
                for k, total in zip(ks, sums[r], strict=True):
                    code.store(VECTOR, _fma(code, q, k, code.load(VECTOR, total)), total)
        column = code.let(f"add i64 {offset}, {i}")
        for r in each:
            dots = sum_lanes(code, [code.load(VECTOR, total) for total in sums[r]], LANES)
            at = code.let(f"add i64 {code.let(f'mul i64 %stride, {r}')}, {column}")
            code.do(f"store <{KEYS} x float> {dots}, ptr {code.at('%scores', 'float', at)}, align 4")


def _softmax(code: Code, r: int, low: str, high: str, first: str, last: str) -> str:
    """Turn row r's scores into weights, update its maximum and sums; returns by what earlier results shrink."""
    row = code.at("%scores", "float", code.let(f"mul i64 %stride, {r}"))
    begin = code.let(f"and i64 {first}, -{LANES}")
    bounds = [broadcast(code, "i32", code.let(f"trunc i64 {bound} to i32"), LANES) for bound in (low, high)]

    def block(c: str) -> tuple[str, str]:
        """16 scores, and which of them the row sees."""
        start = broadcast(code, "i32", code.let(f"trunc i64 {c} to i32"), LANES)
        index = code.let(f"add {WORDS} {start}, {constants(list(range(LANES)))}")
        above = code.let(f"icmp sge {WORDS} {index}, {bounds[0]}")
        below = code.let(f"icmp slt {WORDS} {index}, {bounds[1]}")
        scores = code.let(f"load {VECTOR}, ptr {code.at(row, 'float', c)}, align 4")
        return scores, code.let(f"and <{LANES} x i1> {above}, {below}")

    best = code.variable(VECTOR, _splat(MASKED))
    with code.loop(begin, last, LANES) as c:
        scores, seen = block(c)
        held = code.load(VECTOR, best)
        higher = code.let(f"and <{LANES} x i1> {seen}, {code.let(f'fcmp ogt {VECTOR} {scores}, {held}')}")
        code.store(VECTOR, code.let(f"select <{LANES} x i1> {higher}, {VECTOR} {scores}, {VECTOR} {held}"), best)
    here = code.let(f"call float @llvm.vector.reduce.fmax.v{LANES}f32({VECTOR} {code.load(VECTOR, best)})")
    before = code.load("float", "%highest", r)
    rises = code.let(f"fcmp ogt float {here}, {before}")
    highest = code.let(f"select i1 {rises}, float {here}, float {before}")
    code.store("float", highest, "%highest", r)
    fallen = broadcast(code, "float", code.let(f"fsub float {before}, {highest}"), LANES)
    shrink = code.let(f"call {VECTOR} @exp({VECTOR} {fallen})")
    spread = broadcast(code, "float", highest, LANES)
    old = code.load(VECTOR, "%total", r, align=4)
    total = code.variable(VECTOR, code.let(f"fmul {VECTOR} {old}, {shrink}"))
    with code.loop(begin, last, LANES) as c:
        scores, seen = block(c)
        raised = code.let(f"call {VECTOR} @exp({VECTOR} {code.let(f'fsub {VECTOR} {scores}, {spread}')})")
        weights = code.let(f"select <{LANES} x i1> {seen}, {VECTOR} {raised}, {VECTOR} zeroinitializer")
        code.do(f"store {VECTOR} {weights}, ptr {code.at(row, 'float', c)}, align 4")
        code.store(VECTOR, code.let(f"fadd {VECTOR} {code.load(VECTOR, total)}, {weights}"), total)
    code.do(f"store {VECTOR} {code.load(VECTOR, total)}, ptr {code.at('%total', VECTOR, r)}, align 4")
    return shrink


def _weigh(
    code: Code, each: range, wide: bool, shrink: list[str], seen: tuple[str, str], dims: tuple[int, str, str]
) -> None:
    """`acc[r] = acc[r] * shrink[r] + sum of weights[r, i] * v[i]`, `chunks` vectors of the head at a time."""
    chunks, begin, end = dims
    with code.loop(begin, end, LANES * chunks) as d:
        places = [code.let(f"add i64 {d}, {LANES * chunk}") for chunk in range(chunks)]
        rows = [code.at("%acc", "float", code.let(f"mul i64 %dim, {r}")) for r in each]
        sums = [
            [code.variable(VECTOR, code.let(f"fmul {VECTOR} {_load_f32(code, rows[r], place, True)}, {shrink[r]}"))
             for place in places]
            for r in each
        ]  # fmt: skip
        with (
            _each_page(code, "%values", seen) as (page, following, offset, first, stop),
            code.loop(first, stop) as i,
        ):
            start = code.let(f"mul i64 {i}, %dim")
            columns = [code.let(f"add i64 {start}, {place}") for place in places]
            _prefetch(code, following, columns[0], wide)
            vs = [_load_f32(code, page, column, wide) for column in columns]
            score = code.let(f"add i64 {offset}, {i}")
            for r in each:
                at = code.let(f"add i64 {code.let(f'mul i64 %stride, {r}')}, {score}")
                weight = broadcast(code, "float", code.load("float", "%scores", at), LANES)
                for v, total in zip(vs, sums[r], strict=True):
                    code.store(VECTOR, _fma(code, weight, v, code.load(VECTOR, total)), total)
        for r in each:
            for place, total in zip(places, sums[r], strict=True):
                code.do(f"store {VECTOR} {code.load(VECTOR, total)}, ptr {code.at(rows[r], 'float', place)}, align 4")


class _Work:
    """Fields of a %Work, loaded where they are used."""

    def __init__(self, code: Code):
        self._code = code

    def __getitem__(self, name: str) -> str:
        kind, place = _FIELDS[name]
        address = self._code.let(f"getelementptr %Work, ptr %work, i32 0, i32 {place}")
        return self._code.let(f"load {kind}, ptr {address}")


def _run_tokens() -> str:
    """`@run_tokens(work, scratch, s, t, end, h)`: KV head h of query tokens [t, end), which belong to sequence s.

    s < 0: padding. A sequence without rows, and padding, give zeros with total 0.
    """
    code = Code()
    work = _Work(code)
    dim, page_size, q_heads = work["dim"], work["page_size"], work["q_heads"]
    group = code.let(f"sdiv i64 {q_heads}, {work['kv_heads']}")
    rows = code.let(f"mul i64 {code.let('sub i64 %end, %t')}, {group}")
    block_pages = _larger(code, code.let(f"sdiv i64 {BLOCK}, {page_size}"), 1)
    block_rows = code.let(f"mul i64 {block_pages}, {page_size}")
    stride = code.let(f"and i64 {code.let(f'add i64 {block_rows}, {LANES - 1}')}, -{LANES}")
    values = code.let(f"mul i64 {rows}, {dim}")
    q_rows = "%scratch"
    acc = code.at(q_rows, "float", values)
    total = code.at(acc, "float", values)
    highest = code.at(total, VECTOR, rows)
    scores = code.at(highest, "float", rows)
    lows = code.at(scores, "float", code.let(f"mul i64 {stride}, {ROWS}"))
    highs = code.at(lows, "i64", rows)
    length = code.variable("i64", 0)
    with code.when(code.let("icmp sge i64 %s, 0")):
        code.store("i64", code.let(f"sext i32 {code.load('i32', work['kv_len'], '%s')} to i64"), length)
    length = code.load("i64", length)

    first, last = code.variable("i64", length), code.variable("i64", 0)
    scale = code.let(f"bitcast i32 {code.let(f'trunc i64 {work["scale"]} to i32')} to float")
    scale = broadcast(code, "float", scale, LANES)
    window, is_wide = work["window"], code.let(f"icmp ne i64 {work['q_wide']}, 0")
    with code.loop(0, rows) as j:
        token = code.let(f"add i64 %t, {code.let(f'sdiv i64 {j}, {group}')}")
        place = _head_place(code, token, j, group, q_heads)
        source = code.let(f"mul i64 {place}, {dim}")
        target = code.let(f"mul i64 {j}, {dim}")
        for wide in (True, False):
            with code.when(is_wide if wide else code.let(f"xor i1 {is_wide}, true")), code.loop(0, dim, LANES) as d:
                q = _load_f32(code, work["q"], code.let(f"add i64 {source}, {d}"), wide)
                at = code.at(q_rows, "float", code.let(f"add i64 {target}, {d}"))
                code.do(f"store {VECTOR} {code.let(f'fmul {VECTOR} {q}, {scale}')}, ptr {at}, align 4")
                at = code.at(acc, "float", code.let(f"add i64 {target}, {d}"))
                code.do(f"store {VECTOR} zeroinitializer, ptr {at}, align 4")
        code.do(f"store {VECTOR} zeroinitializer, ptr {code.at(total, VECTOR, j)}, align 4")
        code.store("float", _float(MASKED), highest, j)
        position = code.let(f"sext i32 {code.load('i32', work['position'], token)} to i64")
        past = code.let(f"add i64 {position}, 1")
        high = _smaller(code, length, past)
        begin = code.let(f"sub i64 {past}, {window}")
        begin = code.let(f"select i1 {code.let(f'icmp sgt i64 {window}, 0')}, i64 {begin}, i64 0")
        given = code.let(f"sext i32 {code.load('i32', work['first'], token)} to i64")
        low = _larger(code, begin, _larger(code, given, 0))
        code.store("i64", low, lows, j)
        code.store("i64", high, highs, j)
        code.store("i64", _smaller(code, code.load("i64", first), low), first)
        code.store("i64", _larger(code, code.load("i64", last), high), last)

    sizes = (rows, stride, block_pages, block_rows)
    _blocks(code, work, (q_rows, acc, highest, total, lows, highs, scores), sizes, (first, last))
    _store_rows(code, work, (acc, highest, total), (rows, group))
    return code.function(
        "internal void @run_tokens(ptr %work, ptr %scratch, i64 %s, i64 %t, i64 %end, i64 %h) nounwind"
    )


def _head_place(code: Code, token: str, j: str, group: str, q_heads: str) -> str:
    """`token * q_heads + head` of row j."""
    head = code.let(f"add i64 {code.let(f'mul i64 %h, {group}')}, {code.let(f'srem i64 {j}, {group}')}")
    return code.let(f"add i64 {code.let(f'mul i64 {token}, {q_heads}')}, {head}")


def _blocks(
    code: Code, work: _Work, arrays: tuple[str, ...], sizes: tuple[str, str, str, str], seen: tuple[str, str]
) -> None:
    """All rows over each block of pages that any of them sees, in order; the next page is fetched meanwhile."""
    q_rows, acc, highest, total, lows, highs, scores = arrays
    rows, stride, block_pages, block_rows = sizes
    dim, page_size, kv_heads, width = work["dim"], work["page_size"], work["kv_heads"], work["table_width"]
    most = code.let(f"sub i64 {work['pages']}, 1")
    first_block = code.let(f"sdiv i64 {code.load('i64', seen[0])}, {block_rows}")
    past = code.let(f"add i64 {code.load('i64', seen[1])}, {code.let(f'sub i64 {page_size}, 1')}")
    last_page = code.let(f"sub i64 {_smaller(code, code.let(f'sdiv i64 {past}, {page_size}'), width)}, 1")
    is_wide = code.let(f"icmp ne i64 {work['kv_wide']}, 0")
    value_bytes = code.let(f"select i1 {is_wide}, i64 4, i64 2")
    page_bytes = code.let(f"mul i64 {code.let(f'mul i64 {page_size}, {dim}')}, {value_bytes}")
    table = code.at(work["table"], "i32", code.let(f"mul i64 {_larger(code, '%s', 0)}, {width}"))
    # where the pages of a block lie, and the one after them
    keys, values = (code.variable(f"[{MOST_PAGES + 1} x ptr]", "zeroinitializer") for _ in range(2))
    end_block = code.let(f"add i64 {code.let(f'sdiv i64 {last_page}, {block_pages}')}, 1")
    end_block = code.let(f"select i1 {code.let(f'icmp slt i64 {last_page}, 0')}, i64 0, i64 {end_block}")
    with code.loop(first_block, end_block) as b:
        first_page = code.let(f"mul i64 {b}, {block_pages}")
        with code.loop(0, code.let(f"add i64 {block_pages}, 1")) as p:
            column = _smaller(code, code.let(f"add i64 {first_page}, {p}"), last_page)
            page = code.let(f"sext i32 {code.load('i32', table, column)} to i64")
            page = _smaller(code, _larger(code, page, 0), most)
            index = code.let(f"add i64 {code.let(f'mul i64 {page}, {kv_heads}')}, %h")
            offset = code.let(f"mul i64 {index}, {page_bytes}")
            code.store("ptr", code.at(work["keys"], "i8", offset), keys, p)
            code.store("ptr", code.at(work["values"], "i8", offset), values, p)
        base = code.let(f"mul i64 {b}, {block_rows}")
        with code.loop(0, rows, ROWS) as j:
            left = _smaller(code, code.let(f"sub i64 {rows}, {j}"), ROWS)
            at = code.let(f"mul i64 {j}, {dim}")
            ahead = code.let(f"zext i1 {code.let(f'icmp eq i64 {j}, 0')} to i64")  # the first rows fetch for all
            arguments = ", ".join(
                [
                    *(f"ptr {code.at(array, 'float', at)}" for array in (q_rows, acc)),
                    f"ptr {code.at(highest, 'float', j)}, ptr {code.at(total, VECTOR, j)}, ptr {keys}, ptr {values}",
                    f"ptr {code.at(lows, 'i64', j)}, ptr {code.at(highs, 'i64', j)}, ptr {scores}",
                    f"i64 {base}, i64 {block_rows}, i64 {page_size}, i64 {dim}, i64 {stride}, i64 {ahead}",
                ]
            )
            for wide in (True, False):
                with code.when(is_wide if wide else code.let(f"xor i1 {is_wide}, true")):
                    for count in range(1, ROWS + 1):
                        with code.when(code.let(f"icmp eq i64 {left}, {count}")):
                            code.do(f"call void {_tile_name(count, wide)}({arguments})")


def _store_rows(code: Code, work: _Work, arrays: tuple[str, str, str], sizes: tuple[str, str]) -> None:
    acc, highest, total = arrays
    rows, group = sizes
    dim = work["dim"]
    is_wide = code.let(f"icmp ne i64 {work['out_wide']}, 0")
    with code.loop(0, rows) as j:
        token = code.let(f"add i64 %t, {code.let(f'sdiv i64 {j}, {group}')}")
        place = _head_place(code, token, j, group, work["q_heads"])
        lanes = code.load(VECTOR, total, j, align=4)
        one = code.let(f"extractelement <1 x float> {sum_lanes(code, [lanes], LANES)}, i32 0")
        code.store("float", one, work["total"], place)
        code.store("float", code.load("float", highest, j), work["highest"], place)
        used = code.let(f"fcmp une float {one}, {_float(0.0)}")
        inverse = code.let(f"fdiv float {_float(1.0)}, {one}")
        factor = code.let(f"select i1 {used}, float {inverse}, float {_float(0.0)}")
        factor = broadcast(code, "float", factor, LANES)
        source, target = code.let(f"mul i64 {j}, {dim}"), code.let(f"mul i64 {place}, {dim}")
        with code.loop(0, dim, LANES) as d:
            values = _load_f32(code, acc, code.let(f"add i64 {source}, {d}"), True)
            values = code.let(f"fmul {VECTOR} {values}, {factor}")
            at = code.let(f"add i64 {target}, {d}")
            with code.when(is_wide):
                code.do(f"store {VECTOR} {values}, ptr {code.at(work['out'], 'float', at)}, align 4")
            with code.when(code.let(f"xor i1 {is_wide}, true")):
                narrow = round_to_bf16(code, values, LANES)
                code.do(f"store <{LANES} x i16> {narrow}, ptr {code.at(work['out'], 'i16', at)}, align 2")


def _compute() -> str:
    """A piece is one KV head of `width` tokens of a decode sequence, or of up to `tile_tokens` prefill tokens."""
    code = Code()
    work = _Work(code)
    kv_heads, width, decode_seqs, tile = work["kv_heads"], work["width"], work["decode_seqs"], work["tile_tokens"]
    block = code.let(f"sdiv i64 %piece, {kv_heads}")
    head = code.let(f"srem i64 %piece, {kv_heads}")
    decode_tokens = code.let(f"mul i64 {decode_seqs}, {width}")
    decodes = code.let(f"icmp slt i64 {block}, {decode_seqs}")
    later = code.let(f"mul i64 {code.let(f'sub i64 {block}, {decode_seqs}')}, {tile}")
    later = code.let(f"add i64 {decode_tokens}, {later}")
    begin = code.let(f"select i1 {decodes}, i64 {code.let(f'mul i64 {block}, {width}')}, i64 {later}")
    size = code.let(f"select i1 {decodes}, i64 {width}, i64 {tile}")
    end = _smaller(code, code.let(f"add i64 {begin}, {size}"), work["tokens"])
    scratch = code.let(f"call ptr @malloc(i64 {_scratch_bytes(code, work, size)})")
    with code.when(code.let(f"icmp eq ptr {scratch}, null")):
        code.do("call void @abort()")
    with code.when(decodes):
        code.do(f"call void @run_tokens(ptr %work, ptr {scratch}, i64 {block}, i64 {begin}, i64 {end}, i64 {head})")
    with code.when(code.let(f"xor i1 {decodes}, true")):
        starts, seqs = work["q_start"], work["seqs"]
        from_token = code.variable("i64", begin)
        with code.loop(decode_seqs, seqs) as s:
            token = code.load("i64", from_token)
            past = code.let(f"sext i32 {code.load('i32', starts, code.let(f'add i64 {s}, 1'))} to i64")
            stop = _smaller(code, past, end)
            with code.when(code.let(f"icmp slt i64 {token}, {stop}")):
                code.do(
                    f"call void @run_tokens(ptr %work, ptr {scratch}, i64 {s}, i64 {token}, i64 {stop}, i64 {head})"
                )
                code.store("i64", stop, from_token)
        token = code.load("i64", from_token)
        with code.when(code.let(f"icmp slt i64 {token}, {end}")):
            code.do(f"call void @run_tokens(ptr %work, ptr {scratch}, i64 -1, i64 {token}, i64 {end}, i64 {head})")
    code.do(f"call void @free(ptr {scratch})")
    return code.function("internal void @compute(ptr %work, i64 %piece) nounwind")


def _scratch_bytes(code: Code, work: _Work, tokens: str) -> str:
    """Of `@run_tokens` for so many tokens: q and acc in float32, 16 sums, a maximum and two bounds per row; scores."""
    group = code.let(f"sdiv i64 {work['q_heads']}, {work['kv_heads']}")
    rows = code.let(f"mul i64 {tokens}, {group}")
    row_bytes = code.let(f"add i64 {code.let(f'mul i64 {work["dim"]}, 8')}, {4 * LANES + 4 + 16}")
    block_rows = code.let(f"add i64 {_larger(code, work['page_size'], BLOCK)}, {LANES}")
    score_bytes = code.let(f"mul i64 {block_rows}, {4 * ROWS}")
    return code.let(f"add i64 {code.let(f'mul i64 {rows}, {row_bytes}')}, {score_bytes}")


def _execute() -> str:
    """Operands q, keys, values, table, q_start, kv_len, position, first, settings; results out, highest, total."""
    code = Code()
    names = (*_OPERANDS, "settings")
    buffers = {name: code.load("ptr", "%args", place) for place, name in enumerate(names)}
    buffers |= {name: code.load("ptr", "%results", place) for place, name in enumerate(_POINTERS[len(_OPERANDS) :])}

    def field(name: str, place: int, kind: str) -> str:
        address = code.let(f"getelementptr %Buffer, ptr {buffers[name]}, i32 0, i32 {place}")
        return code.let(f"load {kind}, ptr {address}")

    def size(name: str, axis: int) -> str:
        return code.load("i64", field(name, 5, "ptr"), axis)

    def is_f32(name: str) -> str:
        return code.let(f"zext i1 {code.let(f'icmp eq i32 {field(name, 2, "i32")}, {F32}')} to i64")

    values = {name: field(name, 3, "ptr") for name in _POINTERS}
    values |= dict(zip(("tokens", "q_heads", "dim"), (size("q", axis) for axis in range(3)), strict=True))
    values |= {name: size("keys", axis) for axis, name in enumerate(("pages", "kv_heads", "page_size"))}
    values |= {"seqs": size("table", 0), "table_width": size("table", 1)}
    given = field("settings", 3, "ptr")
    for place, name in enumerate(SETTINGS):
        values[name] = code.let(f"sext i32 {code.load('i32', given, place)} to i64")
    values |= {"q_wide": is_f32("q"), "kv_wide": is_f32("keys"), "out_wide": is_f32("out")}
    work = code.variable("%Work", "zeroinitializer")
    for name, (kind, place) in _FIELDS.items():
        code.do(f"store {kind} {values[name]}, ptr {code.let(f'getelementptr %Work, ptr {work}, i32 0, i32 {place}')}")
    decode_tokens = code.let(f"mul i64 {values['decode_seqs']}, {values['width']}")
    left = code.let(f"sub i64 {values['tokens']}, {decode_tokens}")
    up = code.let(f"add i64 {left}, {code.let(f'sub i64 {values["tile_tokens"]}, 1')}")
    tiles = code.let(f"sdiv i64 {up}, {values['tile_tokens']}")
    blocks = code.let(f"add i64 {values['decode_seqs']}, {tiles}")
    pieces = code.let(f"mul i64 {blocks}, {values['kv_heads']}")
    code.do(f"call void @run(ptr %api, ptr %context, ptr {work}, i64 {pieces})")
    return code.function("internal void @execute(ptr %api, ptr %context, ptr %args, ptr %results) nounwind")
