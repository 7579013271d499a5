"""Which regions of each parameter this process reads, in what order, and how far ahead of who takes them.

Hides shards, stages and padding from the readers of checkpoints: a region that several of this process's devices hold
is read once, and one that none of them holds is not.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxinfer.models.host_memory import aligned_empty
from jaxinfer.models.regions import Host, Region, StoredParameter, Target, normalized, overlap, whole
from jaxinfer.placement import PlacedParameter

READ_AHEAD_BYTES = 256 << 20  # of what is being read while something is taken; what is larger is alone


@dataclass(frozen=True)
class Shard:
    """A region of a parameter, and the devices of this process that hold it."""

    region: Region  # of PlacedParameter.shape
    devices: tuple[Any, ...]  # (None,): the default device


@dataclass(frozen=True)
class Read:
    """Shards of one parameter that are read together."""

    parameter: PlacedParameter
    shards: tuple[Shard, ...]
    last: bool  # of the parameter's
    num_bytes: int  # in host memory

    def needs(self) -> Iterator[tuple[str, Region]]:
        """The regions of logical parameters, by name, that it is made of."""
        for shard in self.shards:
            for name, region, _ in _stages(self.parameter, shard.region):
                found = overlap(region, whole(self.parameter.spec.shape))
                if found is not None:
                    yield name, found


def planned(parameters: Sequence[PlacedParameter]) -> list[Read]:
    """All that this process has to read, in the order of the parameters."""
    return [read for parameter in parameters for read in _reads(parameter)]


def _reads(parameter: PlacedParameter) -> Iterator[Read]:
    shards, abstract = _shards(parameter), jax.tree.leaves(parameter.abstract())
    shard_bytes = sum(math.prod(_local(leaf)) * leaf.dtype.itemsize for leaf in abstract)
    groups: list[list[Shard]] = []
    for shard in shards:
        if groups and _belongs(parameter, shard, groups[-1], shard_bytes):
            groups[-1].append(shard)
        else:
            groups.append([shard])
    for index, group in enumerate(groups):
        yield Read(parameter, tuple(group), index == len(groups) - 1, shard_bytes * len(group))


def _shards(parameter: PlacedParameter) -> list[Shard]:
    """In the order of their first elements."""
    if parameter.sharding is None:
        return [Shard(whole(parameter.shape), (None,))]
    devices: dict[tuple[tuple[int, int], ...], list[Any]] = defaultdict(list)
    for device, index in parameter.sharding.addressable_devices_indices_map(parameter.shape).items():
        region = normalized(index or (), parameter.shape)
        devices[tuple((part.start, part.stop) for part in region)].append(device)
    assert devices, f"no device of this process holds any of {parameter.names[0]}: {parameter.sharding}"
    return [
        Shard(tuple(slice(*bounds) for bounds in region), tuple(found)) for region, found in sorted(devices.items())
    ]


def _belongs(parameter: PlacedParameter, shard: Shard, group: list[Shard], shard_bytes: int) -> bool:
    """Whether a shard is read with those before it: their bytes lie among one another in the files."""
    if parameter.spec.format is not None:  # of the same matrices, which are read and unpacked whole
        return shard.region[:-2] == group[-1].region[:-2]
    return shard_bytes * (len(group) + 1) <= READ_AHEAD_BYTES


def _local(leaf: Any) -> tuple[int, ...]:
    """The shape of one shard of an array."""
    return leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)


def _stages(parameter: PlacedParameter, region: Region) -> Iterator[tuple[str, Region, int | None]]:
    """Names and regions of the logical parameters in a region, and their places along its first axis if stacked."""
    if not parameter.stacked:
        yield parameter.names[0], region, None
        return
    for place, stage in enumerate(range(region[0].start, region[0].stop)):
        yield parameter.names[stage], region[1:], place


def read_in_order(
    reads: Iterable[Read], stored: Mapping[str, StoredParameter], pool: ThreadPoolExecutor, num_threads: int
) -> Iterator[tuple[Read, list[Host]]]:
    """Each read with its shards' arrays in host memory, while those that follow are being read."""
    ahead: deque[tuple[Read, list[Host], list[Future[None]]]] = deque()
    for read in reads:
        while ahead and _must_wait(read, [other for other, _, _ in ahead], num_threads):
            yield _finished(*ahead.popleft())
        hosts = [_allocated(read.parameter, shard) for shard in read.shards]
        jobs = [job for name, targets in _targets(read, hosts).items() for job in stored[name].jobs(targets)]
        ahead.append((read, hosts, [pool.submit(job) for job in jobs]))
    while ahead:
        yield _finished(*ahead.popleft())


def _must_wait(read: Read, ahead: list[Read], num_threads: int) -> bool:
    """Whether there is no room for it beside those that are being read."""
    if read.parameter.spec.format is not None and len(ahead) < num_threads:
        return False  # one thread unpacks a quantized weight: with fewer of them, threads would idle
    return sum(other.num_bytes for other in ahead) + read.num_bytes > READ_AHEAD_BYTES


def _finished(read: Read, hosts: list[Host], jobs: list[Future[None]]) -> tuple[Read, list[Host]]:
    for job in jobs:
        job.result()  # re-raises what a read raised
    return read, hosts


def _allocated(parameter: PlacedParameter, shard: Shard) -> Host:
    """A shard's arrays; what of them is padding is zeros."""
    host = jax.tree.map(lambda leaf: aligned_empty(_local(leaf), leaf.dtype), parameter.abstract())
    for _, region, _ in _stages(parameter, shard.region):
        if overlap(region, whole(parameter.spec.shape)) != region:
            assert parameter.spec.format is None, f"{parameter.names[0]} is quantized and padded"
            host.fill(0)
            break
    return host


def _targets(read: Read, hosts: list[Host]) -> dict[str, list[Target]]:
    """What is read into the shards' arrays, by logical parameter."""
    found: dict[str, list[Target]] = defaultdict(list)
    for shard, host in zip(read.shards, hosts, strict=True):
        for name, region, place in _stages(read.parameter, shard.region):
            inside = overlap(region, whole(read.parameter.spec.shape))
            if inside is None:
                continue
            into: Any = host if place is None else jax.tree.map(lambda leaf, place=place: _view(leaf, place), host)
            if inside != region:
                into = into[tuple(slice(0, part.stop - part.start) for part in inside)]
            found[name].append(Target(inside, into))
    return found


def _view(leaf: np.ndarray, place: int) -> np.ndarray:
    """`leaf[place]`, a view also where that is a single number."""
    return leaf[place : place + 1].reshape(leaf.shape[1:])
