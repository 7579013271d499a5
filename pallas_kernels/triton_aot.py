"""Compiles a Triton launch to machine code for a GPU that is not here: NVIDIA (cubin) and AMD (hsaco).

Hides Triton's compilers and where each leaves what a kernel's author asks: shared memory, registers, spills.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from pallas_kernels.devices import Device
from pallas_kernels.triton_launch import Argument, Launch, capability

POINTERS = {
    "float32": "*fp32",
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "float8_e4m3fn": "*fp8e4nv",
    "int8": "*i8",
    "uint8": "*u8",
    "int32": "*i32",
    "uint32": "*u32",
}
ALIGNED = [["tt.divisibility", 16]]  # what XLA promises of its buffers, and jax-triton tells Triton


@dataclass(frozen=True)
class Compiled:
    """What one launch costs on one device."""

    binary_bytes: int
    shared_bytes: int  # of one block
    registers: int  # of one thread
    spilled_bytes: int  # of one thread: registers that did not fit and went through memory
    threads: int  # of one block

    def __str__(self) -> str:
        return (
            f"{self.binary_bytes} bytes, {self.shared_bytes} shared, {self.threads} threads x {self.registers} "
            f"registers, {self.spilled_bytes} spilled"
        )


def compile_launch(launch: Launch, device: Device) -> Compiled:
    """The launch's kernel compiled for `device`. Raises Triton's errors, and ValueError for a device that is no GPU."""
    if not device.is_gpu:
        raise ValueError(f"Triton compiles for GPUs, {device} is a {device.platform}")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    warp = 32 if device.platform == "cuda" else 64
    target = GPUTarget("cuda" if warp == 32 else "hip", capability(device) or device.arch, warp)
    parameters = (*launch.arguments, *launch.outputs)
    names = launch.kernel.arg_names
    signature = {name: _type_of(x) for name, x in zip(names, parameters, strict=False)}
    ones = {name: 1 for name, x in zip(names, parameters, strict=False) if isinstance(x, int) and x == 1}
    constants = {**launch.constants, **ones}
    source = ASTSource(
        launch.kernel,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(i,): ALIGNED for i, x in enumerate(parameters) if not isinstance(x, int)},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        compiled = triton.compile(source, target=target, options=options)
    registers, spilled = (_cuda_resources if warp == 32 else _rocm_resources)(compiled.asm)
    binary = compiled.asm["cubin" if warp == 32 else "hsaco"]
    return Compiled(len(binary), compiled.metadata.shared, registers, spilled, warp * launch.num_warps)


def _type_of(argument: Argument) -> str:
    return "i32" if isinstance(argument, int) else POINTERS[jnp.dtype(argument.dtype).name]


def _cuda_resources(asm: dict[str, Any]) -> tuple[int, int]:
    """Registers and spilled bytes of a thread, as cuobjdump (it comes with Triton) reads them from a cubin."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _rocm_resources(asm: dict[str, Any]) -> tuple[int, int]:
    """Vector registers and spilled bytes of a thread, as the assembler notes them."""
    found = {
        name: int(number) for name, number in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", asm["amdgcn"])
    }
    return found["vgpr_count"], 4 * found["vgpr_spill_count"]
