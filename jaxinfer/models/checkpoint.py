"""Hugging Face safetensors directories into placed arrays, a few tensors at a time; never a whole file, never pickle.

Hides reading, conversion and placement, and that reading goes on while a parameter is placed. The arrays own their
memory: nothing stays mapped to a file, so replacing one while it is served changes nothing.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.models.dense_tensors import read_dense
from jaxinfer.models.quantized_checkpoint import read_quantized
from jaxinfer.models.safetensors_files import CheckpointError, find_tensors
from jaxinfer.models.transformer import ParameterSpec, abstract_parameters
from jaxinfer.models.weight_matching import Wanted, match
from pallas_kernels.tensors import QuantizedTensor

__all__ = ["CheckpointError", "Parameter", "Place", "Progress", "load_parameters", "num_threads"]

_MAX_THREADS = 4
_READ_AHEAD_BYTES = 256 << 20  # of parameters being read while one is placed; a larger one is alone

Parameter = jax.Array | QuantizedTensor
Place = Callable[[ParameterSpec], jax.sharding.Sharding | jax.Device | None]
Progress = Callable[[str, int, int], None]
_Host = np.ndarray | QuantizedTensor  # of NumPy arrays


def num_threads() -> int:
    """Threads that read and convert."""
    return min(_MAX_THREADS, os.cpu_count() or 1)


def load_parameters(
    model_dir: str | Path,
    config: ModelConfig,
    dtype: jnp.dtype,
    *,
    place: Place | None = None,
    progress: Progress | None = None,
) -> tuple[Parameter, ...]:
    """The model's parameters, in the order of `abstract_parameters(config, dtype)`: as `dtype`, or quantized as stored.

    `place(spec)` says where each array goes (None: the default device); the arrays of a quantized weight are asked for
    one by one. `progress(name, bytes_read, bytes_total)` is called after each parameter. Peak host memory is the
    parameters that stay on the host, plus those being read: 256 MiB, or one that is larger, or as many quantized
    weights as `num_threads()`, each also as it is stored.
    Raises CheckpointError for anything missing, unknown, mis-shaped, truncated, duplicate or of an unsupported dtype.
    """
    directory = Path(model_dir)
    with ExitStack() as files, ThreadPoolExecutor(num_threads()) as pool:
        stored = find_tensors(directory, files)
        wanted = match(abstract_parameters(config, jnp.dtype(dtype)), stored, config, directory)
        num_bytes_total = sum(item.num_bytes for item in wanted)
        parameters: list[Parameter] = []
        num_bytes = 0
        for item, host in _read_in_order(wanted, pool):
            parameters.append(_placed(host, item.spec, place))
            num_bytes += item.num_bytes
            if progress is not None:
                progress(item.name, num_bytes, num_bytes_total)
    return tuple(parameters)


def _read_in_order(wanted: list[Wanted], pool: ThreadPoolExecutor) -> Iterator[tuple[Wanted, _Host]]:
    """Each parameter in host memory, while those that follow are being read."""
    ahead: deque[tuple[Wanted, _Host, list[Future[None]]]] = deque()
    for item in wanted:
        while ahead and _must_wait(item, [other for other, _, _ in ahead]):
            yield _finished(*ahead.popleft())
        host, jobs = _begin(item)
        ahead.append((item, host, [pool.submit(job) for job in jobs]))
    while ahead:
        yield _finished(*ahead.popleft())


def _must_wait(item: Wanted, ahead: list[Wanted]) -> bool:
    """Whether there is no room for it beside those that are being read."""
    if item.stored_as is not None and len(ahead) < num_threads():
        return False  # one thread unpacks a quantized weight: with fewer of them, threads would idle
    return sum(other.num_bytes for other in ahead) + item.num_bytes > _READ_AHEAD_BYTES


def _begin(item: Wanted) -> tuple[_Host, list[Callable[[], None]]]:
    shape = item.spec.shape
    if item.stored_as is not None:
        return read_quantized(item.stored_as, shape, item.rows, item.tensors, per_expert=item.source.per_expert)
    tensors = tuple(pieces["weight"] for pieces in item.tensors)
    return read_dense(item.source, shape, np.dtype(item.spec.dtype), item.rows, tensors)


def _finished(item: Wanted, host: _Host, reads: list[Future[None]]) -> tuple[Wanted, _Host]:
    for read in reads:
        read.result()  # re-raises what a read raised
    return item, host


def _placed(host: _Host, spec: ParameterSpec, place: Place | None) -> Parameter:
    if not isinstance(host, QuantizedTensor):
        return _put(host, spec, place)
    specs = _array_specs(host, spec)
    leaves, structure = jax.tree.flatten(host)
    placed = jax.tree.unflatten(structure, [_put(leaf, own, place) for leaf, own in zip(leaves, specs, strict=True)])
    placed.check()
    return placed


def _array_specs(host: QuantizedTensor, spec: ParameterSpec) -> list[ParameterSpec]:
    """Of values, scales and zero points `[..., groups, out]`, in the order of the tensor's leaves."""
    values, *per_group = (
        replace(spec, shape=leaf.shape, dtype=jnp.dtype(leaf.dtype), format=None) for leaf in jax.tree.leaves(host)
    )
    axes = (*spec.axes[:-2], "groups", spec.axes[-2])
    return [values, *(replace(own, axes=axes) for own in per_group)]


def _put(host: np.ndarray, spec: ParameterSpec, place: Place | None) -> jax.Array:
    host.flags.writeable = False  # a CPU device takes this memory as it is
    return jax.block_until_ready(jax.device_put(host, place(spec) if place is not None else None))
