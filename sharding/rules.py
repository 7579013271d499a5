"""Which mesh axes each logical axis of a parameter is split over. Models name logical axes and nothing else.

Every other logical axis ("embed", norms' sizes, routers' outputs) is whole on every device: those parameters are small.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from jax.sharding import NamedSharding

from sharding.mesh_config import MeshError, divisors

if TYPE_CHECKING:
    from sharding.mesh import DeviceMesh

_LAYER = ("expert", "tensor")
_ALL_BUT_ROWS = ("pipe", "expert", "tensor")  # what lies before and after the layers is shared by all stages

RULES: Mapping[str, tuple[str, ...]] = {
    "vocab": _ALL_BUT_ROWS,  # rows of the table of logits, padded at the end
    "columns": _ALL_BUT_ROWS,  # of a table that is only looked up: rows come together by a gather, not a sum
    "heads": _LAYER,  # and "kv_heads/8", of 8 K/V heads in all: over as many devices as there are heads at most
    "ffn": _LAYER,
    "experts": ("expert",),
    "expert_ffn": ("tensor",),
}
PADDED = ("vocab",)


class Specified(Protocol):
    """What is known of an array before it exists."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def axes(self) -> tuple[str, ...]: ...


def padded_shape(spec: Specified, mesh: DeviceMesh) -> tuple[int, ...]:
    """The shape in which the array is placed: logical axes of PADDED are filled up to a multiple of their shards."""
    counts = [mesh.count(mesh.axes_of(axis)) if axis in PADDED else 1 for axis in spec.axes]
    return tuple(-(-size // count) * count for size, count in zip(spec.shape, counts, strict=True))


def partition(spec: Specified, mesh: DeviceMesh, *, stacked: bool = False) -> NamedSharding:
    """Sharding of an array by its logical axes; `stacked`: after a first dimension of pipeline stages.

    Raises MeshError where a size does not divide.
    """
    split: list[tuple[str, ...]] = [mesh.names("pipe")] if stacked else []
    for axis, size in zip(spec.axes, padded_shape(spec, mesh), strict=True):
        names = mesh.axes_of(axis)
        if size % mesh.count(names):
            raise MeshError(
                f"axis {axis!r} of size {size} does not divide over {' x '.join(names)} = {mesh.count(names)} devices "
                f"of mesh {mesh}; sizes that do: {', '.join(map(str, divisors(size)))}"
            )
        split.append(names)
    return mesh.sharding(*split)
