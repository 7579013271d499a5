"""Devices as a mesh: named axes, who lies beside whom, and the placement of arrays by logical axes.

Hides jax's Mesh, the sub-axes that `expert` and `tensor` are factored in, and how a function becomes the one program
that every device runs on its own parts of the arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.mesh_config import MeshConfig, MeshError, factors, kv_shards
from sharding.rules import RULES
from sharding.tpu_slice import arranged
from sharding.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class DeviceMesh:
    """A mesh of devices for one model."""

    config: MeshConfig
    mesh: Mesh
    parts: dict[str, tuple[str, ...]]  # axis of MeshConfig -> axes of the mesh that make it up

    def names(self, *axes: str) -> tuple[str, ...]:
        """The mesh's own axes that make up these axes of MeshConfig; those of size 1 are left out."""
        return tuple(name for axis in axes for name in self.parts[axis] if self.mesh.shape[name] > 1)

    def axes_of(self, logical: str) -> tuple[str, ...]:
        """Mesh axes that a logical axis is split over."""
        name, _, heads = logical.partition("/")
        if name != "kv_heads":
            return self.names(*RULES.get(logical, ()))
        wanted, found, count = kv_shards(int(heads), self.config.group), [], 1
        for name in self.names("expert", "tensor"):
            if count == wanted:
                break
            found.append(name)
            count *= self.mesh.shape[name]
        return tuple(found)

    def count(self, names: Iterable[str]) -> int:
        """Devices along these mesh axes."""
        return math.prod(self.mesh.shape[name] for name in names)

    def sharding(self, *split: tuple[str, ...]) -> NamedSharding:
        """Of an array whose i-th dimension is split over the mesh axes `split[i]`; further dimensions are whole."""
        return NamedSharding(self.mesh, PartitionSpec(*(names or None for names in split)))

    @property
    def everywhere(self) -> NamedSharding:
        """Of an array that every device holds whole."""
        return self.sharding()

    @property
    def by_data(self) -> NamedSharding:
        """Of an array whose first dimension is split over `data`."""
        return self.sharding(self.names("data"))

    @property
    def by_device(self) -> NamedSharding:
        """Of arrays that every device has one of its own of: all of them stacked along the first dimension."""
        return self.sharding(tuple(self.mesh.axis_names))

    def vocabulary(self, size: int) -> Vocabulary:
        """How a vocabulary is split."""
        names = self.axes_of("vocab")
        return Vocabulary(size, names, self.count(names))

    def run(self, function: Callable[..., Any], arguments: Any, results: Any) -> Callable[..., Any]:
        """`function` of every device's own parts, as one function of whole arrays.

        `arguments`, `results`: pytrees of NamedSharding, as prefixes of the function's.
        """
        specs = [jax.tree.map(lambda s: s.spec, tree, is_leaf=_is_sharding) for tree in (arguments, results)]
        return jax.shard_map(function, mesh=self.mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)

    def __str__(self) -> str:
        return str(self.config)


def _is_sharding(leaf: Any) -> bool:
    return isinstance(leaf, NamedSharding)


def make_mesh(
    config: MeshConfig, kv_heads: Iterable[int] = (), devices: Sequence[jax.Device] | None = None
) -> DeviceMesh:
    """A mesh of the first devices there are (or of `devices`) for a model whose layers have these numbers of K/V heads.

    Raises MeshError where there are too few devices, or K/V heads cannot be split.
    """
    found = list(jax.devices() if devices is None else devices)
    if len(found) < config.num_devices:
        raise MeshError(
            f"mesh {config} needs {config.num_devices} devices and there are {len(found)} of kind "
            f"{found[0].device_kind!r}; make the axes' product at most that (on CPUs JAX_NUM_CPU_DEVICES sets how many)"
        )
    expert, tensor = factors(config, kv_heads)
    parts = {axis: _named(axis, (size,)) for axis, size in config.sizes.items()}
    parts["expert"], parts["tensor"] = _named("expert", expert), _named("tensor", tensor)
    axes = [pair for axis in config.sizes for pair in parts[axis]]
    grid = arranged(found[: config.num_devices], list(config.sizes.values()))
    mesh = Mesh(grid.reshape([size for _, size in axes]), tuple(name for name, _ in axes))
    return DeviceMesh(config, mesh, {axis: tuple(name for name, _ in pairs) for axis, pairs in parts.items()})


def _named(axis: str, sizes: tuple[int, ...]) -> tuple[tuple[str, int], ...]:
    if len(sizes) == 1:
        return ((axis, sizes[0]),)
    return tuple((f"{axis}{index}", size) for index, size in enumerate(sizes))
