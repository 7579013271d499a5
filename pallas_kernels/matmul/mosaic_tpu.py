"""Quantized matmul for TPUs: weights are read once, in their packed form, and widened in VMEM beside the matrix unit.

Hides tiles and pipelining (Pallas overlaps the next tile's transfer with this one's product), how packed values become
operands without moving between lanes, and which products a generation's matrix unit has.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tuning
from pallas_kernels.devices import Device
from pallas_kernels.tensors import QuantizedTensor, split_nibbles

LANES = 128  # of a vector register
ROW_MULTIPLE = 32  # rows of an 8-bit tile; two of bfloat16's
MOST_ROWS = 512  # of a tile: with more, arithmetic takes longer than reading weights anyway
X_TILE_BYTES = 8 << 20  # most of x in one tile
MOST_INPUTS = 4096  # of a tile, where inputs divide well
MOST_INPUTS_WHOLE = 16384  # of a tile where they do not
PIECE_INPUTS = 512  # widened at a time
# Of a plane, in one turn of a loop: with fewer, the matrix unit would wait more often at its start and end.
TURN_INPUTS = 2 * PIECE_INPUTS
TILE_US = 1.5  # to read a tile of weights: some times what a step of the grid costs
OUTS = (256, 1024)  # least and most of a tile
MOST_SUMS = 512 * 512  # of a tile: every one is code, since a product's own loops are unrolled
VMEM_LIMIT = 48 << 20
FP8_KINDS = ("TPU7x",)  # TPUs whose matrix unit multiplies fp8
PLANES = {"int4": 2, "2:4": 4}
DTYPES = ("bfloat16", "float32")  # of x and of the result


def refuse(
    *, rows: int, in_size: int, out_size: int, dtype: str, out_dtype: str, format: str, device: Device
) -> str | None:
    """None, or why this case is not served."""
    if format == "dense":
        return "dense weights are for XLA's own dot"
    return unfit(format, in_size, dtype, out_dtype)


def unfit(format: str, in_size: int, dtype: str, out_dtype: str) -> str | None:
    """Why there is no kernel for these dtypes, or no tiling of this format's inputs; None where there is."""
    if dtype not in DTYPES:
        return f"x {dtype} is not one of {', '.join(DTYPES)}"
    if out_dtype not in DTYPES:
        return f"out_dtype {out_dtype} is not one of {', '.join(DTYPES)}"
    name, _, group = format.partition("/g")
    if name.startswith("2:4") and in_size % (8 * LANES):
        return f"2:4 sparse weights need a multiple of {8 * LANES} inputs, got {in_size}"
    group_size = int(group) if group else in_size
    block = math.gcd(in_size, 2 * LANES)
    if name == "int4" and group and (block // 2) % group_size and group_size % block:
        return f"groups of {group_size} lie across the halves of {block} inputs packed together"
    if group and group_size % 8:
        return f"groups of {group_size} inputs are not a multiple of 8"
    if tile_inputs(format, in_size) > MOST_INPUTS_WHOLE:
        return f"{in_size} inputs have no divisor that makes a tile, and are more than {MOST_INPUTS_WHOLE}"
    return None


def tile_inputs(format: str, in_size: int) -> int:
    """Inputs of a tile: the largest suitable divisor of `in_size` up to MOST_INPUTS, or all where that is too few."""
    name, _, group = format.partition("/g")
    planes = 2 if name == "int4" else 8 if name.startswith("2:4") else 1  # 2:4's index: two halves of each position's
    unit = math.lcm(planes * LANES, int(group) if group else 1)
    fitting = [size for size in range(unit, min(in_size, MOST_INPUTS) + 1, unit) if in_size % size == 0]
    best = max(fitting, default=in_size)
    return in_size if best < MOST_INPUTS // 4 and in_size <= MOST_INPUTS_WHOLE else best


@dataclass(frozen=True)
class Piece:
    """Inputs `start : stop` of a plane; only those from `first` to `last` belong to the piece's group."""

    plane: int
    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class Tiling:
    """How one weight is cut. Planes are what x and weight are split into so that operands are whole vectors:
    one; int4's low and high halves; 2:4's four positions.
    """

    format: str  # "int8", "int4", "float8_e4m3fn", "2:4"
    rows: int
    outs: int
    inputs: int  # of all planes together
    group_size: int | None  # None: one scale per output, or none at all
    pack_block: int
    integer: bool  # int8 x int8 on the matrix unit, summed in int32

    @property
    def planes(self) -> int:
        return PLANES.get(self.format, 1)

    @property
    def groups(self) -> int:
        """Scales per output in a tile."""
        return 1 if self.group_size is None else self.inputs // self.group_size

    @property
    def plane_inputs(self) -> int:
        return self.inputs // self.planes

    @property
    def sum_dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.int32 if self.integer else jnp.float32)

    def pieces(self) -> list[list[Piece]]:
        """For each group of a tile, the aligned pieces of planes that hold its inputs."""
        pieces: list[list[Piece]] = [[] for _ in range(self.groups)]
        if self.group_size is None:
            starts = range(0, self.plane_inputs, PIECE_INPUTS)
            spans = [(start, min(start + PIECE_INPUTS, self.plane_inputs)) for start in starts]
            return [[Piece(plane, *span, *span) for span in spans for plane in range(self.planes)]]
        for plane in range(self.planes):
            for first, last, group in self._runs(plane):
                start, stop = first // LANES * LANES, min(-(-last // LANES) * LANES, self.plane_inputs)
                pieces[group].append(Piece(plane, start, stop, first, last))
        return pieces

    def _runs(self, plane: int) -> list[tuple[int, int, int]]:
        """(first, last, group) of consecutive positions of a plane that share a group."""
        assert self.group_size is not None
        if self.planes == 1:
            return [(g * self.group_size, (g + 1) * self.group_size, g) for g in range(self.groups)]
        half = self.pack_block // 2
        if self.group_size >= self.pack_block:  # both halves of whole blocks
            width = self.group_size // 2
            return [(g * width, (g + 1) * width, g) for g in range(self.groups)]
        runs = []
        for first in range(0, self.plane_inputs, self.group_size):
            natural = first // half * self.pack_block + plane * half + first % half
            runs.append((first, first + self.group_size, natural // self.group_size))
        return runs


class Operands(NamedTuple):
    """A product's arrays, the kernel's references to one tile of each, or what cuts them so; None: not there."""

    x: Any  # [planes, rows, inputs / planes]
    values: Any  # as stored
    sparse_index: Any  # as stored
    scales: Any  # [tiles, groups, outs]: of each tile along inputs
    row_scales: Any  # f32[rows, 1]


def split_planes(x: jax.Array, weight: jax.Array | QuantizedTensor) -> jax.Array:
    """`x [rows, in]` -> `[planes, rows, in / planes]`, each position of a plane meeting that of the weight's plane."""
    if not isinstance(weight, QuantizedTensor):
        return x[None]
    if weight.sparse_index is not None:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, 4), -1, 0)
    if weight.dtype == "int4":
        assert weight.pack_block is not None
        return jnp.stack(split_nibbles(x, weight.pack_block))
    return x[None]


