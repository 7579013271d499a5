"""A compiled program, read from its optimised HLO text: which loop is the step, where everything else stands.

Hides how loops, conditionals and calls nest, how often a loop turns, and what counts as computing. What travels between
devices is in sharding/traffic.py, what is copied in sharding/copies.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from sharding.hlo import Computation, Instruction, Module

_PRODUCTS = ("dot", "convolution")
_KERNELS = re.compile(r'custom_call_target="(tpu_custom_call|mosaic_gpu|triton|__onednn|__cublas|__gpu\$)')


@dataclass(frozen=True)
class Place:
    """Where a computation stands: inside which loops, outermost first, and whether a conditional decides on it."""

    loops: tuple[str, ...] = ()
    trips: int = 1  # of the loops together; one whose trips the compiler does not know, as a decode loop's, counts once
    branch: bool = False


class Program:
    """A compiled program of one device."""

    def __init__(self, text: str):
        """`text`: as jax's `Compiled.as_text` gives it. ValueError for another."""
        self.module = Module.parse(text)
        self._computes: dict[str, bool] = {}
        self._sizes: dict[str, int] = {}

    @cached_property
    def step_loop(self) -> str | None:
        """The body of the largest loop that computes and turns as often as it turns out: one step of a decode loop.

        None where there is none; loops of as many turns as were written are part of a step.
        """
        bodies = [
            body
            for line in self.module.entry.instructions
            if line.opcode == "while" and self._trips(self.module.entry.name, line) is None
            for body in line.called["body"]
            if self.computes(body)
        ]
        return max(bodies, key=self._size, default=None)

    @cached_property
    def places(self) -> dict[str, Place]:
        """Computation -> its place, of all that run in their own right (not those inside a fusion or a reduction)."""
        found: dict[str, Place] = {}

        def visit(name: str, place: Place) -> None:
            if name in found:
                return
            found[name] = place
            for line in self.module.computations[name].instructions:
                inner = self._inside(name, line, place)
                for callee in line.callees if inner is not None else ():
                    visit(callee, inner)  # type: ignore[arg-type]

        visit(self.module.entry.name, Place())
        return found

    def running(self) -> Iterator[tuple[Computation, Place]]:
        """Every computation of `places`."""
        for name, place in self.places.items():
            yield self.module.computations[name], place

    def label(self, place: Place) -> str:
        """In every step ("step"), in a loop inside it ("inner loop"), where a conditional may lead ("branch"), or
        outside of the step ("once", "other loop").
        """
        if place.branch:
            return "branch"
        if not place.loops:
            return "once"
        if place.loops[0] != self.step_loop:
            return "other loop"
        return "step" if len(place.loops) == 1 else "inner loop"

    @property
    def step_places(self) -> tuple[str, ...]:
        """The labels of what every step runs: of the decode loop where there is one, else of the whole program."""
        return ("step", "inner loop") if self.step_loop is not None else ("once", "other loop")

    @cached_property
    def loops(self) -> dict[str, tuple[str, Instruction]]:
        """Body or condition of a loop -> the computation that the loop is in, and the loop."""
        return {
            callee: (computation.name, line)
            for computation, _ in self.running()
            for line in computation.instructions
            if line.opcode == "while"
            for callee in line.callees
        }

    def computes(self, name: str) -> bool:
        """Whether a computation, or one that it runs, multiplies matrices or runs a kernel."""
        if name not in self._computes:
            self._computes[name] = False
            self._computes[name] = any(map(self.is_compute, self.module.computations[name].instructions))
        return self._computes[name]

    def is_compute(self, line: Instruction) -> bool:
        """Whether a line multiplies matrices or runs a kernel."""
        if line.opcode in _PRODUCTS:
            return True
        if line.opcode == "custom-call":
            return _KERNELS.search(line.attributes) is not None
        return any(self.computes(callee) for callee in line.callees)

    def _size(self, name: str) -> int:
        """Instructions of a computation and of all that it runs."""
        if name not in self._sizes:
            lines = self.module.computations[name].instructions
            self._sizes[name] = len(lines) + sum(self._size(callee) for line in lines for callee in line.callees)
        return self._sizes[name]

    def _inside(self, computation: str, line: Instruction, place: Place) -> Place | None:
        """The place of what a line of `computation` runs; None where that takes no steps of its own."""
        if line.opcode == "while":
            body = line.called["body"][0]
            return Place((*place.loops, body), place.trips * (self._trips(computation, line) or 1), place.branch)
        if line.opcode == "conditional":
            return Place(place.loops, place.trips, True)
        return place if line.opcode == "call" else None

    def _trips(self, computation: str, loop: Instruction) -> int | None:
        """Turns of a loop that counts by one from a constant to another; None of every other."""
        name = loop.called["condition"][0]
        root = self.module.computations[name].root
        ends = list(root.operands)
        if root.opcode == "fusion":
            inner = self.module.computations[root.callees[0]]
            compared = [inner.by_name[operand] for operand in inner.root.operands]
            if any(line.opcode != "parameter" for line in compared):
                return None
            root, ends = inner.root, [root.operands[line.index] for line in compared]
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        first, last = (self._constant(computation, loop, name, end) for end in ends)
        return None if first is None or last is None else last - first

    def _constant(self, home: str, loop: Instruction, computation: str, name: str) -> int | None:
        """The whole number that a value of a loop's condition is when the loop begins."""
        line = self.module.computations[computation].by_name[name]
        if line.opcode == "get-tuple-element":
            start = self.module.computations[home].by_name[loop.operands[0]]
            if start.opcode != "tuple":
                return None
            line, computation = self.module.computations[home].by_name[start.operands[line.index]], home
        while line.opcode in ("copy", "bitcast"):
            line = self.module.computations[computation].by_name[line.operands[0]]
        return int(line.operands[0]) if line.opcode == "constant" and line.operands[0].isdigit() else None
