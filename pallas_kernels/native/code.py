"""LLVM IR as text: fresh names, structured loops, and the idioms that the CPU kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Code:
    """The lines of one IR function, with fresh value names."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._variables: list[str] = []

    def let(self, expression: str) -> str:
        """Append `%v = expression`; returns `%v`."""
        name = f"%v{len(self.lines)}"
        self.lines.append(f"  {name} = {expression}")
        return name

    def do(self, *lines: str) -> None:
        self.lines += [f"  {line}" for line in lines]

    def label(self, name: str) -> None:
        self.lines.append(f"{name}:")

    def at(self, base: str, element: str, index: str | int) -> str:
        """The address of `base[index]`."""
        return self.let(f"getelementptr {element}, ptr {base}, i64 {index}")

    def load(self, kind: str, base: str, index: str | int = 0, align: int | None = None) -> str:
        """`base[index]`, a value of type `kind`; `align` in bytes where it is less than the type's own."""
        suffix = "" if align is None else f", align {align}"
        return self.let(f"load {kind}, ptr {self.at(base, kind, index)}{suffix}")

    def store(self, kind: str, value: str | int, base: str, index: str | int = 0) -> None:
        """`base[index] = value`."""
        self.do(f"store {kind} {value}, ptr {self.at(base, kind, index)}")

    def variable(self, kind: str, value: str | int) -> str:
        """A local that may change: its address. LLVM turns it into registers."""
        name = f"%var{len(self._variables)}"
        self._variables.append(f"  {name} = alloca {kind}")
        self.do(f"store {kind} {value}, ptr {name}")
        return name

    @contextmanager
    def loop(self, start: str | int, end: str | int, step: str | int = 1) -> Iterator[str]:
        """`for (i = start; i < end; i += step)`, signed; yields i, an i64."""
        counter = self.variable("i64", start)
        label = f"loop{len(self.lines)}"
        self.do(f"br label %{label}.test")
        self.label(f"{label}.test")
        index = self.let(f"load i64, ptr {counter}")
        goes_on = self.let(f"icmp slt i64 {index}, {end}")
        self.do(f"br i1 {goes_on}, label %{label}.body, label %{label}.end")
        self.label(f"{label}.body")
        yield index
        following = self.let(f"add i64 {index}, {step}")
        self.do(f"store i64 {following}, ptr {counter}", f"br label %{label}.test")
        self.label(f"{label}.end")

    @contextmanager
    def when(self, condition: str) -> Iterator[None]:
        """`if (condition) { ... }` of an i1."""
        label = f"when{len(self.lines)}"
        self.do(f"br i1 {condition}, label %{label}, label %{label}.end")
        self.label(label)
        yield
        self.do(f"br label %{label}.end")
        self.label(f"{label}.end")

    def function(self, signature: str) -> str:
        """The whole function around these lines, which must not have ended in `ret`."""
        return "\n".join([f"define {signature} {{", "entry:", *self._variables, *self.lines, "  ret void", "}", ""])


def constants(values: list[int]) -> str:
    """`<n x i32>` of these."""
    return "<" + ", ".join(f"i32 {value}" for value in values) + ">"


def splat(value: int, count: int) -> str:
    """`<count x i32>` of one value."""
    return constants([value] * count)


def broadcast(code: Code, kind: str, scalar: str, count: int) -> str:
    """`<count x kind>` whose lanes are all `scalar`."""
    vector = f"<{count} x {kind}>"
    first = code.let(f"insertelement {vector} poison, {kind} {scalar}, i32 0")
    return code.let(f"shufflevector {vector} {first}, {vector} poison, <{count} x i32> zeroinitializer")


def sum_lanes(code: Code, vectors: list[str], lanes: int, kind: str = "float") -> str:
    """`<n x kind>` (float, i32): the sum of each of n vectors' lanes. Lane i takes lane i + half, until one is left.

    Several vectors are folded into one on the way, which leaves the additions what they are and saves shuffles.
    """
    add = "fadd" if kind == "float" else "add"
    held = 1  # accumulators interleaved in each vector
    while lanes > 1 or len(vectors) > 1:
        if lanes == 1:
            raise AssertionError(f"{len(vectors)} vectors of one lane cannot be folded")
        half = lanes // 2
        paired = len(vectors) > 1
        width = lanes * held
        low = [s * lanes + i for s in range(held * (2 if paired else 1)) for i in range(half)]
        folded = []
        for first in range(0, len(vectors), 2 if paired else 1):
            operands = f"<{width} x {kind}> {vectors[first]}, <{width} x {kind}> "
            operands += vectors[first + 1] if paired else "poison"
            a = code.let(f"shufflevector {operands}, <{len(low)} x i32> {constants(low)}")
            b = code.let(f"shufflevector {operands}, <{len(low)} x i32> {constants([i + half for i in low])}")
            folded.append(code.let(f"{add} <{len(low)} x {kind}> {a}, {b}"))
        vectors, lanes = folded, half
        held *= 2 if paired else 1
    return vectors[0]


def round_to_bf16(code: Code, value: str, count: int) -> str:
    """Nearest even, in integers (no library call on CPUs without the instruction); NaN stays NaN."""
    words = f"<{count} x i32>"
    bits = code.let(f"bitcast <{count} x float> {value} to {words}")
    upper = code.let(f"lshr {words} {bits}, {splat(16, count)}")
    odd = code.let(f"and {words} {upper}, {splat(1, count)}")
    biased = code.let(f"add {words} {bits}, {splat(0x7FFF, count)}")
    rounded = code.let(f"lshr {words} {code.let(f'add {words} {biased}, {odd}')}, {splat(16, count)}")
    quiet = code.let(f"or {words} {upper}, {splat(0x40, count)}")
    is_nan = code.let(f"fcmp uno <{count} x float> {value}, zeroinitializer")
    chosen = code.let(f"select <{count} x i1> {is_nan}, {words} {quiet}, {words} {rounded}")
    return code.let(f"trunc {words} {chosen} to <{count} x i16>")