def tile_product(tiling: Tiling, tile: Operands) -> jax.Array:
    """A tile's part of the product, `[rows, outs]`: scaled where it has groups, else in units of values."""
    groups = tiling.pieces()
    if tiling.group_size is None:
        return _looped_sum(tiling, tile, groups[0])
    assert tile.scales is not None
    total: jax.Array | None = None
    for group, pieces in enumerate(groups):
        part = _sum_of(tiling, tile, pieces) * tile.scales[0, group : group + 1].astype(jnp.float32)
        total = part if total is None else total + part
    assert total is not None
    return total


def _looped_sum(tiling: Tiling, tile: Operands, pieces: list[Piece]) -> jax.Array:
    """The sum of all pieces' products: unrolled, it is code to compile and to read from memory in each call."""
    turns = tiling.plane_inputs // TURN_INPUTS
    if turns < 2 or tile.sparse_index is not None:
        return _sum_of(tiling, tile, pieces)
    first = [piece for piece in pieces if piece.stop <= TURN_INPUTS]
    rest = [piece for piece in pieces if piece.start >= turns * TURN_INPUTS]
    start = jnp.zeros((tiling.rows, tile.values.shape[0]), tiling.sum_dtype)

    def turn(index: jax.Array, total: jax.Array) -> jax.Array:
        return total + _sum_of(tiling, tile, first, pl.multiple_of(index * TURN_INPUTS, TURN_INPUTS))

    return lax.fori_loop(0, turns, turn, _sum_of(tiling, tile, rest) if rest else start)


