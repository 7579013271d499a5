"""Compiling for devices that are not in this machine, one or a whole slice, and what the compiler says of the result.

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
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.devices import Device
from sharding import copies
from sharding.program import Program
from sharding.tpu_slice import Slice

_STAGES = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compiling",
}


@dataclass(frozen=True)
class Compiled:
    """A program compiled for one device, or for several that run it together; sizes are those of one device."""

    device: Device
    seconds: float  # tracing, lowering and compiling; of `compile_lowered`: compiling
    argument_bytes: int
    temporary_bytes: int  # HBM beside arguments and results
    aliased_bytes: int  # results that lie where a donated argument lay
    fast_memory_bytes: tuple[int, ...]  # what each Pallas kernel asks of VMEM, in the order of the program
    text: str = field(repr=False)  # the optimised HLO
    output_bytes: int = 0
    code_bytes: int = 0  # of the program itself, which lies in the device's memory too

    @functools.cached_property
    def program(self) -> Program:
        """The text, read."""
        return Program(self.text)

    def copies_of(self, shape: tuple[int, ...]) -> list[str]:
        """Instructions that write an array of this shape anew: copies, transposes, fusions but for updates in place."""
        return copies.writes_of(self.program, shape)


class OutOfMemory(RuntimeError):
    """A program that its device's memory cannot hold."""


def unavailable(device: Device) -> str | None:
    """Why nothing can be compiled for `device` here; None if it can."""
    if device.platform != "tpu":
        return f"{device} is not a TPU: XLA compiles for it only where one is"
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed: pip install 'jaxinfer[tpu]'"
    return None


@contextmanager
def targeting(device: Device, mesh: Mesh | None = None) -> Iterator[None]:
    """Whatever is traced inside is for `device`, which need not be here; `devices.current()` gives it.

    `mesh`: that of the absent devices, where a shard_map over it will be traced: the context must have its axes.
    """
    if device.platform == "cpu":
        yield
        return
    abstract = AbstractDevice(device.kind, device.num_cores, "gpu" if device.is_gpu else device.platform)
    sizes, names = ((1,), ("device",)) if mesh is None else (tuple(mesh.shape.values()), tuple(mesh.axis_names))
    types = (AxisType.Auto,) * len(names)
    with jax.sharding.use_abstract_mesh(AbstractMesh(sizes, names, axis_types=types, abstract_device=abstract)):
        yield


@contextmanager
def untargeted() -> Iterator[None]:
    """Inside, no mesh is in context: flax would give each parameter of a skeleton a sharding, as if it were one array.

    A quantized weight is several.
    """
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        yield


def devices_of(piece: Slice) -> list[Any]:
    """Descriptions of a slice's devices, by coordinates: what a mesh is made of. RuntimeError where `unavailable`."""
    reason = unavailable(piece.device)
    if reason is not None:
        raise RuntimeError(reason)
    return list(_topology(piece.name, piece.host_bounds).devices)


def memory_limit_bytes(piece: Slice) -> int:
    """Memory of one device that programs may use, by the compiler's own account: it keeps some of it for itself."""
    place = NamedSharding(Mesh(np.array(devices_of(piece)[:1]), ("device",)), PartitionSpec())
    too_large = jax.ShapeDtypeStruct((1 << 20, 1 << 20), "float32", sharding=place)
    try:
        compile_lowered(jax.jit(lambda x: x[:1] + 1).lower(too_large), piece.device)
    except OutOfMemory as error:
        found = re.search(r"(?:available HBM \(| of )([\d.]+)G", str(error))
        if found:
            return int(float(found[1]) * (1 << 30))
    return piece.device.memory_bytes


def compile_for(
    device: Device,
    function: Callable[..., Any],
    *args: Any,
    donate: tuple[int, ...] = (),
    compiler_options: dict[str, Any] | None = None,
    **options: Any,
) -> Compiled:
    """`jax.jit(function)` compiled for one `device`; `args` are pytrees of arrays or ShapeDtypeStructs.

    `donate`: positions of arguments that are given up; `compiler_options`: XLA's; `options`: keyword arguments of
    `function`, static.
    Raises RuntimeError where `unavailable(device)`, and whatever the compiler raises.
    """
    reason = unavailable(device)
    if reason is not None:
        raise RuntimeError(reason)
    mesh = Mesh(np.array(_topology(device.arch, None).devices[:1]), ("device",))
    placed = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), args)
    began = time.perf_counter()
    with targeting(device):
        lowered = jax.jit(functools.partial(function, **options), donate_argnums=donate).lower(*shapes)
        return _compile(lowered, device, began, compiler_options)


def compile_lowered(lowered: jax.stages.Lowered, device: Device, options: dict[str, Any] | None = None) -> Compiled:
    """A program that was lowered for devices of kind `device`; `options` are the compiler's.

    Raises OutOfMemory, with the compiler's own words, where a device's memory does not hold it.
    """
    return _compile(lowered, device, time.perf_counter(), options)


def _compile(lowered: jax.stages.Lowered, device: Device, began: float, options: dict[str, Any] | None) -> Compiled:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache")  # no device
            program = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) and ("HBM" in str(error) or "hbm" in str(error)):
            raise OutOfMemory(str(error)) from error
        raise
    seconds = time.perf_counter() - began
    memory, text = program.memory_analysis(), program.as_text()
    assert memory is not None and text is not None  # every TPU compiler gives both
    return Compiled(
        device=device,
        seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        # temp_size_in_bytes would count what is planned for VMEM too
        temporary_bytes=memory.total_allocation_bytes - memory.indefinite_allocations,
        aliased_bytes=memory.alias_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        fast_memory_bytes=_scoped(text),
        text=text,
    )


@contextmanager
def timed_stages() -> Iterator[dict[str, float]]:
    """Seconds of "tracing", "lowering" and "compiling" of the one program that is made inside."""
    seconds = dict.fromkeys(_STAGES.values(), 0.0)

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event in _STAGES:  # functions that the program calls are traced inside it: the longest holds them all
            seconds[_STAGES[event]] = max(seconds[_STAGES[event]], duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@functools.cache
def _topology(name: str, host_bounds: tuple[int, ...] | None) -> Any:
    options = {} if host_bounds is None else {"chips_per_host_bounds": host_bounds}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options)


def _scoped(text: str) -> tuple[int, ...]:
    """The VMEM of each Mosaic kernel, from its call's backend_config."""
    kernels = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    sizes = [re.findall(r'"used_scoped_memory_configs":\[\{[^]]*?"size":"(\d+)"', line) for line in kernels]
    return tuple(sum(map(int, found)) for found in sizes)
