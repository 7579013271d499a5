"""Plain tensors into host arrays: whole, a part of a fused one, one per expert, transposed; converted on the way.

Hides how the bytes that a parameter needs are cut into reads. Consecutive parts read their own bytes only; interleaved
and transposed ones pass through a buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from jaxinfer.models.host_memory import aligned_empty
from jaxinfer.models.safetensors_files import StoredTensor
from jaxinfer.models.sources import Source

CHUNK_BYTES = 4 << 20  # read and converted by one job
Job = Callable[[], None]


def read_dense(
    source: Source, shape: tuple[int, ...], dtype: np.dtype, rows: slice, tensors: tuple[StoredTensor, ...]
) -> tuple[np.ndarray, list[Job]]:
    """An array `shape` as `dtype`, still to be filled, and the jobs that fill it, in any order.

    `rows` are the parameter's, along `source.axis`, among the stored ones. `tensors` is one, or one per expert.
    """
    host = aligned_empty(shape, dtype)
    if not source.per_expert:
        return host, list(_jobs(source, source.axis, rows, tensors[0], host))
    return host, [
        job
        for tensor, own in zip(tensors, host, strict=True)
        for job in _jobs(source, source.axis - 1, rows, tensor, own)
    ]


def _jobs(source: Source, axis: int, rows: slice, tensor: StoredTensor, out: np.ndarray) -> Iterator[Job]:
    if source.transposed or source.interleaved:
        return _through_buffer(source.transposed, axis, rows, tensor, out)
    return _straight(0 if source.of == 1 else axis, rows, tensor, out)


def _straight(axis: int, rows: slice, tensor: StoredTensor, out: np.ndarray) -> Iterator[Job]:
    """The part's rows are one run of bytes for each index of the axes before `axis`."""
    row_size = math.prod(tensor.shape[axis + 1 :])
    stored_run = tensor.shape[axis] * row_size if tensor.shape else 1
    run = out.reshape(math.prod(tensor.shape[:axis]), -1)
    step = max(1, CHUNK_BYTES // tensor.dtype.itemsize)
    for index in range(run.shape[0]):
        first = index * stored_run + (rows.start or 0) * row_size
        for start in range(0, run.shape[1], step):
            yield _read_job(tensor, first + start, run[index, start : start + step])


def _read_job(tensor: StoredTensor, first: int, out: np.ndarray) -> Job:
    def job() -> None:
        if out.dtype == tensor.dtype:
            tensor.read_into(out, first)
            return
        chunk = np.empty(out.size, tensor.dtype)
        tensor.read_into(chunk, first)
        np.copyto(out, chunk, casting="unsafe")  # rounds to nearest even

    return job


def _through_buffer(transposed: bool, axis: int, rows: slice, tensor: StoredTensor, out: np.ndarray) -> Iterator[Job]:
    """Matrices of the last two stored axes, some rows at a time, of which `out` takes its rows or columns."""
    *leading, num_rows, num_columns = (1, 1, *tensor.shape)
    as_stored = np.swapaxes(out, -1, -2) if transposed else out
    parts_are_columns = transposed or axis == out.ndim - 1
    into = as_stored.reshape(-1, *(1, *as_stored.shape)[-2:])
    chunk_rows = max(1, CHUNK_BYTES // (num_columns * tensor.dtype.itemsize))
    of = 1 if parts_are_columns else rows.step
    chunk_rows += -chunk_rows % of
    for matrix in range(math.prod(leading)):
        for start in range(0, num_rows, chunk_rows):
            stop = min(start + chunk_rows, num_rows)
            part = (slice(None), rows) if parts_are_columns else (slice(rows.start, None, of), slice(None))
            target = into[matrix, start // of : stop // of]
            yield _part_job(
                tensor, (matrix * num_rows + start) * num_columns, (stop - start, num_columns), part, target
            )


def _part_job(
    tensor: StoredTensor, first: int, shape: tuple[int, int], part: tuple[slice, slice], out: np.ndarray
) -> Job:
    def job() -> None:
        chunk = np.empty(shape, tensor.dtype)
        tensor.read_into(chunk, first)
        out[...] = chunk[part]

    return job
