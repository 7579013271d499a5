"""What this machine can do, measured now: bytes read and matmul operations per second of the default device.

Hides how to get an honest ceiling out of jax. Both are the best of several runs and forms, because they are the
denominators of MBU and MFU: a slow measurement would flatter them.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import BackendError
from pallas_kernels.matmul import BACKENDS, matmul

READ_BYTES = {"cpu": 1 << 29}  # far more than any cache; elsewhere READ_BYTES_ACCELERATOR
READ_BYTES_ACCELERATOR = 1 << 32
MATMUL_SHAPES = {"cpu": ((512, 2048, 8192), (2048, 2048, 2048))}  # rows, in, out
MATMUL_SHAPES_ACCELERATOR = ((4096, 8192, 8192), (8192, 8192, 8192))
REPEATS = 6

Shapes = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Hardware:
    """Measured ceilings, and which form reached them."""

    read_bandwidth_gbps: float
    matmul_tflops: float
    read_by: str
    matmul_by: str


def measure(dtype: str, *, read_bytes: int | None = None, shapes: Shapes | None = None) -> Hardware:
    """Ceilings of the default device; `dtype` is that of the matmul. About three seconds on a laptop.

    `read_bytes` and `shapes` default to sizes that fill the device; smaller ones are for tests.
    """
    kind = jax.default_backend()
    bandwidth, read_by = read_bandwidth_gbps(read_bytes or READ_BYTES.get(kind, READ_BYTES_ACCELERATOR))
    rate, matmul_by = matmul_tflops(dtype, shapes or MATMUL_SHAPES.get(kind, MATMUL_SHAPES_ACCELERATOR))
    return Hardware(bandwidth, rate, read_by, matmul_by)


def read_bandwidth_gbps(num_bytes: int) -> tuple[float, str]:
    """GB/s (1e9) at which reductions read `num_bytes`, and the name of the fastest one.

    Integers, because a float sum may not be reordered and so is not vectorized; 1024 rows, so that every core reads.
    """
    data = jnp.ones((1024, max(1, num_bytes // 4096)), jnp.int32)
    forms: dict[str, Callable[[jax.Array], jax.Array]] = {
        "int32 sum": lambda x: jnp.sum(x, axis=1),
        "int32 max": lambda x: jnp.max(x, axis=1),
    }
    rates = {name: data.nbytes / best_seconds(jax.jit(form), data) / 1e9 for name, form in forms.items()}
    return _best(rates)


def matmul_tflops(dtype: str, shapes: Shapes) -> tuple[float, str]:
    """TFLOP/s of the fastest dense product `[rows, in] x [out, in]` in `dtype`, over shapes and matmul backends."""
    rates: dict[str, float] = {}
    for rows, inner, outer in shapes:
        x, weight = jnp.ones((rows, inner), dtype), jnp.ones((outer, inner), dtype)
        for backend in BACKENDS:
            if backend == "reference":
                continue

            def product(x: jax.Array, weight: jax.Array, backend: str = backend) -> jax.Array:
                return matmul(x, weight, backend=backend)

            try:
                seconds = best_seconds(jax.jit(product), x, weight)
            except BackendError:
                continue  # this backend does not take the case; the others are measured
            rates[f"{backend} {rows}x{inner}x{outer}"] = 2 * rows * inner * outer / seconds / 1e12
    return _best(rates)


def best_seconds(function: Callable[..., Any], *arguments: jax.Array, repeats: int = REPEATS) -> float:
    """Shortest time of a call, the first one (which compiles) left out."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


def describe_device() -> dict[str, Any]:
    """Platform, kind and count of jax's devices, and the host processor's name."""
    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "processor": _processor(),
    }


def _best(rates: dict[str, float]) -> tuple[float, str]:
    name = max(rates, key=lambda form: rates[form])
    return rates[name], name


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
