"""The collectives of a compiled program: what kind, how many bytes, where they stand, and what computes beside them.

Hides the forms in which XLA writes one: plain, start and done, wrapped, fused, taken over by another core, and the ways
to say which devices take part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sharding.hlo import Computation, Instruction
from sharding.program import Place, Program

KINDS = (
    "all-reduce",
    "reduce-scatter",
    "all-gather",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_WRAPPERS = ("fusion", "async-start", "call-start")
_SEMAPHORES = (2, 3, 4)  # memory spaces: what a start hands on, and its done waits for


@dataclass(frozen=True)
class Collective:
    """One collective of one device."""

    name: str
    kind: str
    source: str  # jax's name of it; "" where the compiler joined several
    payload_bytes: int  # the whole that a group's devices reduce, gather or exchange; of a permute: what one sends
    group_size: int
    place: str  # `Program.label` of it
    times: int  # how often it runs per step, or in all where it is in no step
    is_async: bool
    beside: tuple[str, ...] = ()  # matrix products and kernels that run between its start and its done

    @property
    def sent_bytes(self) -> float:
        """What a device sends each time, in a ring: no algorithm that shares the work evenly sends less."""
        share = (self.group_size - 1) / self.group_size
        if self.kind == "all-reduce":
            return 2 * share * self.payload_bytes
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.payload_bytes)
        return share * self.payload_bytes


def collectives(program: Program) -> tuple[Collective, ...]:
    """Every collective once, in the order of the text."""
    return tuple(
        collective
        for computation, place in program.running()
        for collective in _collectives(program, computation, place)
    )


def of_step(found: Iterable[Collective], program: Program) -> tuple[Collective, ...]:
    """Those that every step runs."""
    return tuple(collective for collective in found if collective.place in program.step_places)


def sent_bytes(found: Iterable[Collective]) -> float:
    """What a device sends in all of them, as often as each runs."""
    return sum(collective.sent_bytes * collective.times for collective in found)


def overlap(found: Iterable[Collective]) -> float | None:
    """The share of bytes that are sent while a product or a kernel runs beside them; None where none are sent."""
    found = tuple(found)
    total = sent_bytes(found)
    return sent_bytes(collective for collective in found if collective.beside) / total if total else None


def _collectives(program: Program, computation: Computation, place: Place) -> Iterator[Collective]:
    lines = computation.instructions
    roles = {line.name: _role(program, line) for line in lines}
    position = {line.name: index for index, line in enumerate(lines)}
    spans: dict[str, tuple[int, int]] = {}  # name of a start -> positions of the first that had data, and of the done
    for index, line in enumerate(lines):
        chain = _chain(computation, line, roles) if roles[line.name] == "done" else []
        if chain:
            fed = [name for name in chain if set(computation.by_name[name].operands) - set(chain)]
            spans[chain[0]] = (position[(fed or chain)[0]], index)
    for line in lines:
        role = roles[line.name]
        if role in ("plain", "start"):
            first, last = spans.get(line.name, (0, 0))
            between = lines[first + 1 : last] if program.module.is_scheduled else ()
            beside = tuple(other.name for other in between if program.is_compute(other))
            yield _collective(program, computation, line, place, role == "start", beside)


def _role(program: Program, line: Instruction) -> str | None:
    """What a line is to a collective: "plain", "start", "update" or "done"; None: nothing."""
    opcode = line.opcode
    if opcode in KINDS:
        return "plain"
    if opcode.endswith("-start") and (opcode.removesuffix("-start") in KINDS or _inner(program, line) is not None):
        return "start"
    if opcode in ("async-update", "call-update"):
        return "update"
    if opcode.endswith("-done") and opcode not in ("copy-done", "slice-done"):
        return "done"
    inner = _inner(program, line) if opcode == "fusion" else None
    if inner is None:
        return None
    root = program.module.computations[line.callees[0]].root
    target = root.attribute(r'custom_call_target="AsyncCollective(Start|Done)"')
    if target is not None:
        return target.lower()
    return "update" if "async_collective_fusion_config" in inner[1].attributes else "plain"


def _inner(program: Program, line: Instruction) -> tuple[Computation, Instruction] | None:
    """The collective that a fusion or a wrapper is around, with the computation it is in."""
    for name in line.callees if line.opcode in _WRAPPERS else ():
        computation = program.module.computations[name]
        for inner in computation.instructions:
            if inner.opcode.removesuffix("-start") in KINDS:
                return computation, inner
            deeper = _inner(program, inner)
            if deeper is not None:
                return deeper
    return None


def _chain(computation: Computation, done: Instruction, roles: dict[str, str | None]) -> list[str]:
    """Start and updates of an asynchronous collective, in order; [] where its start is in another computation."""
    found: list[str] = []
    seen: set[str] = set()
    pending = [*done.operands]
    while pending:
        line = computation.by_name[pending.pop()]
        if line.name in seen:
            continue
        seen.add(line.name)
        if roles[line.name] in ("start", "update"):
            found.append(line.name)
            if roles[line.name] == "start":
                return found[::-1]
            pending += line.operands
        elif line.opcode == "get-tuple-element" and line.arrays and line.arrays[0].memory_space in _SEMAPHORES:
            pending += line.operands
    return []


def _collective(
    program: Program,
    computation: Computation,
    line: Instruction,
    place: Place,
    is_async: bool,
    beside: tuple[str, ...],
) -> Collective:
    home, inner = _inner(program, line) or (computation, line)
    kind = inner.opcode.removesuffix("-start")
    operand_bytes = sum(home.by_name[name].num_bytes for name in inner.operands)
    group_size = _group_size(inner, program.module.num_devices)
    if kind == "all-reduce" and home is not computation and home.root.opcode in ("slice", "dynamic-slice"):
        kind = "reduce-scatter"  # as TPUs have it: an all-reduce of which each device keeps its part
    return Collective(
        name=line.name,
        kind=kind,
        source=inner.source or line.source,
        payload_bytes=operand_bytes * (group_size if kind == "all-gather" else 1),
        group_size=group_size,
        place=program.label(place),
        times=place.trips,
        is_async=is_async,
        beside=beside,
    )


def _group_size(line: Instruction, num_devices: int) -> int:
    """Devices that take part together: of a permute, those that data travels through before it comes back."""
    if line.opcode.startswith("collective-permute"):
        return _ring_size(line)
    listed = line.attribute(r"replica_groups=\{\{([\d,]+)\}")
    if listed:
        return listed.count(",") + 1
    iota = line.attribute(r"replica_groups=\[\d+,(\d+)\]<=")
    if iota:
        return int(iota)
    named = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line.attributes)
    if named is None:
        return num_devices
    sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
    size = 1
    for axis, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2]):
        size *= int(part) if part else sizes[axis]
    return size


def _ring_size(permute: Instruction) -> int:
    pairs = dict(
        re.findall(r"\{(\d+),(\d+)\}", permute.attribute(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}") or "")
    )
    at = start = next(iter(pairs), "")
    seen = {at}
    while (at := pairs.get(at, start)) not in seen:
        seen.add(at)
    return len(seen)
