"""Placements over the eight virtual devices for tests of loading, and what each shard must be."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxinfer.models.quantized_checkpoint import abstract_weight
from jaxinfer.models.transformer import ParameterSpec
from jaxinfer.placement import PlacedParameter
from pallas_kernels.tensors import QuantizedTensor

NamedSharding, Spec = jax.sharding.NamedSharding, jax.sharding.PartitionSpec
Split = Callable[[tuple[int, ...]], tuple[int, ...]]  # a shape -> into how many parts each dimension is split


def divided(*parts: int) -> Split:
    """The last dimensions into these parts, or into half as many until they divide."""

    def split(shape: tuple[int, ...]) -> tuple[int, ...]:
        wanted = ([1] * len(shape) + list(parts))[len(parts) :] if len(shape) >= len(parts) else parts[-len(shape) :]
        return tuple(math.gcd(size, count) for size, count in zip(shape, wanted, strict=True)) if shape else ()

    return split


def placed_by(specs: dict[str, ParameterSpec], split: Split) -> list[PlacedParameter]:
    """Every parameter over all eight devices, what remains of them being copies."""
    found = []
    for name, spec in specs.items():
        parts = split(spec.shape)
        num_groups = 1 if spec.format is None else abstract_weight(spec.format, spec.shape).num_groups
        if num_groups > 1:
            parts = (*parts[:-1], math.gcd(parts[-1], num_groups))
        sharding = sharded(parts)
        found.append(PlacedParameter((name,), spec, False, spec.shape, sharding, parts[-1] if parts else 1))
    return found


def taken_apart(
    placed: Iterable[PlacedParameter], loaded: Iterable[Any]
) -> Iterator[tuple[PlacedParameter, jax.Array | QuantizedTensor]]:
    """Parameters with their arrays; of a fused one its parts, each an array of what this process's devices hold."""
    for parameter, array in zip(placed, loaded, strict=True):
        if not parameter.parts:
            yield parameter, array
            continue
        first = 0
        for part in parameter.parts:
            rows = slice(first, first + part.device_shape[0])
            yield part, jax.tree.map(functools.partial(_rows, rows=rows), part.abstract(), array)
            first = rows.stop
        assert first == parameter.device_shape[0]


def _rows(part: jax.ShapeDtypeStruct, fused: jax.Array, *, rows: slice) -> jax.Array:
    """`rows` of each device's outputs, which are the only dimension that differs."""
    shape = part.shape if part.sharding is None else part.sharding.shard_shape(part.shape)
    pieces = []
    for shard in fused.addressable_shards:
        sizes = zip(shard.data.shape, shape, strict=True)
        index = tuple(slice(None) if whole == own else rows for whole, own in sizes)
        assert index.count(slice(None)) == len(shape) - 1
        pieces.append(shard.data[index])
        assert pieces[-1].shape == shape
    if part.sharding is None:
        (piece,) = pieces
        return piece
    return jax.make_array_from_single_device_arrays(part.shape, part.sharding, pieces)


@functools.cache
def sharded(parts: tuple[int, ...]) -> jax.sharding.NamedSharding:
    """Of all eight devices."""
    sizes = (*parts, 8 // math.prod(parts))
    mesh = jax.make_mesh(sizes, tuple(f"axis{i}" for i in range(len(sizes))))
    return NamedSharding(mesh, Spec(*(f"axis{i}" for i in range(len(parts)))))


def assert_shards_equal(array: jax.Array, expected: np.ndarray, name: str) -> None:
    assert array.shape == expected.shape and array.dtype == expected.dtype, name
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index], err_msg=f"{name}: {shard}")


SPLITS: dict[str, Split] = {
    "outputs": divided(8, 1),
    "inputs": divided(8),
    "both": divided(2, 4),
    "experts": divided(2, 1, 2),
    "copies": divided(1),
}
