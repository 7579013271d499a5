"""Boxes of a parameter: what a device holds of it and what a read fetches, and where in memory that goes.

Imports no reader: dense, quantized and Orbax ones all take targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pallas_kernels.tensors import QuantizedTensor

Region = tuple[slice, ...]  # one per dimension; starts and stops are numbers, steps are 1
Job = Callable[[], None]
Host = np.ndarray | QuantizedTensor  # of NumPy arrays


@dataclass(frozen=True)
class Target:
    """A region of a parameter `[..., out, in]`, and host memory of its size to be filled, views included.

    A `QuantizedTensor` is one of the region alone: its blocks of nibbles are those of the region's inputs.
    """

    region: Region
    into: Any  # np.ndarray, or a QuantizedTensor of them


class StoredParameter(Protocol):
    """One parameter of a checkpoint of any format."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def num_bytes(self, region: Region) -> int:
        """Bytes of the checkpoint that hold the region."""
        ...

    def jobs(self, targets: Sequence[Target]) -> list[Job]:
        """What fills the targets, in any order and on any threads; together they read what the targets share once."""
        ...


def whole(shape: Sequence[int]) -> Region:
    """All of an array."""
    return tuple(slice(0, size) for size in shape)


def lengths(region: Region) -> tuple[int, ...]:
    """The shape of an array of the region."""
    return tuple(part.stop - part.start for part in region)


def num_elements(region: Region) -> int:
    return math.prod(lengths(region))


def normalized(index: Sequence[slice], shape: Sequence[int]) -> Region:
    """An index of slices, as shardings give it, with numbers for what is left out."""
    bounds = [part.indices(size) for part, size in zip(index, shape, strict=True)]
    assert all(step == 1 for _, _, step in bounds), index
    return tuple(slice(start, stop) for start, stop, _ in bounds)


def overlap(region: Region, other: Region) -> Region | None:
    """What two regions share; None where that is nothing."""
    found = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(region, other, strict=True))
    return found if all(part.start < part.stop for part in found) else None


def relative(region: Region, origin: Region) -> Region:
    """The region as counted from the first corner of `origin`."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(region, origin, strict=True))
