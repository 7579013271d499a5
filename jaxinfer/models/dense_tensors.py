"""Plain tensors into host arrays: any regions of whole, fused, stacked, transposed ones; converted on the way.

Hides how the bytes that regions need are cut into reads. What lies side by side is read in one go, also where it is for
several regions; of interleaved parts each reads what lies between its own bytes too.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxinfer.models.regions import Job, Region, Target, num_elements
from jaxinfer.models.safetensors_files import StoredTensor
from jaxinfer.models.sources import Source

CHUNK_BYTES = 4 << 20  # read and converted by one job


@dataclass(frozen=True)
class _Piece:
    """What one region needs of one stored tensor, as that is laid out."""

    cut: Region  # a step is other than 1 where parts are interleaved
    out: np.ndarray


def dense_jobs(source: Source, rows: slice, tensors: tuple[StoredTensor, ...], targets: Sequence[Target]) -> list[Job]:
    """The jobs that fill the targets, whose arrays may be of any floating-point dtype.

    `rows` are the parameter's, along `source.axis`, among the stored ones. `tensors` is one, or one per expert.
    """
    pieces: dict[int, list[_Piece]] = defaultdict(list)
    for target in targets:
        if num_elements(target.region):
            for index, piece in _pieces(source, rows, target):
                pieces[index].append(piece)
    return [
        job
        for index, found in sorted(pieces.items())
        for group in _side_by_side(found)
        for job in _group_jobs(tensors[index], group)
    ]


def _pieces(source: Source, rows: slice, target: Target) -> Iterator[tuple[int, _Piece]]:
    """Which tensors a region needs, and what of each."""
    cut = list(target.region)
    if source.of > 1:
        part = cut[source.axis]
        first, last = rows.start + part.start * rows.step, rows.start + (part.stop - 1) * rows.step
        cut[source.axis] = slice(first, last + 1, rows.step)
    if not source.per_expert:
        yield 0, _as_stored(source, tuple(cut), target.into)
        return
    for place, expert in enumerate(range(cut[0].start, cut[0].stop)):
        yield expert, _as_stored(source, tuple(cut[1:]), target.into[place])


def _as_stored(source: Source, cut: Region, out: np.ndarray) -> _Piece:
    if source.transposed:
        *leading, rows, columns = cut
        return _Piece((*leading, columns, rows), np.swapaxes(out, -1, -2))
    return _Piece(cut, out)


def _side_by_side(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces of the same rows whose columns follow one another."""

    def place(piece: _Piece) -> list[tuple[int, int]]:
        return [(part.start, part.stop) for part in piece.cut]

    group: list[_Piece] = []
    for piece in sorted(pieces, key=place):
        if group and not _follows(group[-1].cut, piece.cut):
            yield group
            group = []
        group.append(piece)
    yield group


def _follows(cut: Region, other: Region) -> bool:
    if not cut or cut[:-1] != other[:-1]:
        return False
    return other[-1].start == cut[-1].stop - 1 + _step(cut[-1])


def _step(part: slice) -> int:
    return part.step or 1


def _group_jobs(tensor: StoredTensor, group: list[_Piece]) -> Iterator[Job]:
    if len(group) == 1 and group[0].out.flags.c_contiguous and all(_step(part) == 1 for part in group[0].cut):
        return _straight(tensor, group[0])
    return _through_buffer(tensor, group)


# ---- one region, laid out as it is stored


