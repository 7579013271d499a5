"""What a compiled program copies: instructions that write an argument, or an array of some shape, anew in main memory.

Hides where a value comes from: through loops, tuples, other layouts, slices fetched into fast memory, and kernels that
update their operands in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sharding.hlo import ArrayShape, Instruction
from sharding.program import Program

_MOVES = ("copy", "copy-start", "transpose", "reshape", "convert", "fusion")
_SAME_VALUE = ("bitcast", "copy", "transpose", "reshape", "convert", "copy-done", "copy-start", "optimization-barrier")
_MAX_DEPTH = 400  # steps back from a value to the argument it is: layers are few steps each


@dataclass(frozen=True)
class Copied:
    """An instruction that writes an argument of the program anew."""

    argument: str  # jax's name of it
    array: ArrayShape
    instruction: str
    place: str  # `Program.label` of it


def copied_arguments(program: Program, wanted: Callable[[str, ArrayShape], bool]) -> list[Copied]:
    """Instructions that write an argument anew, of the arguments (name, shape) that are `wanted`.

    A copy, another layout or another dtype of the whole array; not an update in place, nor a copy into fast memory.
    """
    found = []
    for computation, place in program.running():
        for line in computation.instructions:
            if line.opcode not in _MOVES or not _in_memory(line):
                continue
            if line.opcode == "fusion" and not _writes_whole(program, line):
                continue
            for operand in line.operands:
                argument = _argument(program, computation.name, operand, 0)
                if argument is None or line.arrays[0].size != argument.arrays[0].size:
                    continue
                if wanted(argument.source, argument.arrays[0]):
                    found.append(Copied(argument.source, argument.arrays[0], line.name, program.label(place)))
    return found


def writes_of(program: Program, dims: tuple[int, ...]) -> list[str]:
    """Lines that write an array of this shape anew, whatever it is of: copies, transposes, fusions but for updates."""
    found = []
    for name, computation in program.module.computations.items():
        if name in program.module.fused:
            continue
        for line in computation.instructions:
            if line.opcode not in ("copy", "copy-start", "transpose", "fusion") or not _in_memory(line):
                continue
            if line.arrays[0].dims != dims:
                continue
            if line.opcode == "copy-start" or (line.shape[0] != "(" and "dynamic-update-slice" not in line.name):
                found.append(f"%{line.name} = {line.shape} {line.opcode}({', '.join(line.operands)})")
    return found


def _in_memory(line: Instruction) -> bool:
    """Whether a line writes to main memory, and not what small arrays kept in fast memory leave there in the end."""
    written = line.arrays[:2] if line.opcode == "copy-start" else line.arrays[:1]  # it gives (target, source, ...)
    return bool(written) and all(array.memory_space == 0 for array in written)


def _writes_whole(program: Program, fusion: Instruction) -> bool:
    """Whether a fusion writes its result whole: not by updating an operand in place, nor as a product."""
    computation = program.module.computations[fusion.callees[0]]
    root = computation.root
    while root.opcode in ("bitcast", "tuple") and root.operands:
        root = computation.by_name[root.operands[0]]
    return root.opcode not in ("dynamic-update-slice", "scatter") and not program.computes(computation.name)


def _argument(program: Program, computation: str, name: str, depth: int) -> Instruction | None:
    """The program's argument that a value is, in whatever form; None where it is computed."""
    line = program.module.computations[computation].by_name[name]
    if depth > _MAX_DEPTH:
        return None
    if line.opcode == "parameter":
        return line if computation == program.module.entry.name else None
    if line.opcode in _SAME_VALUE:
        return _argument(program, computation, line.operands[0], depth + 1)
    if line.opcode == "custom-call":
        fetched = _fetched_in_slices(program, computation, line)
        if fetched is not None:
            return _argument(program, computation, fetched, depth + 1)
        return _updated(program, computation, line, None, depth)
    if line.opcode == "fusion" and not _writes_whole(program, line):
        lines = program.module.computations[computation].by_name
        same = [operand for operand in line.operands if lines[operand].arrays == line.arrays]
        return _argument(program, computation, same[0], depth + 1) if same else None
    if line.opcode == "get-tuple-element":
        return _element(program, computation, line.operands[0], line.index, depth + 1)
    return None


def _element(program: Program, computation: str, name: str, index: int, depth: int) -> Instruction | None:
    """The argument that an element of a tuple is."""
    line = program.module.computations[computation].by_name[name]
    if depth > _MAX_DEPTH:
        return None
    if line.opcode == "tuple":
        return _argument(program, computation, line.operands[index], depth + 1)
    if line.opcode in ("while", "optimization-barrier"):
        return _element(program, computation, line.operands[0], index, depth + 1)
    if line.opcode == "custom-call":
        return _updated(program, computation, line, index, depth)
    if line.opcode == "parameter" and computation in program.loops:
        home, loop = program.loops[computation]
        return _element(program, home, loop.operands[0], index, depth + 1)
    return None


def _fetched_in_slices(program: Program, computation: str, call: Instruction) -> str | None:
    """The array that slices were fetched of into fast memory, where `call` joins them there; else None."""
    if call.attribute(r'custom_call_target="(ConcatBitcast)"') is None:
        return None
    lines = program.module.computations[computation].by_name
    done = lines[call.operands[0]]
    return lines[done.operands[0]].operands[0] if done.opcode == "slice-done" else None


def _updated(
    program: Program, computation: str, call: Instruction, index: int | None, depth: int
) -> Instruction | None:
    """The argument that a kernel's result, or the `index`-th of them, is updated from in place."""
    output = r"\{\}" if index is None else rf"\{{{index}\}}"
    operand = call.attribute(rf"output_to_operand_aliasing=\{{(?:[^=]*?\), )?{output}: \((\d+), ")
    if operand is None:
        return None
    return _argument(program, computation, call.operands[int(operand)], depth + 1)
