"""A model directory's weights into placed arrays, a few regions at a time; never a whole file, never pickle.

Hides formats, conversion and placement, and that reading goes on while a shard is put on its devices. The arrays own
their memory: nothing stays mapped to a file, so replacing one while it is served changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.config import ModelConfig
from jaxinfer.models.regions import Host, StoredParameter
from jaxinfer.models.safetensors_files import INDEX_FILE, SINGLE_FILE, CheckpointError, find_tensors
from jaxinfer.models.shard_reads import planned, read_in_order
from jaxinfer.models.transformer import ParameterSpec, abstract_parameters
from jaxinfer.models.weight_matching import match
from jaxinfer.placement import PlacedParameter
from pallas_kernels.tensors import QuantizedTensor

__all__ = ["CheckpointError", "Parameter", "Progress", "load_parameters", "num_threads", "open_checkpoint"]

ORBAX_DIR = "orbax"  # beside config.json, where there are no safetensors files
_MAX_THREADS = 4

Parameter = jax.Array | QuantizedTensor
Progress = Callable[[str, int, int], None]


def num_threads() -> int:
    """Threads that read and convert."""
    return min(_MAX_THREADS, os.cpu_count() or 1)


def open_checkpoint(
    directory: Path, config: ModelConfig, specs: Mapping[str, ParameterSpec], files: ExitStack
) -> Mapping[str, StoredParameter]:
    """The parameters `specs` of a model, as the directory stores them; nothing but headers is read.

    Files stay open until `files` closes them. Raises CheckpointError for everything that does not fit the model.
    """
    if (directory / ORBAX_DIR).is_dir():
        from jaxinfer.models.orbax_files import open_orbax  # tensorstore takes a while

        _check_only_format(directory)
        return open_orbax(directory / ORBAX_DIR, specs)
    return match(specs, find_tensors(directory, files), config, directory)


def _check_only_format(directory: Path) -> None:
    others = [name for name in (SINGLE_FILE, INDEX_FILE) if os.path.lexists(directory / name)]
    if others:
        raise CheckpointError(
            f"{directory} holds both an Orbax checkpoint, {ORBAX_DIR}, and {others[0]}: remove one of them"
        )


def load_parameters(
    model_dir: str | Path,
    config: ModelConfig,
    dtype: jnp.dtype,
    *,
    placed: Sequence[PlacedParameter] | None = None,
    progress: Progress | None = None,
) -> tuple[Parameter, ...]:
    """The model's parameters, in the order of `placed`: as `dtype`, or quantized as stored.

    None: all of them on the default device, in the order of `abstract_parameters(config, dtype)`. Each process reads
    what its own devices hold. `progress(name, bytes_read, bytes_total)` is called after each parameter, of the bytes
    that this process reads. Peak host memory is what stays on the host, plus the shards being read: 256 MiB, or one
    that is larger, or those that hold the same K/V heads, or those of as many quantized weights as `num_threads()`,
    each also as it is stored.
    Raises CheckpointError for anything missing, unknown, mis-shaped, truncated, duplicate or of an unsupported dtype.
    """
    dtype = jnp.dtype(dtype)
    specs = abstract_parameters(config, dtype)
    if placed is None:
        placed = [PlacedParameter((name,), spec, False, spec.shape, None) for name, spec in specs.items()]
    reads = planned(placed)
    with ExitStack() as files, ThreadPoolExecutor(num_threads()) as pool:
        stored = open_checkpoint(Path(model_dir), config, specs, files)
        num_bytes = [sum(stored[name].num_bytes(region) for name, region in read.needs()) for read in reads]
        done, loaded, parts = 0, [], []
        for read_bytes, (read, hosts) in zip(num_bytes, read_in_order(reads, stored, pool, num_threads()), strict=True):
            parts += _on_devices(hosts, [shard.devices for shard in read.shards])
            done += read_bytes
            if read.last:
                loaded.append(_assembled(read.parameter, parts))
                parts = []
                if progress is not None:
                    progress(stored[read.parameter.names[0]].name, done, sum(num_bytes))
    return tuple(loaded)


def _on_devices(hosts: list[Host], devices: list[tuple[Any, ...]]) -> list[Any]:
    """Each host array, or QuantizedTensor of them, on each of its devices."""
    for leaf in jax.tree.leaves(hosts):
        leaf.flags.writeable = False  # a CPU device takes this memory as it is
    return jax.block_until_ready(
        [jax.device_put(host, device) for host, own in zip(hosts, devices, strict=True) for device in own]
    )


def _assembled(parameter: PlacedParameter, parts: list[Any]) -> Parameter:
    """The parameter of its single-device parts, which are all of this process's."""
    placed = parts[0]
    if parameter.sharding is not None:
        placed = jax.tree.map(
            lambda whole, *own: jax.make_array_from_single_device_arrays(whole.shape, whole.sharding, list(own)),
            parameter.abstract(),
            *parts,
        )
    if isinstance(placed, QuantizedTensor):
        placed.check()
    return placed