def _sum_of(tiling: Tiling, tile: Operands, pieces: list[Piece], offset: jax.Array | int = 0) -> jax.Array:
    """The sum of pieces' products, `offset` inputs further on in their planes."""
    products = (_dot(_masked_x(tile.x, piece, offset), _operand(tiling, tile, piece, offset)) for piece in pieces)
    return functools.reduce(operator.add, products)


def finished(tiling: Tiling, sums: jax.Array, tile: Operands) -> jax.Array:
    """f32 `[rows, outs]`: what remains to be multiplied by once all inputs are summed."""
    product = sums.astype(jnp.float32)
    if tiling.format == "int4":
        product *= 1 / 16
    if tiling.group_size is None and tile.scales is not None:
        product *= tile.scales[0].astype(jnp.float32)
    return product if tile.row_scales is None else product * tile.row_scales[...]


def _masked_x(x: jax.Array, piece: Piece, offset: jax.Array | int) -> jax.Array:
    """The piece's `[rows, stop - start]` of x, with zeros where inputs belong to another group."""
    inputs = x[piece.plane, :, pl.ds(offset + piece.start, piece.stop - piece.start)]
    if (piece.start, piece.stop) == (piece.first, piece.last):
        return inputs
    lane = lax.broadcasted_iota(jnp.int32, inputs.shape, 1) + piece.start
    return jnp.where((lane >= piece.first) & (lane < piece.last), inputs, jnp.zeros_like(inputs))


