"""A vocabulary split over virtual devices, and programs under shard_map that show what each device gets."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from sharding.vocabulary import Vocabulary

WHOLE = PartitionSpec()  # the same on every device

# mesh axes, and those that the vocabulary is split over, in its order
SPLITS: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "2": ({"tensor": 2}, ("tensor",)),
    "3": ({"tensor": 3}, ("tensor",)),
    "4": ({"tensor": 4}, ("tensor",)),
    "8": ({"tensor": 8}, ("tensor",)),
    "2x2": ({"pipe": 2, "tensor": 2}, ("pipe", "tensor")),
    "2x2 the other way": ({"pipe": 2, "tensor": 2}, ("tensor", "pipe")),
    "2x2 of 2x2x2": ({"pipe": 2, "data": 2, "tensor": 2}, ("pipe", "tensor")),
}


class Split:
    """A vocabulary of `size` tokens on a mesh of its own."""

    def __init__(self, name: str, size: int):
        shape, axes = SPLITS[name]
        devices = np.array(jax.devices()[: prod(shape.values())]).reshape(tuple(shape.values()))
        self.mesh = Mesh(devices, tuple(shape))
        self.vocabulary = Vocabulary(size, axes, prod(shape[axis] for axis in axes))
        self.columns = PartitionSpec(None, axes)  # of an array [rows, columns]

    def pad(self, x: np.ndarray, fill: Any) -> np.ndarray:
        """`x [rows, size]` with the padding of the last shards."""
        padding = self.vocabulary.local * self.vocabulary.num_shards - x.shape[1]
        return np.pad(x, ((0, 0), (0, padding)), constant_values=fill)

    def compile(self, function: Callable[..., Any], *specs: Any) -> Callable[..., Any]:
        """A program of arguments laid out by `specs`, giving pytrees of what each device gets: [devices, ...]."""
        mapped = jax.shard_map(
            lambda *local: jax.tree.map(lambda x: x[None], function(*local)),
            mesh=self.mesh,
            in_specs=specs,
            out_specs=PartitionSpec(self.mesh.axis_names),
            check_vma=False,
        )
        return jax.jit(mapped)

    def everywhere(self, function: Callable[..., jax.Array], *args: tuple[np.ndarray, PartitionSpec]) -> np.ndarray:
        """What each device of the vocabulary gets, [num_shards, ...], checked to be the same over other axes."""
        arrays, specs = zip(*args, strict=True)
        found = np.asarray(self.compile(function, *specs)(*(jnp.asarray(x) for x in arrays)))
        found = found.reshape(*self.mesh.devices.shape, *found.shape[1:])
        order = (*(axis for axis in self.mesh.axis_names if axis not in self.vocabulary.axes), *self.vocabulary.axes)
        found = np.moveaxis(found, [self.mesh.axis_names.index(axis) for axis in order], range(len(order)))
        found = found.reshape(-1, self.vocabulary.num_shards, *found.shape[len(order) :])
        for other in found[1:]:
            np.testing.assert_array_equal(other, found[0])
        return found[0]


def agreed(found: Any) -> Any:
    """A pytree that all devices must have alike, [devices, ...] -> as one of them has it, in NumPy."""

    def one(x: jax.Array) -> np.ndarray:
        arrays = np.asarray(x)
        for other in arrays[1:]:
            np.testing.assert_array_equal(other, arrays[0])
        return arrays[0]

    return jax.tree.map(one, found)
