"""Which regions of each parameter this process reads, in what order, and how far ahead of who takes them.

Hides shards, stages, fused parameters and padding from the readers of checkpoints: a region that several of this
process's devices hold is read once, and one that none of them holds is not.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxinfer.models.host_memory import aligned_empty
from jaxinfer.models.regions import Host, Region, StoredParameter, Target, normalized, overlap, whole
from jaxinfer.placement import PlacedParameter
from pallas_kernels.tensors import QuantizedTensor

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
        for piece in {piece.key: piece for shard in self.shards for piece in _pieces(self.parameter, shard)}.values():
            if piece.stored is not None:
                yield piece.name, piece.stored


@dataclass(frozen=True)
class _Piece:
    """What of a shard is one logical parameter's: its region of that, and where it goes in the shard's arrays."""

    name: str
    region: Region
    stored: Region | None  # without padding; None: nothing but padding
    place: int | None  # along the first axis, if stacked
    outputs: slice | None  # of a fused parameter's

    @property
    def key(self) -> tuple[str, Region]:
        """The same for pieces with the same content."""
        return self.name, self.region

    def of(self, host: Host) -> Any:
        """Views of the shard's arrays."""
        own: Any = host
        if self.place is not None:
            own = jax.tree.map(partial(_view, place=self.place), host)
        if self.outputs is not None:
            own = _outputs(own, self.outputs)
        if self.stored == self.region:
            return own
        assert self.stored is not None, "nothing but padding"
        return own[tuple(slice(0, part.stop - part.start) for part in self.stored)]


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
    """Whether a shard is read with those before it: their bytes lie among one another in the files, or are the same."""
    if {piece.key for piece in _pieces(parameter, shard)} & {piece.key for piece in _pieces(parameter, group[-1])}:
        return True  # K/V heads of which there are fewer than devices
    if parameter.spec.format is not None:  # of the same matrices, which are read and unpacked whole
        return shard.region[:-2] == group[-1].region[:-2]
    return shard_bytes * (len(group) + 1) <= READ_AHEAD_BYTES


def _local(leaf: Any) -> tuple[int, ...]:
    """The shape of one shard of an array."""
    return leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)


def _pieces(parameter: PlacedParameter, shard: Shard) -> Iterator[_Piece]:
    if not parameter.parts:
        yield from _stages(parameter, shard.region, None)
        return
    first = 0
    for part in parameter.parts:
        rows = part.device_shape[0]
        yield from _stages(part, _region(part, shard.devices[0]), slice(first, first + rows))
        first += rows


def _region(parameter: PlacedParameter, device: Any) -> Region:
    """What a device holds."""
    if parameter.sharding is None:
        return whole(parameter.shape)
    return normalized(
        parameter.sharding.addressable_devices_indices_map(parameter.shape)[device] or (), parameter.shape
    )


def _stages(parameter: PlacedParameter, region: Region, outputs: slice | None) -> Iterator[_Piece]:
    """The logical parameters in a region: one, or one per stage."""
    everything = whole(parameter.spec.shape)
    if not parameter.stacked:
        yield _Piece(parameter.names[0], region, overlap(region, everything), None, outputs)
        return
    stored = overlap(region[1:], everything)
    for place, stage in enumerate(range(region[0].start, region[0].stop)):
        yield _Piece(parameter.names[stage], region[1:], stored, place, outputs)


def read_in_order(
    reads: Iterable[Read], stored: Mapping[str, StoredParameter], pool: ThreadPoolExecutor, num_threads: int
) -> Iterator[tuple[Read, list[Host]]]:
    """Each read with its shards' arrays in host memory, while those that follow are being read."""
    ahead: deque[_Reading] = deque()
    for read in reads:
        while ahead and _must_wait(read, [other.read for other in ahead], num_threads):
            yield ahead.popleft().finished()
        hosts = [_allocated(read.parameter, shard) for shard in read.shards]
        targets, copies = _targets(read, hosts)
        jobs = [job for name, own in targets.items() for job in stored[name].jobs(own)]
        ahead.append(_Reading(read, hosts, [pool.submit(job) for job in jobs], copies))
    while ahead:
        yield ahead.popleft().finished()


@dataclass(frozen=True)
class _Reading:
    """A read on its way."""

    read: Read
    hosts: list[Host]
    jobs: list[Future[None]]
    copies: list[tuple[Any, Any]]  # what is read once and needed elsewhere too, and where

    def finished(self) -> tuple[Read, list[Host]]:
        for job in self.jobs:
            job.result()  # re-raises what a read raised
        for source, target in self.copies:
            jax.tree.map(np.copyto, target, source)
        return self.read, self.hosts


def _must_wait(read: Read, ahead: list[Read], num_threads: int) -> bool:
    """Whether there is no room for it beside those that are being read."""
    if read.parameter.spec.format is not None and len(ahead) < num_threads:
        return False  # one thread unpacks a quantized weight: with fewer of them, threads would idle
    return sum(other.num_bytes for other in ahead) + read.num_bytes > READ_AHEAD_BYTES


def _allocated(parameter: PlacedParameter, shard: Shard) -> Host:
    """A shard's arrays; what of them is padding is zeros."""
    host = jax.tree.map(lambda leaf: aligned_empty(_local(leaf), leaf.dtype), parameter.abstract())
    if any(piece.stored != piece.region for piece in _pieces(parameter, shard)):
        assert parameter.spec.format is None, f"{parameter.label} is quantized and padded"
        host.fill(0)
    return host


def _targets(read: Read, hosts: list[Host]) -> tuple[dict[str, list[Target]], list[tuple[Any, Any]]]:
    """What is read into the shards' arrays, by logical parameter, and what is copied within them then."""
    found: dict[str, list[Target]] = defaultdict(list)
    first: dict[Any, Any] = {}
    copies = []
    for shard, host in zip(read.shards, hosts, strict=True):
        for piece in _pieces(read.parameter, shard):
            if piece.stored is None:
                continue
            into = piece.of(host)
            if piece.key in first:
                copies.append((first[piece.key], into))
                continue
            first[piece.key] = into
            found[piece.name].append(Target(piece.stored, into))
    return found, copies


def _view(leaf: np.ndarray, place: int) -> np.ndarray:
    """`leaf[place]`, a view also where that is a single number."""
    return leaf[place : place + 1].reshape(leaf.shape[1:])


def _outputs(host: Host, rows: slice) -> Host:
    """Some outputs of a weight `[out, in]` or a bias `[out]`."""
    if not isinstance(host, QuantizedTensor):
        return host[rows]
    scales, zeros = (None if leaf is None else leaf[..., rows] for leaf in (host.scales, host.zeros))
    return replace(host, values=host.values[rows], scales=scales, zeros=zeros)
