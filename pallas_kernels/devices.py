"""The devices kernels are made for: what a kernel's author must know of each, and which one is being compiled for.

Published figures, for roofline tables and default block sizes (CPUs differ too much: 0); `jaxinfer.perf.hardware`
measures the real ones.
Sources: Google Cloud's TPU pages, NVIDIA's and AMD's data sheets (dense rates; of a link, one direction, where they add
up a chip's links and both ways: 400 GB/s on v5e, 800 on v6e, 1200 on v5p and TPU7x; 900 on H100).
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace

import jax

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Device:
    """One accelerator (for a TPU with two cores per chip that are devices of their own: one core)."""

    name: str  # what a user types: "v6e", "h100"
    platform: str  # "cpu" | "tpu" | "cuda" | "rocm"
    kind: str  # jax's device_kind, or how it begins
    arch: str  # what a compiler calls it: "sm_90a", "gfx942", a TPU topology's name for one host
    fast_memory_bytes: int  # VMEM of a TPU core; shared memory that one block of a GPU may use; L2 of a CPU core
    num_cores: int  # TensorCores, streaming multiprocessors, compute units
    memory_bytes: int
    memory_gbps: float  # 1e9 bytes a second
    bf16_tflops: float
    int8_tops: float  # 0: no integer matrix unit
    links: int = 0  # to other chips; 0: it has none but the bus
    link_gbps: float = 0.0  # of each, 1e9 bytes a second in one direction
    devices_per_chip: int = 1  # of a TPU, as jax counts devices
    fp8_tflops: float = 0  # 0: fp8 is multiplied as bfloat16

    def __str__(self) -> str:
        return self.name

    @property
    def is_gpu(self) -> bool:
        return self.platform in ("cuda", "rocm")


def _table(*devices: Device) -> dict[str, Device]:
    return {device.name: device for device in devices}


DEVICES = _table(
    Device("v5e", "tpu", "TPU v5 lite", "v5e:2x2", 128 * MIB, 1, 16 * GIB, 819, 197, 393, 4, 50),
    Device("v5p", "tpu", "TPU v5", "v5p:2x2x1", 64 * MIB, 2, 95 * GIB, 2765, 459, 918, 6, 100),
    Device("v6e", "tpu", "TPU v6 lite", "v6e:2x2", 128 * MIB, 1, 32 * GIB, 1640, 918, 1836, 4, 100),
    Device("tpu7x", "tpu", "TPU7x", "tpu7x:2x2x1", 64 * MIB, 1, 96 * GIB, 3690, 1153, 0, 6, 100, 2, 2307),
    Device("a100", "cuda", "NVIDIA A100", "sm_80", 163 * 1024, 108, 80 * GIB, 2039, 312, 624, 12, 25),
    Device("l4", "cuda", "NVIDIA L4", "sm_89", 99 * 1024, 58, 24 * GIB, 300, 121, 242),
    Device("h100", "cuda", "NVIDIA H100", "sm_90a", 227 * 1024, 132, 80 * GIB, 3350, 989, 1979, 18, 25),
    Device("h200", "cuda", "NVIDIA H200", "sm_90a", 227 * 1024, 132, 141 * GIB, 4800, 989, 1979, 18, 25),
    Device("b200", "cuda", "NVIDIA B200", "sm_100a", 227 * 1024, 148, 180 * GIB, 8000, 2250, 4500, 18, 50),
    Device("mi300x", "rocm", "AMD Instinct MI300X", "gfx942", 64 * 1024, 304, 192 * GIB, 5300, 1307, 2614, 7, 64),
    Device("cpu", "cpu", "cpu", platform.machine(), 1 * MIB, 1, 0, 0, 0, 0),
)


SPELLINGS = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite", "TPU v7x": "TPU7x"}


def named(name: str) -> Device:
    """The device a user calls `name`. Raises ValueError with the choices."""
    if name not in DEVICES:
        raise ValueError(f"device {name!r} is not one of {', '.join(DEVICES)}")
    return DEVICES[name]


def current() -> Device:
    """What is compiled for: the abstract device of the mesh in context (a device that is not here), else jax's own."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return of_kind(abstract.device_kind, abstract.platform or "")
    device = jax.devices()[0]
    return of_kind(device.device_kind, device.platform, getattr(device, "compute_capability", None))


def on_cpu() -> bool:
    """Whether what is traced is for a CPU."""
    return current().platform == "cpu"


def of_kind(kind: str, platform: str, capability: str | None = None) -> Device:
    """The device of jax's `device_kind`; one that no table names gets the figures of its platform's smallest.

    `capability`: an NVIDIA GPU's own, such as "9.0"; what is compiled for another does not load.
    """
    if platform == "cpu" or kind == "cpu":
        return DEVICES["cpu"]
    kind = SPELLINGS.get(kind, kind)
    matches = [device for device in DEVICES.values() if kind.startswith(device.kind)]
    if matches:
        return max(matches, key=lambda device: len(device.kind))
    if platform == "tpu" or kind.startswith("TPU"):
        like = replace(DEVICES["v5e"], fast_memory_bytes=16 * MIB)  # as TPUs before it have
    elif platform not in ("gpu", "cuda", "rocm"):
        like = replace(DEVICES["cpu"], platform=platform)  # no kernel is for it: XLA's code serves
    elif kind.startswith(("AMD", "gfx")):
        like = DEVICES["mi300x"]
    else:  # the oldest architecture kernels are made for, with the shared memory that all since have
        arch = "sm_80" if capability is None else f"sm_{capability.replace('.', '')}"
        arch += "a" if arch in ("sm_90", "sm_100") else ""
        like = replace(DEVICES["a100"], arch=arch, fast_memory_bytes=DEVICES["l4"].fast_memory_bytes)
    return replace(like, name=kind.lower().replace(" ", "-"), kind=kind)
