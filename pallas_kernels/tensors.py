"""Quantized and sparse weights: one storage layout that every backend reads, and how a plain weight becomes one.

Hides where values, scales and nibbles lie. No backend has to shuffle lanes: two nibbles of a byte are inputs half a
block apart, so a backend reads a block's low halves and its high halves as two aligned tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

SHORT = {"int8": "int8", "int4": "int4", "float8_e4m3fn": "fp8"}  # how `format` names what values are stored in
LEVELS = {"int8": (-128, 127), "int4": (-8, 7)}  # of integer values; symmetric ones leave out the lowest
LARGEST = {"int8": 127.0, "int4": 7.0, "float8_e4m3fn": 448.0}  # of a symmetric value
ACTIVATIONS = ("int8", "float8_e4m3fn")
PLAIN = ("bfloat16", "float32", "float16")  # of sparse values that are not quantized
LARGEST_PACK_BLOCK = 256  # its halves are the 128 lanes of a TPU's vector


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scales", "zeros", "outlier_columns", "outlier_values", "sparse_index"),
    meta_fields=("activation", "pack_block"),
)
@dataclass(frozen=True)
class QuantizedTensor:
    """A weight `[..., out, in]` whose element is `(value - zero) * scale`; `...` is nothing, or experts.

    `scales[g, o]` holds for inputs `g*group_size : (g+1)*group_size`: outputs are last, as in the product they scale.
    Shapes follow from the arrays, so slices along experts, outputs, and inputs (by whole blocks and groups) are valid.
    """

    values: jax.Array  # int8 or fp8 [..., out, in]; int4: uint8 [..., out, in/2]; 2:4 sparse: [..., 2, out, in/4]
    scales: jax.Array | None = None  # f32 or bf16 [..., groups, out]; one group = one scale per output; None = unscaled
    zeros: jax.Array | None = None  # like scales, in units of values
    outlier_columns: jax.Array | None = None  # i32[n]: inputs kept in full precision, whatever `values` holds there
    outlier_values: jax.Array | None = None  # [..., out, n]
    sparse_index: jax.Array | None = None  # uint8 [..., out, in/8]: nibbles i0 | i1 << 2, the inputs kept of each four
    activation: str | None = None  # "int8" | "float8_e4m3fn": x is quantized per row when multiplied (W8A8)
    pack_block: int | None = None  # inputs (sparse: groups of four) per block of packed nibbles

    @property
    def dtype(self) -> str:
        """What values are stored in: "int8", "int4", "float8_e4m3fn", or a plain dtype (sparse only)."""
        return "int4" if self.values.dtype == jnp.uint8 else self.values.dtype.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight it stands for: `(..., out, in)`."""
        *leading, out_size, stored = self.values.shape
        if self.sparse_index is not None:
            return (*leading[:-1], out_size, 4 * stored)
        return (*leading, out_size, 2 * stored if self.dtype == "int4" else stored)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def num_groups(self) -> int:
        """Scales per output."""
        return 1 if self.scales is None else self.scales.shape[-2]

    @property
    def group_size(self) -> int:
        """Consecutive inputs that share a scale."""
        return self.shape[-1] // self.num_groups

    @property
    def num_bytes(self) -> int:
        """Bytes of all its arrays: what one multiplication reads."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def format(self) -> str:
        """Short name: "int8", "int4/g64/zp", "fp8", "w8a8-int8", "2:4", "2:4-int8"; "/outliers" where it has some."""
        if self.activation is not None:
            name = f"w8a8-{SHORT[self.activation]}"
        elif self.sparse_index is not None:
            name = "2:4" if self.scales is None else f"2:4-{SHORT[self.dtype]}"
        else:
            name = SHORT.get(self.dtype, self.dtype)
        name += f"/g{self.group_size}" if self.num_groups > 1 else ""
        name += "/zp" if self.zeros is not None else ""
        return name + ("/outliers" if self.outlier_columns is not None else "")

    def core(self) -> QuantizedTensor:
        """Without zero points and outliers, which the operations add themselves: what a backend multiplies."""
        return replace(self, zeros=None, outlier_columns=None, outlier_values=None)

    def check(self) -> None:
        """Raises ValueError where arrays do not belong together: a cut through a block, a combination nobody serves."""
        *leading, out_size, in_size = self.shape
        if self.activation not in (None, *ACTIVATIONS):
            raise ValueError(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}, None")
        if self.activation and (self.format.removesuffix("/outliers") != f"w8a8-{SHORT[self.dtype]}"):
            raise ValueError(
                f"activation {self.activation} needs dense {self.activation} values, one scale per output and no zero "
                f"points; got {replace(self, activation=None).format}"
            )
        if self.scales is None and self.dtype not in PLAIN:
            raise ValueError(f"{self.dtype} values need scales [groups, out]")
        per_group = (*leading, self.num_groups, out_size)
        for name, array in (("scales", self.scales), ("zeros", self.zeros)):
            if array is not None and array.shape != per_group:
                raise ValueError(
                    f"{name} {array.shape} do not fit a weight {self.shape}: [..., groups, out] is {per_group}"
                )
        if self.scales is not None and not jnp.issubdtype(self.scales.dtype, jnp.floating):
            raise ValueError(f"scales {self.scales.dtype.name} must be floating-point")
        if self.scales is not None and self.dtype not in LARGEST:
            raise ValueError(f"values {self.dtype} with scales are not one of {', '.join(LARGEST)}")
        self._check_outliers((*leading, out_size))
        if in_size % self.num_groups:
            raise ValueError(f"{in_size} inputs do not divide into {self.num_groups} groups")
        if self.dtype == "int4" or self.sparse_index is not None:
            packed = in_size if self.sparse_index is None else in_size // 4
            if not self.pack_block or packed % self.pack_block:
                raise ValueError(f"{packed} nibbles do not divide into blocks of {self.pack_block}")

    def _check_outliers(self, outputs: tuple[int, ...]) -> None:
        columns, values = self.outlier_columns, self.outlier_values
        if (columns is None) != (values is None):
            raise ValueError("outlier_columns and outlier_values come together or not at all")
        if columns is None or values is None:
            return
        if values.shape != (*outputs, columns.shape[0]):
            raise ValueError(f"outlier_values {values.shape} must be {(*outputs, columns.shape[0])}, a column each")
        if isinstance(columns, jax.core.Tracer) or not columns.size:
            return
        if not 0 <= int(columns.min()) <= int(columns.max()) < self.shape[-1]:
            raise ValueError(f"outlier columns must be from 0 to {self.shape[-1] - 1}, got {columns.tolist()}")


def pack_block_of(size: int) -> int:
    """Nibbles per packed block: the largest power of two that divides `size`, at most 256."""
    block = math.gcd(size, LARGEST_PACK_BLOCK)
    if block < 2:
        raise ValueError(f"{size} nibbles cannot be packed: an even number is needed")
    return block


def pack(values: jax.Array, block: int) -> jax.Array:
    """Integers `[..., n]`, low four bits kept -> uint8 `[..., n/2]`.

    Byte i of a block holds its value i in the low half and value `i + block/2` in the high half.
    """
    halves = (values.astype(jnp.uint8) & 0xF).reshape(*values.shape[:-1], -1, 2, block // 2)
    return (halves[..., 0, :] | (halves[..., 1, :] << 4)).reshape(*values.shape[:-1], -1)


def unpack(packed: jax.Array, block: int) -> jax.Array:
    """The inverse of `pack`: int8 `[..., n]` between -8 and 7."""
    signed = jax.lax.bitcast_convert_type(packed, jnp.int8).reshape(*packed.shape[:-1], -1, block // 2)
    low = jnp.right_shift(jnp.left_shift(signed, 4), 4)
    return jnp.stack([low, jnp.right_shift(signed, 4)], axis=-2).reshape(*packed.shape[:-1], -1)


def split_nibbles(x: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """`x [..., n]` -> two `[..., n/2]`: what meets the low halves of packed bytes, and what meets the high ones."""
    halves = x.reshape(*x.shape[:-1], -1, 2, block // 2)
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    return halves[..., 0, :].reshape(shape), halves[..., 1, :].reshape(shape)


def quantize(
    weight: ArrayLike,
    dtype: DTypeLike,
    *,
    group_size: int | None = None,
    zero_point: bool = False,
    activation: str | None = None,
    outlier_columns: ArrayLike | Sequence[int] | None = None,
    scale_dtype: DTypeLike = jnp.float32,
) -> QuantizedTensor:
    """Round `weight [..., out, in]` to the nearest of `dtype`: "int8", "int4" or "float8_e4m3fn".

    Each output's group of `group_size` inputs (None: all) gets the scale that makes its largest magnitude the largest
    value, or with `zero_point` (integers) its range the whole range. Inputs `outlier_columns` i32[n] stay as they
    are (LLM.int8(), arXiv 2208.07339, section 3.2). Raises ValueError for what does not fit.
    """
    weight = jnp.asarray(weight)
    name = _stored_name(dtype)
    groups = _grouped(weight, group_size)
    if zero_point and name not in LEVELS:
        raise ValueError(f"zero_point needs one of {', '.join(LEVELS)}, not {name}")
    outlier_values = None
    if outlier_columns is not None:
        outlier_columns = _columns(outlier_columns, weight.shape[-1])
        outlier_values = weight[..., outlier_columns]
        groups = _grouped(weight.at[..., outlier_columns].set(0), group_size)
    wide = groups.astype(jnp.float32)  # [..., out, groups, group_size]
    scale, zero = _range_of(wide, name, zero_point, jnp.dtype(scale_dtype))
    values = wide / scale.astype(jnp.float32)[..., None]
    if zero is None:
        values = _rounded(values, name)
    else:
        values = _rounded(values + zero.astype(jnp.float32)[..., None], name, LEVELS[name])
    tensor = assemble(
        values.reshape(weight.shape),
        jnp.swapaxes(scale, -1, -2),
        None if zero is None else jnp.swapaxes(zero, -1, -2),
        dtype=name,
        activation=activation,
    )
    return replace(tensor, outlier_columns=outlier_columns, outlier_values=outlier_values)


def assemble(
    values: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    *,
    dtype: DTypeLike,
    activation: str | None = None,
) -> QuantizedTensor:
    """A tensor of values that were rounded already (GPTQ, AWQ): `values [..., out, in]`, `scales [..., groups, out]`.

    int4 values come as any integers between -8 and 7 and are packed here. Raises ValueError for what does not fit.
    """
    name = _stored_name(dtype)
    if name in LEVELS and not isinstance(values, jax.core.Tracer) and values.size:
        low, high = int(values.min()), int(values.max())
        if low < LEVELS[name][0] or high > LEVELS[name][1]:
            raise ValueError(
                f"{name} values are from {LEVELS[name][0]} to {LEVELS[name][1]}; these are from {low} to {high}"
            )
    block = pack_block_of(values.shape[-1]) if name == "int4" else None
    stored = pack(values, block) if block else values.astype(name)
    tensor = QuantizedTensor(stored, scales, zeros, activation=activation, pack_block=block)
    tensor.check()
    return tensor


def sparsify_2_4(weight: ArrayLike, dtype: DTypeLike | None = None) -> QuantizedTensor:
    """Keep the two of every four adjacent inputs of `weight [..., out, in]` that are largest in magnitude.

    `dtype` None keeps their values, "int8" and "float8_e4m3fn" round them with one scale per output. Raises ValueError
    where inputs are not a multiple of 8. Source: Accelerating Sparse Deep Neural Networks (2104.08378, section 3).
    """
    weight = jnp.asarray(weight)
    *leading, out_size, in_size = weight.shape
    if in_size % 8:
        raise ValueError(f"2:4 sparsity needs a multiple of 8 inputs, got {in_size}")
    name = weight.dtype.name if dtype is None else _stored_name(dtype)
    if name == "int4" or (dtype is None and name not in PLAIN):
        raise ValueError(f"2:4 sparse values are one of {', '.join(PLAIN)}, int8, float8_e4m3fn; not {name}")
    fours = weight.reshape(*leading, out_size, in_size // 4, 4)
    magnitude = jnp.where(jnp.isnan(fours), jnp.inf, jnp.abs(fours).astype(jnp.float32))  # NaN is kept, to be seen
    kept = jnp.sort(jnp.argsort(-magnitude, axis=-1)[..., :2], axis=-1)
    values = jnp.moveaxis(jnp.take_along_axis(fours, kept, axis=-1), -1, -3)  # [..., 2, out, in/4]
    block = pack_block_of(in_size // 4)
    index = pack(kept[..., 0] | (kept[..., 1] << 2), block)
    if dtype is None:
        return QuantizedTensor(values, sparse_index=index, pack_block=block)
    wide = values.astype(jnp.float32)
    highest = jnp.max(jnp.abs(wide), axis=(-3, -1))  # f32[..., out]
    scale = _scale_of(highest, name)
    stored = _rounded(wide / scale[..., None, :, None], name).astype(name)
    return QuantizedTensor(stored, scale[..., None, :], sparse_index=index, pack_block=block)


def quantize_rows(
    x: jax.Array, dtype: DTypeLike, *, largest: Callable[[jax.Array], jax.Array] | None = None
) -> tuple[jax.Array, jax.Array]:
    """`x [..., n]` -> values of the same shape (int4's in int8) and `f32[...]` scales: W8A8's activations, K/V rows.

    A row's largest magnitude becomes the largest value; a row of zeros has scale 1. One that holds NaN or inf becomes
    zeros of scale NaN, so that all that is made of it is NaN.
    `largest`: of the magnitudes `f32[...]` here those of whole rows, where the rest of `x` is on other devices.
    """
    name = _stored_name(dtype)
    wide = x.astype(jnp.float32)
    strange = jnp.any(wide != wide, axis=-1)  # NaN, which a maximum may drop: XLA:CPU's does
    highest = jnp.where(strange, jnp.inf, jnp.max(jnp.abs(wide), axis=-1))
    if largest is not None:
        highest = largest(highest)
    scales = _scale_of(jnp.where(jnp.isinf(highest), jnp.nan, highest), name)
    return _rounded(jnp.nan_to_num(wide / scales[..., None]), name), scales


def dequantize(tensor: QuantizedTensor) -> jax.Array:
    """f32 `[..., out, in]`: exactly the weight that the tensor stands for."""
    if tensor.sparse_index is not None:
        wide = _densified(tensor)
    elif tensor.pack_block is not None:
        wide = unpack(tensor.values, tensor.pack_block).astype(jnp.float32)
    else:
        wide = tensor.values.astype(jnp.float32)
    if tensor.scales is not None:
        grouped = wide.reshape(*wide.shape[:-1], tensor.num_groups, tensor.group_size)
        if tensor.zeros is not None:
            grouped -= jnp.swapaxes(tensor.zeros, -1, -2).astype(jnp.float32)[..., None]
        wide = (grouped * jnp.swapaxes(tensor.scales, -1, -2).astype(jnp.float32)[..., None]).reshape(wide.shape)
    if tensor.outlier_columns is not None and tensor.outlier_values is not None:
        wide = wide.at[..., tensor.outlier_columns].set(tensor.outlier_values.astype(jnp.float32))
    return wide


def sparse_positions(tensor: QuantizedTensor) -> tuple[jax.Array, jax.Array]:
    """int8 `[..., out, in/4]` twice: which of its four inputs is a group's first kept one, and which its second."""
    assert tensor.sparse_index is not None and tensor.pack_block is not None
    index = unpack(tensor.sparse_index, tensor.pack_block)
    return index & 3, (index >> 2) & 3


def _densified(tensor: QuantizedTensor) -> jax.Array:
    """f32 `[..., out, in]` unscaled values of a 2:4 sparse tensor."""
    first, second = sparse_positions(tensor)
    values = tensor.values.astype(jnp.float32)
    four = jnp.arange(4, dtype=jnp.int8)
    dense = jnp.where(first[..., None] == four, values[..., 0, :, :, None], 0.0)
    dense += jnp.where(second[..., None] == four, values[..., 1, :, :, None], 0.0)
    return dense.reshape(tensor.shape)


def _stored_name(dtype: DTypeLike) -> str:
    name = jnp.dtype(dtype).name
    if name not in LARGEST:
        raise ValueError(f"weight dtype {name} is not one of {', '.join(LARGEST)}")
    return name


def _grouped(weight: jax.Array, group_size: int | None) -> jax.Array:
    """`[..., out, groups, group_size]`"""
    if weight.ndim < 2 or not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(f"a weight is floating-point [..., out, in], got {weight.dtype.name} {weight.shape}")
    in_size = weight.shape[-1]
    size = in_size if group_size is None else group_size
    if size < 1 or in_size % size:
        raise ValueError(f"group_size {size} does not divide {in_size} inputs; None takes them all")
    return weight.reshape(*weight.shape[:-1], in_size // size, size)


def _columns(outlier_columns: ArrayLike | Sequence[int], in_size: int) -> jax.Array:
    columns = jnp.asarray(outlier_columns, jnp.int32)
    if columns.ndim != 1 or columns.size == 0:
        raise ValueError(f"outlier_columns are i32[n] with n > 0, got {columns.shape}; None where there are none")
    if not isinstance(columns, jax.core.Tracer) and not 0 <= int(columns.min()) <= int(columns.max()) < in_size:
        raise ValueError(f"outlier_columns {columns.tolist()} are not all within 0..{in_size - 1}")
    return columns


def _range_of(
    wide: jax.Array, name: str, zero_point: bool, scale_dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array | None]:
    """`wide f32[..., group_size]` -> scale `[...]` and zero `[...]` or None; a group of zeros has scale 1."""
    if not zero_point:
        highest = jnp.max(jnp.abs(wide), axis=-1)
        return _scale_of(highest, name).astype(scale_dtype), None
    lowest_level, highest_level = LEVELS[name]
    lowest = jnp.minimum(jnp.min(wide, axis=-1), 0.0)  # zero itself stays representable
    spread = jnp.maximum(jnp.max(wide, axis=-1), 0.0) - lowest
    scale = jnp.where(spread == 0, 1.0, spread / (highest_level - lowest_level)).astype(scale_dtype)
    return scale, jnp.round(lowest_level - lowest / scale.astype(jnp.float32)).astype(scale_dtype)


def _scale_of(highest: jax.Array, name: str) -> jax.Array:
    """The scale that makes `highest` the largest value; 1 where that is 0, or so small that its scale would be."""
    scale = highest / LARGEST[name]
    return jnp.where(scale == 0, 1.0, scale)


def _rounded(scaled: jax.Array, name: str, levels: tuple[float, float] | None = None) -> jax.Array:
    """f32 in units of values -> int8 (also for int4) or fp8, within `levels` (None: the symmetric ones)."""
    clipped = jnp.clip(scaled, *(levels or (-LARGEST[name], LARGEST[name])))
    return jnp.round(clipped).astype(jnp.int8) if name in LEVELS else clipped.astype(name)
