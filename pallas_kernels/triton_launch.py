"""One launch of a Triton kernel, as a value: made by shape arithmetic, run by jax-triton.

Hides jax-triton and Triton, which are imported when a launch runs and not before. The same value can be given to
Triton's compilers for a GPU that is not here (`triton_aot`) or to its interpreter.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.devices import Device

Argument = jax.Array | jax.ShapeDtypeStruct | int
OLDEST_CAPABILITY = 80  # of NVIDIA's GPUs: the first that multiplies bfloat16 and copies asynchronously


@dataclass(frozen=True, eq=False)
class Launch:
    """`grid` programs of `kernel`, whose parameters are `arguments`, then `outputs`, then `constants` by name."""

    kernel: Any  # a triton.JITFunction
    grid: tuple[int, ...]
    arguments: tuple[Argument, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int


def refuse(device: Device) -> str | None:
    """None, or why no Triton kernel runs on `device`; packages are asked for where there is a GPU to run on."""
    if not device.is_gpu:
        return f"it is for GPUs, the device is {device}; use xla"
    if (capability(device) or OLDEST_CAPABILITY) < OLDEST_CAPABILITY:
        return f"{device.arch} is older than sm_{OLDEST_CAPABILITY}, the oldest that its kernels are made for; use xla"
    missing = [name for name in ("jax_triton", "triton") if importlib.util.find_spec(name) is None]
    if missing and jax.default_backend() != "cpu":
        advice = "jaxinfer[cuda13]" if device.platform == "cuda" else " ".join(missing).replace("_", "-")
        return f"{' and '.join(missing)} cannot be imported: pip install {advice}"
    return None


_launches: ContextVar[list[Launch] | None] = ContextVar("launches", default=None)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collects what would be launched inside, while tracing; the launches themselves give zeros."""
    launches: list[Launch] = []
    token = _launches.set(launches)
    try:
        yield launches
    finally:
        _launches.reset(token)


def run(launch: Launch, device: Device) -> tuple[jax.Array, ...]:
    """The outputs of a launch, compiled for `device`; may be traced."""
    launches = _launches.get()
    if launches is not None:
        launches.append(launch)
        return tuple(jnp.zeros(out.shape, out.dtype) for out in launch.outputs)
    import jax_triton

    return jax_triton.triton_call(
        *launch.arguments,
        kernel=launch.kernel,
        out_shape=launch.outputs,
        grid=launch.grid,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        compute_capability=capability(device),
        **launch.constants,
    )


def capability(device: Device) -> int | None:
    """90 for "sm_90a"; None for AMD, which jax-triton asks the device about."""
    return int(device.arch.removeprefix("sm_").rstrip("af")) if device.platform == "cuda" else None


def power_of_two(n: int) -> int:
    """The least power of two that is not below `n`: what Triton's block shapes must be."""
    return 1 << max(0, n - 1).bit_length()


class Tiles(NamedTuple):
    """Rows cut into tiles that belong to one owner (a sequence, an expert) each; i32[tiles] all."""

    owner: jax.Array
    first: jax.Array
    stop: jax.Array  # the row after the last; a tile that is left over stops where it begins, or before


def tiles_of(starts: jax.Array, size: int, num_rows: int) -> Tiles:
    """Tiles of up to `size` rows: owner o has rows `starts[o] : starts[o + 1]` of `num_rows`; `starts i32[owners + 1]`.

    As many as the worst case needs. Those left over name the last owner.
    """
    lengths = jnp.diff(starts)
    ends = jnp.cumsum((lengths + size - 1) // size, dtype=jnp.int32)  # of each owner, in tiles
    tile = jnp.arange(min(num_rows, num_rows // size + lengths.shape[0]), dtype=jnp.int32)
    owner = jnp.sum(tile[:, None] >= ends[None, :-1], axis=1, dtype=jnp.int32)
    first = starts[owner] + (tile - jnp.where(owner > 0, ends[owner - 1], 0)) * size
    return Tiles(owner, first, jnp.minimum(first + size, starts[owner + 1]))
