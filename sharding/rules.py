"""Which mesh axis each logical axis of a parameter is split over. Models name logical axes and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from jax.sharding import Mesh, NamedSharding, PartitionSpec

# logical axis -> mesh axis; an axis that is absent here, or a mesh axis that the mesh lacks, means replicated
RULES: Mapping[str, str] = {"vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "ffn": "tensor"}


class Specified(Protocol):
    """What is known of an array before it exists."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def axes(self) -> tuple[str, ...]: ...


def partition(spec: Specified, mesh: Mesh) -> NamedSharding:
    """Sharding of an array by its logical axes. Raises ValueError where a size does not divide, naming it."""
    split: list[str | None] = []
    for axis, size in zip(spec.axes, spec.shape, strict=True):
        mesh_axis = RULES.get(axis)
        if mesh_axis is None or mesh_axis not in mesh.shape:
            split.append(None)
            continue
        if size % mesh.shape[mesh_axis]:
            choices = [n for n in range(1, mesh.shape[mesh_axis] + 1) if size % n == 0]
            raise ValueError(
                f"axis {axis!r} of size {size} does not divide over {mesh_axis}={mesh.shape[mesh_axis]}; "
                f"sizes that do: {choices}"
            )
        split.append(mesh_axis)
    return NamedSharding(mesh, PartitionSpec(*split))
