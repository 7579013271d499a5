"""Which axes a mesh has and how large they are: `tensor=4,context=2`. No jax: schedulers and parsers read it too.

Hides the spelling, the limits, and how a tensor axis is factored so that fewer K/V heads than devices are replicated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

MAX_DEVICES = 1 << 16  # of one mesh: more than any pod has


class MeshError(ValueError):
    """A mesh that cannot be, or that a model cannot be split over; the message names the value and what would do."""


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of a mesh's axes; devices that differ in the last axis only are neighbours."""

    pipe: int = 1  # stages: layers are split, micro-batches of slots circulate
    data: int = 1  # slots and their K/V are split, weights repeated
    context: int = 1  # a sequence's K/V pages are spread, weights repeated
    expert: int = 1  # experts are split; all else as over `tensor`
    tensor: int = 1  # heads, MLPs and vocabulary are split

    def __post_init__(self) -> None:
        for axis, size in self.sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise MeshError(f"mesh axis {axis}={size!r} must be a whole number of at least 1")
        if self.num_devices > MAX_DEVICES:
            raise MeshError(f"mesh {self} has {self.num_devices:,} devices; the limit is {MAX_DEVICES:,}")

    @classmethod
    def parse(cls, text: str) -> MeshConfig:
        """`"tensor=4,context=2"`; an axis that is not named has size 1. Raises MeshError."""
        sizes: dict[str, int] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            axis, equals, size = (word.strip() for word in part.partition("="))
            if axis not in AXES:
                raise MeshError(f"mesh {text!r}: axis {axis!r} is not one of {', '.join(AXES)}")
            if not equals or not size.isascii() or not size.isdecimal() or len(size) > 9:
                raise MeshError(f"mesh {text!r}: {part!r} must be {axis}=SIZE, a whole number of at least 1")
            if axis in sizes:
                raise MeshError(f"mesh {text!r} names axis {axis!r} twice")
            sizes[axis] = int(size)
        return cls(**sizes)

    @property
    def sizes(self) -> dict[str, int]:
        """Axis -> size, outermost first."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def num_devices(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def group(self) -> int:
        """Devices that one layer's dense weights are split over: the tensor group."""
        return self.expert * self.tensor

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in self.sizes.items() if size > 1) or "one device"


AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))


def divisors(size: int) -> list[int]:
    """The whole numbers that divide `size`, ascending."""
    small = [n for n in range(1, math.isqrt(size) + 1) if size % n == 0]
    return sorted({*small, *(size // n for n in small)})


def kv_shards(kv_heads: int, group: int, groups: Iterable[int] = range(1, 65)) -> int:
    """Into how many parts `kv_heads` heads are split over a tensor group; below `group`, parts are repeated.

    Raises MeshError unless heads divide among the devices, or devices among the heads; it offers those of `groups`.
    """
    if kv_heads % group == 0:
        return group
    if group % kv_heads == 0:
        return kv_heads
    fits = [size for size in groups if kv_heads % size == 0 or size % kv_heads == 0]
    raise MeshError(
        f"kv_heads={kv_heads} neither divide among expert*tensor={group} devices nor are divided by them; sizes that "
        f"would do: {', '.join(map(str, fits))}"
    )


def factors(config: MeshConfig, kv_heads: Iterable[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of the sub-axes that make up `expert` and `tensor`, such that each K/V split is over leading ones.

    `kv_heads`: every number of K/V heads that the model's layers have. Raises MeshError where no order serves all.
    """
    marks = sorted({1, config.expert, config.group, *(kv_shards(heads, config.group) for heads in kv_heads)})
    for low, high in pairwise(marks):
        if high % low:
            raise MeshError(
                f"mesh {config}: K/V heads {sorted(set(kv_heads))} need splits into {low} and into {high} parts, which "
                "do not nest; use sizes that are powers of two, or fewer devices per layer"
            )
    steps = [(high, high // low) for low, high in pairwise(marks)]
    expert = tuple(step for mark, step in steps if mark <= config.expert)
    tensor = tuple(step for mark, step in steps if mark > config.expert)
    return expert or (1,), tensor or (1,)
