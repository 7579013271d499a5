"""Quantized checkpoints' tensors into `QuantizedTensor`s of the same values: nothing is rounded a second time.

Hides which tensors a weight is stored as and how they become one (`quantized_layouts`). Scales become float32, or
bfloat16 where they are powers of two: both hold what was stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import ConfigError
from jaxinfer.models.quantized_layouts import LAYOUTS, Cut, Matrix, Piece
from jaxinfer.models.regions import Job, Target
from jaxinfer.models.safetensors_files import CheckpointError, StoredTensor, some
from jaxinfer.weight_formats import StoredFormat, WeightFormat
from pallas_kernels.tensors import QuantizedTensor, pack_block_of

Tensors = Mapping[str, StoredTensor]  # by role in the layout


def abstract_weight(held: WeightFormat, shape: tuple[int, ...], in_shards: int = 1) -> QuantizedTensor:
    """The `QuantizedTensor` of `jax.ShapeDtypeStruct`s of a weight `shape [..., out, in]`.

    Its nibbles are packed so that it can be cut into `in_shards` along its inputs. Raises ConfigError where groups
    divide neither the inputs nor over the shards, int4 cannot be packed, or experts have zero points.
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
    num_groups = in_size // group_size
    _check_shards(shape, num_groups, in_shards, packed)
    stored = jnp.dtype(jnp.uint8 if packed else held.dtype)
    per_group = jax.ShapeDtypeStruct((*leading, num_groups, out_size), jnp.dtype(held.scale_dtype))
    leaves: dict[str, Any] = {  # stand-ins for arrays: a QuantizedTensor is a pytree, whatever its leaves
        "values": jax.ShapeDtypeStruct((*leading, out_size, in_size // 2 if packed else in_size), stored),
        "scales": per_group,
        "zeros": per_group if held.zero_points else None,
    }
    block = pack_block_of(in_size // in_shards) if packed else None
    return QuantizedTensor(**leaves, activation=held.activation, pack_block=block)


def _check_shards(shape: tuple[int, ...], num_groups: int, in_shards: int, packed: bool) -> None:
    """ConfigError unless every shard of the inputs has whole groups (or part of the only one), and whole bytes."""
    in_size = shape[-1]
    unit = 2 if packed else 1

    def fits(shards: int) -> bool:
        return (num_groups == 1 or num_groups % shards == 0) and in_size % (shards * unit) == 0

    if not fits(in_shards):
        groups = f"{num_groups} groups of {in_size // num_groups}" if num_groups > 1 else "inputs, by whole bytes,"
        counts = [str(count) for count in range(1, in_size + 1) if fits(count)]
        raise ConfigError(
            f"a quantized weight {list(shape)} cannot be split over {in_shards} devices along its inputs: its {groups} "
            f"do not divide; counts that do: {some(counts, 12)}"
        )


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


def quantized_jobs(
    stored: StoredFormat,
    full_shape: tuple[int, ...],
    rows: slice,
    tensors: tuple[Tensors, ...],
    targets: Sequence[Target],
    *,
    per_expert: bool = False,
) -> list[Job]:
    """The jobs that fill the targets: one for each matrix, which it reads and holds as it is stored.

    `full_shape [..., out, in]` is that of all that is stored, of which the parameter's outputs are `rows`. `tensors` is
    one mapping, or with `per_expert` one for each; else experts are the stored tensors' own first axis. Of layouts that
    store one output after the other, only outputs between the targets' first and last are read.
    """
    if len(full_shape) == 2:
        return [_matrix_job(stored, full_shape, rows, tensors[0], None, [(target, ()) for target in targets])]
    jobs = []
    for expert in sorted({e for target in targets for e in _indices(target.region[0])}):
        own = [
            (target, (expert - target.region[0].start,)) for target in targets if expert in _indices(target.region[0])
        ]
        tensor, slab = (tensors[expert], None) if per_expert else (tensors[0], expert)
        jobs.append(_matrix_job(stored, full_shape[-2:], rows, tensor, slab, own))
    return jobs


def _indices(part: slice) -> range:
    return range(part.start, part.stop)


def _matrix_job(
    stored: StoredFormat,
    shape: tuple[int, ...],
    rows: slice,
    tensors: Tensors,
    slab: int | None,
    targets: Sequence[tuple[Target, tuple[int, ...]]],
) -> Job:
    """Reads one matrix `shape [out, in]`, of stacked ones that of expert `slab`, for each target's `[index]`."""
    wanted = []
    for target, index in targets:
        outputs, inputs = target.region[-2:]
        first, last = (rows.start + output * rows.step for output in (outputs.start, outputs.stop - 1))
        wanted.append((slice(first, last + 1, rows.step), inputs, _matrix(target.into, index)))

    def job() -> None:
        first, arrays = _read(stored, shape, tensors, slab, [outputs for outputs, _, _ in wanted])
        for outputs, inputs, into in wanted:
            held = slice(outputs.start - first, outputs.stop - first, outputs.step)
            try:
                LAYOUTS[stored.layout].fill(stored, arrays, Cut(held, inputs, (shape[0], shape[1])), into)
            except CheckpointError as error:
                raise CheckpointError(f"{next(iter(tensors.values()))} {error}") from error

    return job


def _matrix(host: QuantizedTensor, index: tuple[int, ...]) -> Matrix:
    """Views of one expert's arrays, or of all there is."""
    assert np.asarray(host.values).flags.c_contiguous  # they are written by other shapes
    values, scales, zeros = (
        None if leaf is None else np.asarray(leaf)[index] for leaf in (host.values, host.scales, host.zeros)
    )
    assert values is not None and scales is not None
    return Matrix(values, scales, zeros, host.pack_block)


def _read(
    stored: StoredFormat, shape: tuple[int, ...], tensors: Tensors, slab: int | None, wanted: list[slice]
) -> tuple[int, dict[str, np.ndarray]]:
    """A matrix's arrays by role, from the returned output on where they are stored by output."""
    outputs_per_row = LAYOUTS[stored.layout].outputs_per_row(stored)
    unit = math.lcm(*outputs_per_row.values())
    first = min(outputs.start for outputs in wanted) // unit * unit
    last = min(-(-max(outputs.stop for outputs in wanted) // unit) * unit, shape[0])
    arrays = {}
    for role, tensor in tensors.items():
        own = tensor.shape if slab is None else tensor.shape[1:]
        skipped, size = 0, math.prod(own)
        if role in outputs_per_row:
            per_row = outputs_per_row[role]
            skipped, num_rows = first // per_row * math.prod(own[1:]), -(-last // per_row) - first // per_row
            own = (num_rows, *own[1:])
        arrays[role] = np.empty(own, tensor.dtype)
        tensor.read_into(arrays[role], first=(slab or 0) * size + skipped)
    return first if outputs_per_row else 0, arrays
