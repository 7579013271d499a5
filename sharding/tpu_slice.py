"""A slice of TPU chips by its name, "v6e:4x4": its shape, its links, and an order of devices that makes good meshes.

Hides which shapes there are, which of them are tori, how many devices a chip is, and walks along neighbours. No jax.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pallas_kernels import devices
from pallas_kernels.devices import Device

# Slices that can be had (Google Cloud's TPU pages), and one chip alone.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    *("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
    "16x16x16",
    "16x16x24",
)
SHAPES = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _CUBES, "tpu7x": _CUBES}
_HOST = (2, 2, 1)  # chips of one host, of the shapes that more than one host may have


@dataclass(frozen=True)
class Slice:
    """Chips of one kind, joined by their interconnect."""

    device: Device
    shape: tuple[int, ...]  # chips along x and y, or x, y and z

    @classmethod
    def parse(cls, text: str) -> Slice:
        """`"v6e:4x4"`. ValueError names the kinds or, of this kind, the shapes that there are."""
        kind, colon, shape = text.partition(":")
        if kind not in SHAPES:
            names = ", ".join(f"{name}:{shapes[3]}" for name, shapes in SHAPES.items())
            raise ValueError(f"device {text!r}: {kind!r} is not one of {', '.join(SHAPES)}; write for example {names}")
        if shape not in SHAPES[kind]:
            problem = f"{shape!r} is no topology of {kind}" if colon else "the topology is missing"
            raise ValueError(f"device {text!r}: {problem}; there are {', '.join(SHAPES[kind])}")
        return cls(devices.named(kind), tuple(map(int, shape.split("x"))))

    @classmethod
    def smallest(cls, kind: str, num_devices: int) -> Slice:
        """The slice of `kind` with exactly that many devices. ValueError where there is none."""
        pieces = [cls.parse(f"{kind}:{shape}") for shape in SHAPES.get(kind, ())] or [cls.parse(kind)]
        for piece in pieces:
            if piece.num_devices == num_devices:
                return piece
        sizes = ", ".join(f"{piece.num_devices} ({piece.name})" for piece in pieces)
        raise ValueError(f"device {kind!r}: no topology has {num_devices} devices; there are {sizes}")

    @property
    def name(self) -> str:
        return f"{self.device.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.device.devices_per_chip

    @property
    def host_bounds(self) -> tuple[int, ...] | None:
        """Chips of a host as libtpu wants to be told, where they are not its default."""
        bounds = (*self.shape, 1)[:3]
        return bounds if any(size % least for size, least in zip(bounds, _HOST, strict=True)) else None

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Along which dimensions the last chip is linked to the first: 16 chips on a plane, cubes of 4 x 4 x 4."""
        if len(self.shape) == 2:
            return tuple(size == 16 for size in self.shape)
        whole = all(size % 4 == 0 for size in self.shape)
        return (whole,) * 3

    def links(self, num_devices: int | None = None) -> int:
        """Links to others of the chip that has the fewest, in the whole slice or in the box of so many devices."""
        chips = self.num_chips if num_devices is None else max(1, num_devices // self.device.devices_per_chip)
        box = _box(self.shape, chips)
        if box is None:
            return 1  # no box: at worst a line of neighbours
        sides = zip(box, self.shape, self.wraps, strict=True)
        return sum(0 if size == 1 else 2 if wraps and size == whole > 2 else 1 for size, whole, wraps in sides)


def arranged(found: Sequence[Any], sizes: Sequence[int]) -> np.ndarray:
    """Devices as an array of shape `sizes`: those that differ in the last axes only form a box of the slice and, in
    order, a ring of neighbours; so do the boxes. Devices without coordinates keep their order.
    """
    ordered = list(found)
    if all(getattr(device, "coords", None) is not None for device in found):
        chips: dict[tuple[int, ...], list[Any]] = {}
        for device in found:
            chips.setdefault(tuple(device.coords), []).append(device)
        shape = tuple(max(at) + 1 for at in zip(*chips, strict=True))
        if math.prod(shape) == len(chips):  # else they are no box, and any order is as good
            per_chip = len(found) // len(chips)
            inner = list(itertools.accumulate(reversed(sizes), lambda a, b: a * b))
            levels = [size // per_chip for size in inner if size % per_chip == 0]
            ordered = [device for at in _walk(shape, levels) for device in chips[at]]
    grid = np.empty(len(ordered), object)
    grid[:] = ordered
    return grid.reshape(tuple(sizes))


def _walk(shape: tuple[int, ...], levels: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every position of a grid once; each run of `levels[i]` positions is a box, as far as there is one."""
    volume = math.prod(shape)
    boxes = [_box(shape, level) for level in sorted(levels, reverse=True) if 1 < level < volume]
    box = next(filter(None, boxes), None)
    if box is None:
        yield from _ring(shape)
        return
    tiles = tuple(size // part for size, part in zip(shape, box, strict=True))
    for tile in _ring(tiles):
        for at in _walk(box, levels):
            yield tuple(corner * part + offset for corner, part, offset in zip(tile, box, at, strict=True))


def _box(shape: tuple[int, ...], volume: int) -> tuple[int, ...] | None:
    """The box of that volume that tiles the grid and has the shortest edges; None where there is none."""
    choices = [[n for n in range(1, size + 1) if size % n == 0] for size in shape]
    boxes = [box for box in itertools.product(*choices) if math.prod(box) == volume]
    return min(boxes, key=lambda box: (sum(box), box), default=None)


def _ring(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Every position of a grid once, each a neighbour of the one before, the last of the first where that can be."""
    order = sorted(range(len(shape)), key=lambda axis: shape[axis] % 2)  # an even axis first: then a ring closes
    rows = shape[order[0]]
    across = list(_snake([shape[axis] for axis in order[1:]]))
    positions = list(itertools.product([0], range(rows))) if len(across) == 1 else _closed(rows, len(across))
    for column, row in positions:
        at = dict(zip(order, (row, *across[column]), strict=True))
        yield tuple(at[axis] for axis in range(len(shape)))


def _closed(rows: int, columns: int) -> list[tuple[int, int]]:
    """(column, row) of a grid: to and fro through all columns but the first, row by row, and back along the first."""
    if rows == 1:
        return [(column, 0) for column in range(columns)]
    inner = [(column if row % 2 == 0 else columns - column, row) for row in range(rows) for column in range(1, columns)]
    return [*inner, *((0, row) for row in reversed(range(rows)))]


def _snake(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every position of a grid once, each a neighbour of the one before."""
    if not sizes:
        yield ()
        return
    for first, rest in enumerate([list(_snake(sizes[1:]))] * sizes[0]):
        yield from ((first, *at) for at in (rest if first % 2 == 0 else reversed(rest)))
