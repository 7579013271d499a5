"""Compiling for a device that is not in this machine, and what the compiler says of the result.

Hides topology descriptions, the abstract mesh that tells a kernel what it is traced for, and where each compiler
reports its memory. TPUs need `libtpu` beside jax.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.devices import Device


@dataclass(frozen=True)
class Compiled:
    """A program compiled for one device."""

    device: Device
    seconds: float  # tracing, lowering and compiling
    argument_bytes: int
    temporary_bytes: int  # device memory beside arguments and results
    aliased_bytes: int  # results that lie where a donated argument lay
    fast_memory_bytes: tuple[int, ...]  # what each Pallas kernel asks of VMEM, in the order of the program
    text: str  # the optimised HLO

    def copies_of(self, shape: tuple[int, ...]) -> list[str]:
        """Instructions that write an array of this shape anew: copies, transposes, fusions but for updates in place."""
        dims = re.escape(",".join(str(size) for size in shape))
        written = re.compile(rf"%\S+ = \w+\[{dims}\]\S* (?:copy|transpose|fusion|copy-start)\([^\n]*")
        fused = set(re.findall(r"fusion\([^\n]*calls=(%[\w.-]+)", self.text))  # what is inside is not in memory
        found = []
        for computation in re.split(r"\n(?=%|ENTRY )", self.text):
            if computation.split(" ", 1)[0] not in fused:
                found += written.findall(computation)
        return [line for line in found if "dynamic-update-slice" not in line.split(" = ")[0]]


def unavailable(device: Device) -> str | None:
    """Why nothing can be compiled for `device` here; None if it can."""
    if device.platform != "tpu":
        return f"{device} is not a TPU: XLA compiles for it only where one is"
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed: pip install 'jaxinfer[tpu]'"
    return None


@contextmanager
def targeting(device: Device) -> Iterator[None]:
    """Whatever is traced inside is for `device`, which need not be here; `devices.current()` gives it."""
    if device.platform == "cpu":
        yield
        return
    abstract = AbstractDevice(device.kind, device.num_cores, "gpu" if device.is_gpu else device.platform)
    mesh = AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=abstract)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def compile_for(
    device: Device, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = (), **options: Any
) -> Compiled:
    """`jax.jit(function)` compiled for one `device`; `args` are pytrees of arrays or ShapeDtypeStructs.

    `donate`: positions of arguments that are given up; `options`: keyword arguments of `function`, static.
    Raises RuntimeError where `unavailable(device)`, and whatever the compiler raises.
    """
    reason = unavailable(device)
    if reason is not None:
        raise RuntimeError(reason)
    mesh = Mesh(np.array(_topology(device).devices[:1]), ("device",))
    placed = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), args)
    began = time.perf_counter()
    with targeting(device), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache")  # no device
        program = jax.jit(functools.partial(function, **options), donate_argnums=donate).lower(*shapes).compile()
    seconds = time.perf_counter() - began
    memory, text = program.memory_analysis(), program.as_text()
    assert memory is not None and text is not None  # every TPU compiler gives both
    return Compiled(
        device=device,
        seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        fast_memory_bytes=_scoped(text),
        text=text,
    )


@functools.cache
def _topology(device: Device) -> Any:
    return topologies.get_topology_desc(platform=device.platform, topology_name=device.arch)


def _scoped(text: str) -> tuple[int, ...]:
    """The VMEM of each Mosaic kernel, from its call's backend_config."""
    kernels = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    sizes = [re.findall(r'"used_scoped_memory_configs":\[\{[^]]*?"size":"(\d+)"', line) for line in kernels]
    return tuple(sum(map(int, found)) for found in sizes)
