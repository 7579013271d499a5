"""Placements over the eight virtual devices for tests of loading, and what each shard must be."""

import functools
import math
from collections.abc import Callable

import jax
import numpy as np

from jaxinfer.models.quantized_checkpoint import abstract_weight
from jaxinfer.models.transformer import ParameterSpec
from jaxinfer.placement import PlacedParameter

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