def _dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x [rows, n]`, `weight [outs, n]` -> `[rows, outs]`."""
    return lax.dot_general(
        x,
        weight,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.int32 if x.dtype == jnp.int8 else jnp.float32,
    )


def _operand(tiling: Tiling, tile: Operands, piece: Piece, offset: jax.Array | int) -> jax.Array:
    """The piece's `[outs, stop - start]` of the weight in the dtype of x; int4: 16 times as large."""
    dtype = tile.x.dtype
    if tile.sparse_index is not None:
        return _sparse_operand(tile, piece).astype(dtype)
    values = tile.values[:, pl.ds(offset + piece.start, piece.stop - piece.start)]
    if tiling.format != "int4":
        return values.astype(dtype)
    # Four bytes at a time: a nibble at the top of its byte, the lower half cleared, is 16 times its signed value.
    words = pltpu.bitcast(values, jnp.int32)
    top = jnp.int32(-0x0F0F0F10)  # 0xF0F0F0F0
    return pltpu.bitcast((words << 4 if piece.plane == 0 else words) & top, jnp.int8).astype(dtype)


def _sparse_operand(tile: Operands, piece: Piece) -> jax.Array:
    """f32: the kept value where it is the plane's position of its four, else zero."""
    assert tile.sparse_index is not None
    halves = []
    for start in range(piece.start // 2, piece.stop // 2, LANES):  # whole vectors: the low halves, then the high ones
        packed = tile.sparse_index[:, start : start + LANES].astype(jnp.int32)
        halves += [packed & 0xF, packed >> 4]
    nibbles = jnp.concatenate(halves, axis=-1)
    first, second = (tile.values[kept, :, piece.start : piece.stop].astype(jnp.float32) for kept in (0, 1))
    return jnp.where(nibbles & 3 == piece.plane, first, jnp.where(nibbles >> 2 == piece.plane, second, 0.0))


def _kernel(tiling: Tiling, tile: Operands, out: jax.Array, sums: jax.Array) -> None:
    """One tile of the grid (rows, outputs, inputs). `out [rows, outs]`; `sums` is kept over the tiles along inputs."""
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)

    sums[...] += tile_product(tiling, tile)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        out[...] = finished(tiling, sums[...], tile).astype(out.dtype)


def tiling_of(weight: jax.Array | QuantizedTensor, blocks: dict[str, int], *, integer: bool) -> Tiling:
    """`blocks`: rows, outs, inputs."""
    if not isinstance(weight, QuantizedTensor):
        return Tiling("dense", **blocks, group_size=None, pack_block=0, integer=False)
    return Tiling(
        "2:4" if weight.sparse_index is not None else weight.dtype,
        **blocks,
        group_size=weight.group_size if weight.num_groups > 1 else None,
        pack_block=weight.pack_block or 0,
        integer=integer,
    )


def default_blocks(weight: jax.Array | QuantizedTensor, x: jax.Array, device: Device) -> dict[str, int]:
    """Rows in equal tiles, as few as are allowed; weights in tiles that take TILE_US to read.

    Rows of a single tile are as many as there are, unless of bytes, so that none are added beside each product.
    """
    format, values = (weight.format, weight.values) if isinstance(weight, QuantizedTensor) else ("dense", weight)
    inputs = tile_inputs(format, weight.shape[-1])
    bytes_per_out = inputs * values.nbytes / math.prod(weight.shape)
    outs = int(device.memory_gbps * 1e3 * TILE_US / bytes_per_out)
    most_rows = min(MOST_ROWS, X_TILE_BYTES // (inputs * x.dtype.itemsize) // ROW_MULTIPLE * ROW_MULTIPLE)
    row_tiles = -(-x.shape[0] // most_rows)
    rows = round_up(-(-x.shape[0] // row_tiles), ROW_MULTIPLE)
    if row_tiles == 1 and x.dtype.itemsize > 1:
        rows = x.shape[0]
    outs = min(outs, OUTS[1], MOST_SUMS // rows) // OUTS[0] * OUTS[0]
    return {"rows": rows, "outs": max(outs, OUTS[0]), "inputs": inputs}


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def run(
    x: jax.Array,
    weight: QuantizedTensor,
    *,
    row_scales: jax.Array | None = None,
    out_dtype: jnp.dtype,
    device: Device,
) -> jax.Array:
    """`x [rows, in]` (W8A8: quantized, `row_scales f32[rows]`), `weight [out, in]` -> `[rows, out]`."""
    rows, in_size = x.shape
    out_size = weight.shape[0]
    blocks = tuning.block_sizes(
        "matmul.mosaic_tpu",
        device,
        default_blocks(weight, x, device),
        format=weight.format,
        rows=tuning.row_bucket(rows),
        in_size=in_size,
        out_size=out_size,
    )
    x = matrix_unit_x(x, device)
    tiling = tiling_of(weight, blocks, integer=x.dtype == jnp.int8)
    return _call(operands_of(x, weight, row_scales, tiling), tiling, out_size, out_dtype)[:rows]


def matrix_unit_x(x: jax.Array, device: Device) -> jax.Array:
    """x in a dtype that the device's matrix unit multiplies; quantized values are exact in bfloat16."""
    if x.dtype == jnp.int8 and not device.int8_tops:
        return x.astype(jnp.bfloat16)
    if x.dtype == jnp.float8_e4m3fn and device.kind not in FP8_KINDS:
        return x.astype(jnp.bfloat16)
    return x


def operands_of(
    x: jax.Array, weight: jax.Array | QuantizedTensor, row_scales: jax.Array | None, tiling: Tiling
) -> Operands:
    """The kernel's arrays, rows padded to whole tiles. Leading axes of the weight stay."""
    padding = (0, -x.shape[0] % tiling.rows)
    x = split_planes(jnp.pad(x, (padding, (0, 0))), weight)
    if not isinstance(weight, QuantizedTensor):
        return Operands(x, weight, None, None, None)
    *leading, out_size, _ = weight.shape
    return Operands(
        x=x,
        values=weight.values,
        sparse_index=weight.sparse_index,
        scales=None if weight.scales is None else weight.scales.reshape(*leading, -1, tiling.groups, out_size),
        row_scales=None if row_scales is None else jnp.pad(row_scales, padding)[:, None],
    )


def _call(operands: Operands, tiling: Tiling, out_size: int, out_dtype: jnp.dtype) -> jax.Array:
    """`[rows, out]`, rows being a multiple of the tile's."""
    _, rows, plane_inputs = operands.x.shape
    outs = min(tiling.outs, out_size)
    specs = block_specs(operands, tiling, outs, row_tile=lambda i, j, k: i, weight_tile=lambda i, j, k: (j, k))
    return pl.pallas_call(
        functools.partial(_kernel, tiling),
        out_shape=jax.ShapeDtypeStruct((rows, out_size), out_dtype),
        grid=(rows // tiling.rows, pl.cdiv(out_size, outs), plane_inputs // tiling.plane_inputs),
        in_specs=[specs],
        out_specs=pl.BlockSpec((tiling.rows, outs), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((tiling.rows, outs), tiling.sum_dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name=f"matmul_{tiling.format}".replace(":", "_"),
    )(operands)


def block_specs(
    operands: Operands,
    tiling: Tiling,
    outs: int,
    *,
    row_tile: Callable[..., Any],
    weight_tile: Callable[..., tuple[Any, ...]],
) -> Operands:
    """The tile of each operand at a step of the grid, whose indices (and prefetched scalars) both functions take.

    `row_tile` gives the tile of rows, `weight_tile` the weight's leading index where it has one, and its tiles of
    outputs and inputs.
    """
    steps = operands.x.shape[2] // tiling.plane_inputs
    stored = operands.values.shape[-1] // steps
    leading = (None,) * (operands.values.ndim - (2 if operands.sparse_index is None else 3))

    def kept_pair(*indices: Any) -> tuple[Any, ...]:
        *group, out_tile, in_tile = weight_tile(*indices)
        return (*group, 0, out_tile, in_tile)

    def scales(*indices: Any) -> tuple[Any, ...]:
        *group, out_tile, in_tile = weight_tile(*indices)
        return (*group, 0 if tiling.group_size is None else in_tile, 0, out_tile)

    def inputs(*indices: Any) -> tuple[Any, ...]:
        return (0, row_tile(*indices), weight_tile(*indices)[-1])

    dense = operands.sparse_index is None
    return Operands(
        x=pl.BlockSpec((tiling.planes, tiling.rows, tiling.plane_inputs), inputs),
        values=pl.BlockSpec((*leading, outs, stored), weight_tile)
        if dense
        else pl.BlockSpec((*leading, 2, outs, stored), kept_pair),
        sparse_index=None if dense else pl.BlockSpec((*leading, outs, stored // 2), weight_tile),
        scales=None if operands.scales is None else pl.BlockSpec((*leading, 1, tiling.groups, outs), scales),
        row_scales=None
        if operands.row_scales is None
        else pl.BlockSpec((tiling.rows, 1), lambda *indices: (row_tile(*indices), 0)),
    )