def _straight(tensor: StoredTensor, piece: _Piece) -> Iterator[Job]:
    """Runs of bytes as long as they are stored in one, into memory where they lie in one as well."""
    firsts, run_size = _runs(tensor.shape, piece.cut)
    runs = piece.out.reshape(firsts.size, run_size)
    step = max(1, CHUNK_BYTES // tensor.dtype.itemsize)
    if run_size > step:
        for index, first in enumerate(firsts.tolist()):
            for start in range(0, run_size, step):
                yield _read_job(tensor, np.array([first + start]), runs[index : index + 1, start : start + step])
        return
    runs_per_job = max(1, step // run_size)
    for start in range(0, firsts.size, runs_per_job):
        yield _read_job(tensor, firsts[start : start + runs_per_job], runs[start : start + runs_per_job])


def _runs(shape: tuple[int, ...], cut: Region) -> tuple[np.ndarray, int]:
    """The stored runs that make up a region without steps: the first element of each, and how many elements it has."""
    spans = [(part.start, part.stop - part.start, size) for part, size in zip(cut, shape, strict=True)] or [(0, 1, 1)]
    while len(spans) > 1 and spans[-1][1] == spans[-1][2]:  # whole rows lie one after the other
        size = spans.pop()[2]
        first, length, of = spans.pop()
        spans.append((first * size, length * size, of * size))
    firsts, stride = np.array([spans[-1][0]]), 1
    for (first, length, _), (_, _, inner) in zip(reversed(spans[:-1]), reversed(spans[1:]), strict=True):
        stride *= inner
        firsts = ((first + np.arange(length)) * stride)[:, None] + firsts[None]
        firsts = firsts.reshape(-1)
    return firsts, spans[-1][1]


def _read_job(tensor: StoredTensor, firsts: np.ndarray, out: np.ndarray) -> Job:
    """`out [runs, size]`, in one piece."""

    def job() -> None:
        read = out if out.dtype == tensor.dtype else np.empty(out.shape, tensor.dtype)
        for first, run in zip(firsts.tolist(), read, strict=True):
            tensor.read_into(run, first)
        if read is not out:
            np.copyto(out, read, casting="unsafe")  # rounds to nearest even

    return job


# ---- several regions, or one that is laid out otherwise


def _through_buffer(tensor: StoredTensor, group: list[_Piece]) -> Iterator[Job]:
    """Matrices of the last two stored axes, some rows at a time, of which each piece takes its columns."""
    missing = 2 - len(tensor.shape)  # of a vector, a matrix of one row
    cuts = [(*([slice(0, 1)] * missing), *piece.cut) for piece in group]
    outs = [piece.out.reshape((1,) * missing + piece.out.shape) for piece in group]
    num_rows, num_columns = (1, 1, *tensor.shape)[-2:]
    *leading, rows, _ = cuts[0]
    step = _step(cuts[0][-1])
    first_column = cuts[0][-1].start // step * step  # of interleaved parts whole turns: rows may then be whole, too
    span = min(-(-cuts[-1][-1].stop // step) * step, num_columns) - first_column
    columns = [slice(cut[-1].start - first_column, cut[-1].stop - first_column, cut[-1].step) for cut in cuts]
    stored_rows = np.arange(rows.start, rows.stop, _step(rows))
    rows_per_job = max(1, CHUNK_BYTES // (span * tensor.dtype.itemsize))
    starts = [range(part.start, part.stop, _step(part)) for part in leading]
    for place in itertools.product(*(range(len(each)) for each in starts)):
        matrix = 0
        for each, index, size in zip(starts, place, tensor.shape, strict=False):
            matrix = matrix * size + each[index]
        for start in range(0, stored_rows.size, rows_per_job):
            own = stored_rows[start : start + rows_per_job]
            firsts = (matrix * num_rows + own) * num_columns + first_column
            parts = [(out[place][start : start + own.size], cut) for out, cut in zip(outs, columns, strict=True)]
            yield _scatter_job(tensor, firsts, span, in_one=span == num_columns and _step(rows) == 1, parts=parts)


def _scatter_job(
    tensor: StoredTensor, firsts: np.ndarray, span: int, *, in_one: bool, parts: list[tuple[np.ndarray, slice]]
) -> Job:
    """Rows of `span` elements, `in_one` where each begins where the one before it ends."""

    def job() -> None:
        chunk = np.empty((firsts.size, span), tensor.dtype)
        if in_one:
            tensor.read_into(chunk, int(firsts[0]))
        else:
            for first, row in zip(firsts.tolist(), chunk, strict=True):
                tensor.read_into(row, first)
        for out, columns in parts:
            out[...] = chunk[:, columns]

    return job
