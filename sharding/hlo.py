"""Optimised HLO text as instructions and computations. Pure text: it needs no jax and no device.

Hides the grammar: nested tuple shapes, layouts with tiles and memory spaces, operands, and who calls whom.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128, "bf16": 16}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"  (ROOT )?%([\w.-]+) = ")
_COMMENT = re.compile(r"/\*.*?\*/")
_NAME = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%([\w.-]+)")
_CALLED_LISTS = re.compile(r"\b(branch_computations|called_computations)=\{([^}]*)\}")
_SPACE = re.compile(r"S\((\d+)\)")


@dataclass(frozen=True)
class ArrayShape:
    """One array of a result."""

    dtype: str
    dims: tuple[int, ...]
    memory_space: int = 0  # 0: a device's main memory; on TPUs 1 is VMEM, 2 to 4 hold semaphores, 5 is the host

    @property
    def size(self) -> int:
        product = 1
        for dim in self.dims:
            product *= dim
        return product

    @property
    def num_bytes(self) -> int:
        return -(-self.size * _bits(self.dtype) // 8)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"[a-z]+(\d+)", dtype)  # s32, u4, f8e4m3fn
    if found is None:
        raise ValueError(f"{dtype!r} is no element type of HLO that has a size")
    return int(found[1])


@dataclass(frozen=True)
class Instruction:
    """One line: `%name = shape opcode(operands), attributes`.

    What stands for an operand of a constant is its value, of a parameter its number.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @cached_property
    def arrays(self) -> tuple[ArrayShape, ...]:
        """The arrays of the result, those of a tuple in order."""
        found = []
        for dtype, dims, layout in _ARRAY.findall(self.shape):
            space = _SPACE.search(layout)
            sizes = tuple(int(dim) for dim in dims.split(",") if dim)
            found.append(ArrayShape(dtype, sizes, int(space[1]) if space else 0))
        return tuple(found)

    @property
    def num_bytes(self) -> int:
        return sum(array.num_bytes for array in self.arrays)

    @cached_property
    def called(self) -> dict[str, list[str]]:
        """Role ("body", "branch_computations", ...) -> names of the computations that this one runs."""
        found: dict[str, list[str]] = {}
        for role, name in _CALLED.findall(self.attributes):
            found.setdefault(role, []).append(name)
        for role, names in _CALLED_LISTS.findall(self.attributes):
            found.setdefault(role, []).extend(_NAME.findall(names))
        return found

    @cached_property
    def callees(self) -> tuple[str, ...]:
        """Every computation that this one runs."""
        return tuple(name for names in self.called.values() for name in names)

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression, where the attributes have it."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @cached_property
    def source(self) -> str:
        """What it was made of: jax's name of the operation or, of a parameter, of the argument; "" where unsaid."""
        return (self.attribute(r'op_name="((?:[^"\\]|\\.)*)"') or "").replace('\\"', '"').replace("\\'", "'")

    @property
    def index(self) -> int:
        """Of a get-tuple-element: the element; of a parameter: its number."""
        text = self.attribute(r"index=(\d+)") if self.opcode == "get-tuple-element" else self.operands[0]
        assert text is not None
        return int(text)


@dataclass(frozen=True)
class Computation:
    """Instructions in the order of the text, which is that of execution where the module is scheduled."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @cached_property
    def root(self) -> Instruction:
        return next(instruction for instruction in self.instructions if instruction.is_root)


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    is_scheduled: bool
    num_devices: int
    computations: Mapping[str, Computation]
    entry: Computation

    @classmethod
    def parse(cls, text: str) -> Module:
        """Of the text that jax's `Compiled.as_text` gives. ValueError where it has no entry computation."""
        computations: dict[str, Computation] = {}
        entry = None
        for name, is_entry, lines in _blocks(text):
            computations[name] = Computation(name, tuple(map(_instruction, lines)))
            entry = name if is_entry else entry
        if entry is None:
            raise ValueError(f"no entry computation in this text of {len(text):,} characters: it is not optimised HLO")
        header = text[: text.find("\n")]
        counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)
        devices = 1
        for count in counts:
            devices *= int(count)
        return cls("is_scheduled=true" in header, devices, computations, computations[entry])

    @cached_property
    def fused(self) -> frozenset[str]:
        """Computations inside a fusion: their values never lie in memory."""
        return frozenset(
            name
            for computation in self.computations.values()
            for instruction in computation.instructions
            if instruction.opcode == "fusion"
            for name in instruction.callees
        )


def _blocks(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    """(name, is the entry, lines) of every computation."""
    lines: list[str] | None = None
    name, is_entry = "", False
    for line in text.splitlines():
        if lines is None:
            header = _COMPUTATION.match(line)
            if header:
                name, is_entry, lines = header[2], bool(header[1]), []
        elif line.startswith("}"):
            yield name, is_entry, lines
            lines = None
        elif _INSTRUCTION.match(line):
            lines.append(line)


def _instruction(line: str) -> Instruction:
    found = _INSTRUCTION.match(line)
    assert found is not None
    rest = _COMMENT.sub("", line[found.end() :])
    shape, rest = (rest[: (end := _closing(rest))], rest[end + 1 :]) if rest[0] == "(" else _until_space(rest)
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    inside, attributes = rest[: end - 1], rest[end:]
    operands = (inside,) if opcode in ("parameter", "constant") else tuple(_NAME.findall(inside))
    return Instruction(found[2], shape, opcode, operands, attributes, bool(found[1]))


def _until_space(text: str) -> tuple[str, str]:
    shape, _, rest = text.partition(" ")
    return shape, rest


def _closing(text: str) -> int:
    """The position after the parenthesis that closes the one `text` begins with."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    raise ValueError(f"unbalanced parentheses: {text[:80]!r}")
