"""Quantized checkpoints' tensors into `QuantizedTensor`s of the same values: nothing is rounded a second time.

Hides which tensors a weight is stored as and how they become one (`quantized_layouts`). Scales become float32, or
bfloat16 where they are powers of two: both hold what was stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import ConfigError
from jaxinfer.models.host_memory import aligned_empty
from jaxinfer.models.quantized_layouts import LAYOUTS, Matrix, Piece
from jaxinfer.models.safetensors_files import CheckpointError, StoredTensor
from jaxinfer.weight_formats import StoredFormat, WeightFormat
from pallas_kernels.tensors import QuantizedTensor, pack_block_of

Tensors = Mapping[str, StoredTensor]  # by role in the layout


def abstract_weight(held: WeightFormat, shape: tuple[int, ...]) -> QuantizedTensor:
    """The `QuantizedTensor` of `jax.ShapeDtypeStruct`s of a weight `shape [..., out, in]`.

    Raises ConfigError where groups do not divide the inputs, int4 cannot be packed, or experts have zero points.
    """
    *leading, out_size, in_size = shape
    group_size = held.group_size or in_size
    packed = held.dtype == "int4"
    if in_size % group_size or (packed and in_size % 2):
        raise ConfigError(
            f"a weight {list(shape)} cannot be {held.dtype} in groups of {group_size}: they do not divide its "
            f"{in_size} inputs evenly"
        )
    if held.zero_points and leading:
        raise ConfigError(
            f"the experts' weight {list(shape)} has zero points, which a mixture's products do not take: quantize "
            "experts symmetrically"
        )
    stored = jnp.dtype(jnp.uint8 if packed else held.dtype)
    per_group = jax.ShapeDtypeStruct((*leading, in_size // group_size, out_size), jnp.dtype(held.scale_dtype))
    leaves: dict[str, Any] = {  # stand-ins for arrays: a QuantizedTensor is a pytree, whatever its leaves
        "values": jax.ShapeDtypeStruct((*leading, out_size, in_size // 2 if packed else in_size), stored),
        "scales": per_group,
        "zeros": per_group if held.zero_points else None,
    }
    return QuantizedTensor(**leaves, activation=held.activation, pack_block=pack_block_of(in_size) if packed else None)


def pieces_of(stored: StoredFormat, name: str, shape: tuple[int, ...]) -> dict[str, Piece]:
    """The tensors that Hugging Face's weight `name`, `[..., out, in]`, is stored as, by role."""
    *leading, out_size, in_size = shape
    try:
        pieces = LAYOUTS[stored.layout].pieces(stored, name, out_size, in_size)
    except CheckpointError as error:
        raise CheckpointError(f"weight {name!r} {list(shape)} {error}") from error
    if not leading:
        return pieces
    return {
        role: Piece(piece.name, piece.codes, tuple((*leading, *shape) for shape in piece.shapes), piece.required)
        for role, piece in pieces.items()
    }


def read_quantized(
    stored: StoredFormat, shape: tuple[int, ...], rows: slice, tensors: tuple[Tensors, ...], *, per_expert: bool = False
) -> tuple[QuantizedTensor, list[Callable[[], None]]]:
    """A `QuantizedTensor` of NumPy arrays still to be filled, and the jobs that fill it, in any order.

    `shape [..., out, in]` is the parameter's, `rows` its outputs among the stored ones. `tensors` is one mapping, or
    with `per_expert` one for each; else experts are the stored tensors' own first axis. A job reads and holds one
    matrix.
    """
    abstract = abstract_weight(stored.held, shape)
    host = jax.tree.map(lambda leaf: aligned_empty(leaf.shape, leaf.dtype), abstract)

    def job(index: int) -> Callable[[], None]:
        own = tensors[index if per_expert else 0]
        slab = None if per_expert or len(shape) == 2 else index
        return lambda: _fill(stored, own, slab, rows, _matrix(host, index))

    return host, [job(index) for index in range(math.prod(shape[:-2]))]


def _matrix(host: QuantizedTensor, index: int) -> Matrix:
    """Views of one expert's arrays, or of all there is."""
    values, scales, zeros = (
        None if leaf is None else np.asarray(leaf).reshape(-1, *leaf.shape[-2:])[index]
        for leaf in (host.values, host.scales, host.zeros)
    )
    assert values is not None and scales is not None
    return Matrix(values, scales, zeros, host.pack_block)


def _fill(stored: StoredFormat, tensors: Tensors, slab: int | None, rows: slice, into: Matrix) -> None:
    """Read one matrix: all of its tensors, or those of expert `slab` out of stacked ones."""
    arrays = {}
    for role, tensor in tensors.items():
        shape = tensor.shape if slab is None else tensor.shape[1:]
        arrays[role] = np.empty(shape, tensor.dtype)
        tensor.read_into(arrays[role], first=(slab or 0) * arrays[role].size)
    try:
        LAYOUTS[stored.layout].fill(stored, arrays, rows, into)
    except CheckpointError as error:
        raise CheckpointError(f"{next(iter(tensors.values()))} {error}") from error
