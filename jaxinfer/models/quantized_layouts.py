"""How GPTQ, AWQ, compressed-tensors, block-scaled FP8 and MXFP4 lay out a weight's values, scales and zero points.

Hides nibble orders, offsets and transpositions: each layout names the tensors it needs and fills a `Matrix` from them,
exactly, in NumPy. What a `QuantizedTensor` cannot hold is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from jaxinfer.models.safetensors_files import FLOATING, CheckpointError
from jaxinfer.weight_formats import StoredFormat

Arrays = Mapping[str, np.ndarray]  # a weight's stored arrays by role
_CHUNK_BYTES = 1 << 18  # repacked at once: stays in a core's cache
# An AWQ word holds eight outputs. Of its bytes, the low nibbles are these outputs and the high ones those.
_AWQ_LOW, _AWQ_HIGH = (0, 4, 1, 5), (2, 6, 3, 7)
_FP4_TIMES_TWO = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)  # E2M1, sign last
_NOT_A_NUMBER = 255  # E8M0's


@dataclass(frozen=True)
class Piece:
    """One tensor of those a weight is stored as: its name, and the dtypes and shapes it may have."""

    name: str
    codes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    required: bool = True


@dataclass(frozen=True)
class Matrix:
    """The arrays of one weight `[out, in]`, to be filled: views into those of its `QuantizedTensor`."""

    values: np.ndarray  # [out, in]; of int4 [out, in / 2] bytes in blocks of `pack_block` inputs
    scales: np.ndarray  # [groups, out]
    zeros: np.ndarray | None  # like scales
    pack_block: int | None


@dataclass(frozen=True)
class Cut:
    """What is wanted of the arrays of a weight `[out, in]`."""

    outputs: slice  # among those that the arrays hold
    inputs: slice  # among all; whole groups
    shape: tuple[int, int]  # of the weight, all of it

    def groups(self, stored: StoredFormat) -> slice:
        """Which groups the inputs are; the only one there is for any of its inputs."""
        size = stored.held.group_size or self.shape[1]
        return slice(0, 1) if size == self.shape[1] else slice(self.inputs.start // size, self.inputs.stop // size)


@dataclass(frozen=True)
class Layout:
    """Which tensors a weight is stored as, by role, given its name, outputs and inputs; and how they are read.

    `fill(stored, arrays, cut, matrix)` fills the matrix with what is cut out of the arrays; it raises CheckpointError
    without a name. `outputs_per_row` has the roles of tensors whose first axis is outputs, this many a row: `fill`
    takes any range of their rows that holds the cut. It needs all of the others.
    """

    pieces: Callable[[StoredFormat, str, int, int], dict[str, Piece]]
    fill: Callable[[StoredFormat, Arrays, Cut, Matrix], None]
    outputs_per_row: Callable[[StoredFormat], Mapping[str, int]] = lambda stored: {}


# ---- GPTQ (Frantar et al., 2210.17323), as AutoGPTQ and GPTQModel write it


def _gptq_pieces(stored: StoredFormat, name: str, out_size: int, in_size: int) -> dict[str, Piece]:
    module, per_word = name.removesuffix(".weight"), 32 // stored.bits
    groups = in_size // (stored.held.group_size or in_size)
    _divides(per_word, out_size, "outputs")
    _divides(per_word, in_size, "inputs")
    return {
        "words": Piece(f"{module}.qweight", ("I32",), ((in_size // per_word, out_size),)),
        "zeros": Piece(f"{module}.qzeros", ("I32",), ((groups, out_size // per_word),)),
        "scales": Piece(f"{module}.scales", FLOATING, ((groups, out_size),)),
        "order": Piece(f"{module}.g_idx", ("I32",), ((in_size,),), required=False),
    }


def _fill_gptq(stored: StoredFormat, arrays: Arrays, cut: Cut, into: Matrix) -> None:
    """Words run along inputs, lowest bits first; those of zero points along outputs."""
    rows, groups = cut.outputs, cut.groups(stored)
    _check_order(arrays.get("order"), stored.held.group_size or cut.shape[1])
    words = arrays["words"][_words(cut.inputs, 32 // stored.bits), rows]
    step = max(1, _CHUNK_BYTES // (4 * words.shape[0]))
    for start in range(0, words.shape[1], step):
        by_output = np.ascontiguousarray(words[:, start : start + step].T)
        _from_unsigned(by_output.view(np.uint8), into.values[start : start + step], into.pack_block)
    into.scales[...] = arrays["scales"][groups, rows]
    zeros = _unpacked(arrays["zeros"][groups].view(np.uint8), stored.bits)[:, rows].astype(np.int16)
    if stored.layout == "gptq":  # stored less one
        if (zeros == 2**stored.bits - 1).any():
            raise CheckpointError(
                f"has zero points stored as {2**stored.bits - 1}, which readers of checkpoint_format 'gptq' take for "
                f"0 or for {2**stored.bits}; convert it to 'gptq_v2'"
            )
        zeros += 1
    _fill_zeros(zeros - 2 ** (stored.bits - 1), into)


def _check_order(order: np.ndarray | None, group_size: int) -> None:
    if order is not None and not np.array_equal(order, np.arange(order.size) // group_size):
        raise CheckpointError(
            "has inputs in an order of their own (act order, desc_act=true), so that a group's inputs do not lie side "
            "by side; quantize with desc_act=false"
        )


# ---- AWQ (Lin et al., 2306.00978), as AutoAWQ's "gemm" version writes it


def _awq_pieces(stored: StoredFormat, name: str, out_size: int, in_size: int) -> dict[str, Piece]:
    module = name.removesuffix(".weight")
    groups = in_size // (stored.held.group_size or in_size)
    _divides(8, out_size, "outputs")
    return {
        "words": Piece(f"{module}.qweight", ("I32",), ((in_size, out_size // 8),)),
        "zeros": Piece(f"{module}.qzeros", ("I32",), ((groups, out_size // 8),)),
        "scales": Piece(f"{module}.scales", FLOATING, ((groups, out_size),)),
    }


def _fill_awq(stored: StoredFormat, arrays: Arrays, cut: Cut, into: Matrix) -> None:
    """Words run along outputs, in an order of their own; here two inputs half a block apart share a byte."""
    rows, groups = cut.outputs, cut.groups(stored)
    words = _awq_columns(arrays["words"][cut.inputs], rows).view(np.uint32)
    block = into.pack_block
    assert block is not None
    out_size, num_blocks = into.values.shape[0], words.shape[0] // block
    by_eight = into.values.reshape(out_size // 8, 8, num_blocks, block // 2)
    for index in range(num_blocks):
        first, second = words[index * block : (index + 1) * block].reshape(2, block // 2, -1)
        low = (first & 0x0F0F0F0F) | ((second & 0x0F0F0F0F) << 4)
        high = ((first >> 4) & 0x0F0F0F0F) | (second & 0xF0F0F0F0)
        for nibbles, outputs in ((low, _AWQ_LOW), (high, _AWQ_HIGH)):
            by_byte = (nibbles ^ 0x88888888).view(np.uint8).reshape(block // 2, -1, 4)
            for byte, output in enumerate(outputs):
                by_eight[:, output, index] = by_byte[..., byte].T
    into.scales[...] = arrays["scales"][groups, rows]
    nibbles = _unpacked(_awq_columns(arrays["zeros"][groups], rows).view(np.uint8), 4)
    in_order = np.empty((*nibbles.shape[:-1], nibbles.shape[-1] // 8, 8), np.int16)
    in_order[..., [output for pair in zip(_AWQ_LOW, _AWQ_HIGH, strict=True) for output in pair]] = nibbles.reshape(
        in_order.shape
    )
    _fill_zeros(in_order.reshape(nibbles.shape) - 8, into)


def _awq_columns(words: np.ndarray, rows: slice) -> np.ndarray:
    """The words of outputs `rows`."""
    if rows.step != 1 or rows.start % 8 or rows.stop % 8:
        raise CheckpointError(
            f"is fused or split: outputs {rows.start} to {rows.stop} by {rows.step} are not whole words of eight"
        )
    return np.ascontiguousarray(words[:, rows.start // 8 : rows.stop // 8])


# ---- compressed-tensors (llm-compressor), and FP8 with a scale per block (DeepSeek-V3, 2412.19437, section 3.3)


def _scaled_pieces(stored: StoredFormat, name: str, out_size: int, in_size: int) -> dict[str, Piece]:
    """Values as they are, scales per tensor, output, group or block."""
    scales = Piece(f"{name}_scale", FLOATING, _scale_shapes(stored, out_size, in_size))
    if stored.layout == "fp8-block":
        scales = Piece(f"{name}_scale_inv", (*FLOATING, "F8_E8M0"), scales.shapes)
    code = "F8_E4M3" if stored.held.dtype == "float8_e4m3fn" else "I8"
    return {
        "values": Piece(name, (code,), ((out_size, in_size),)),
        "scales": scales,
        "zeros": Piece(f"{name}_zero_point", (code,), scales.shapes, required=stored.held.zero_points),
    }


def _scale_shapes(stored: StoredFormat, out_size: int, in_size: int) -> tuple[tuple[int, ...], ...]:
    if stored.per_tensor:
        return ((1,), (), (1, 1))
    outputs = math.ceil(out_size / stored.block_outputs)
    groups = in_size // (stored.held.group_size or in_size)
    return ((outputs, groups),) if groups > 1 else ((outputs, groups), (outputs,))


def _scaled_rows(stored: StoredFormat) -> dict[str, int]:
    by_block = {} if stored.per_tensor else {"scales": stored.block_outputs, "zeros": stored.block_outputs}
    return {"values": 1} | by_block


def _fill_scaled(stored: StoredFormat, arrays: Arrays, cut: Cut, into: Matrix) -> None:
    into.values[...] = arrays["values"][cut.outputs, cut.inputs]
    _fill_scales(stored, arrays["scales"], cut, into)
    zeros = arrays.get("zeros")
    if zeros is not None:
        spread = _per_output(stored, zeros.astype(np.int16), arrays["values"].shape[0])
        _fill_zeros(spread[cut.outputs, cut.groups(stored)].T, into)


def _packed_pieces(stored: StoredFormat, name: str, out_size: int, in_size: int) -> dict[str, Piece]:
    """Unsigned values packed along inputs, zero points along outputs; both lowest bits first."""
    per_word = 32 // stored.bits
    _divides(per_word, in_size, "inputs")
    groups = in_size // (stored.held.group_size or in_size)
    packed_zeros = ((math.ceil(out_size / per_word), groups),)
    return {
        "words": Piece(f"{name}_packed", ("I32",), ((out_size, in_size // per_word),)),
        "scales": Piece(f"{name}_scale", FLOATING, _scale_shapes(stored, out_size, in_size)),
        "zeros": Piece(f"{name}_zero_point", ("I32",), packed_zeros, required=stored.held.zero_points),
        "shape": Piece(f"{name}_shape", ("I64", "I32"), ((2,),), required=False),
        "order": Piece(f"{name}_g_idx", ("I32",), ((in_size,),), required=False),
    }


def _packed_rows(stored: StoredFormat) -> dict[str, int]:
    return {"words": 1, "scales": stored.block_outputs, "zeros": 32 // stored.bits}


def _fill_packed(stored: StoredFormat, arrays: Arrays, cut: Cut, into: Matrix) -> None:
    if "shape" in arrays and arrays["shape"].tolist() != list(cut.shape):
        raise CheckpointError(f"says its weight_shape is {arrays['shape'].tolist()}, and is {list(cut.shape)}")
    _check_order(arrays.get("order"), stored.held.group_size or cut.shape[1])
    words = np.ascontiguousarray(arrays["words"][cut.outputs, _words(cut.inputs, 32 // stored.bits)])
    _from_unsigned(words.view(np.uint8), into.values, into.pack_block)
    _fill_scales(stored, arrays["scales"], cut, into)
    if "zeros" in arrays:
        by_group = np.ascontiguousarray(arrays["zeros"].T[cut.groups(stored)]).view(np.uint8)
        zeros = _unpacked(by_group, stored.bits)[:, cut.outputs].astype(np.int16)
        _fill_zeros(zeros - 2 ** (stored.bits - 1), into)


# ---- MXFP4 (OCP Microscaling Formats 1.0, 2310.10537), as GPT-OSS stores its experts


def _mxfp4_pieces(stored: StoredFormat, name: str, out_size: int, in_size: int) -> dict[str, Piece]:
    _divides(32, in_size, "inputs")
    return {
        "blocks": Piece(f"{name}_blocks", ("U8",), ((out_size, in_size // 32, 16),)),
        "scales": Piece(f"{name}_scales", ("U8",), ((out_size, in_size // 32),)),
    }


def _fill_mxfp4(stored: StoredFormat, arrays: Arrays, cut: Cut, into: Matrix) -> None:
    """Twice a value is a small integer, half a scale a power of two as before: both are exact."""
    byte = np.arange(256)
    both = np.stack([_FP4_TIMES_TWO[byte & 15], _FP4_TIMES_TWO[byte >> 4]], axis=-1).view(np.uint16)[:, 0]
    blocks, scales = arrays["blocks"], arrays["scales"][cut.outputs, cut.groups(stored)]
    pairs = blocks.reshape(blocks.shape[0], -1)[cut.outputs, _words(cut.inputs, 2)]
    np.take(both, pairs, out=into.values.view(np.uint16), mode="clip")
    if (scales == _NOT_A_NUMBER).any():
        raise CheckpointError("has scales that are not a number (E8M0 255)")
    half_powers = np.ldexp(np.float32(1), byte - 128).astype(into.scales.dtype)
    into.scales[...] = half_powers[scales].T


LAYOUTS: dict[str, Layout] = {
    "gptq": Layout(_gptq_pieces, _fill_gptq),
    "gptq_v2": Layout(_gptq_pieces, _fill_gptq),
    "awq": Layout(_awq_pieces, _fill_awq),
    "scaled": Layout(_scaled_pieces, _fill_scaled, _scaled_rows),
    "fp8-block": Layout(_scaled_pieces, _fill_scaled, _scaled_rows),
    "packed": Layout(_packed_pieces, _fill_packed, _packed_rows),
    "mxfp4": Layout(_mxfp4_pieces, _fill_mxfp4, lambda stored: {"blocks": 1, "scales": 1}),
}


# ---- shared


def _divides(divisor: int, size: int, what: str) -> None:
    if size % divisor:
        raise CheckpointError(f"cannot be packed in 32-bit words: {size} {what} are not a multiple of {divisor}")


def _words(inputs: slice, per_word: int) -> slice:
    """The words of these inputs, or the bytes."""
    if inputs.start % per_word or inputs.stop % per_word:
        raise CheckpointError(
            f"is split: inputs {inputs.start} to {inputs.stop} are not whole words of {per_word}; split inputs over "
            "fewer devices"
        )
    return slice(inputs.start // per_word, inputs.stop // per_word)


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Bytes `[..., n]` -> unsigned values `[..., n * 8 / bits]`, lowest bits first; bits is 4 or 8."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def _from_unsigned(packed: np.ndarray, values: np.ndarray, pack_block: int | None) -> None:
    """`packed` bytes `[out, n]` along inputs, less half their range, into `values`.

    Nibbles that lie side by side become halves of a byte half a block apart: those of bytes i of a block's first and
    second half.
    """
    if pack_block is None:
        np.bitwise_xor(packed, 0x80, out=values.view(np.uint8))
        return
    num_blocks = 2 * packed.shape[1] // pack_block
    step = max(1, _CHUNK_BYTES // packed.shape[1])
    for start in range(0, packed.shape[0], step):
        halves = (packed[start : start + step] ^ 0x88).reshape(-1, num_blocks, 2, pack_block // 4)
        first, second = halves[:, :, 0], halves[:, :, 1]
        into = values[start : start + step].reshape(-1, num_blocks, pack_block // 4, 2)
        into[..., 0] = (first & 15) | (second << 4)
        into[..., 1] = (first >> 4) | (second & 0xF0)


def _per_output(stored: StoredFormat, by_block: np.ndarray, out_size: int) -> np.ndarray:
    """Scales or zero points as they are stored -> `[out, groups]`."""
    if stored.per_tensor:
        return np.broadcast_to(by_block.reshape(1, 1), (out_size, 1))
    by_block = by_block.reshape(by_block.shape[0], -1)
    return np.repeat(by_block, stored.block_outputs, axis=0)[:out_size] if stored.block_outputs > 1 else by_block


def _fill_scales(stored: StoredFormat, scales: np.ndarray, cut: Cut, into: Matrix) -> None:
    wide = scales.astype(np.float32)
    out_size = cut.outputs.stop if stored.per_tensor else wide.shape[0] * stored.block_outputs
    into.scales[...] = _per_output(stored, wide, out_size)[cut.outputs, cut.groups(stored)].T


def _fill_zeros(zeros: np.ndarray, into: Matrix) -> None:
    """`zeros [groups, out]` in units of signed values; a symmetric weight has none."""
    if into.zeros is not None:
        into.zeros[...] = zeros
    elif zeros.any():
        raise CheckpointError("has zero points, though quantization_config says that it is symmetric")
