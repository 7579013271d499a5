"""An Orbax checkpoint of logical parameters: what is there, checked, and any regions of it, whatever mesh it came from.

Hides Orbax's metadata and storage: arrays in chunks, read through tensorstore, Orbax's own storage library. A quantized
weight is several arrays; one of nibbles is packed anew where a region's blocks are not the stored ones.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from jaxinfer.models.hugging_face import without_duplicates
from jaxinfer.models.quantized_checkpoint import abstract_weight
from jaxinfer.models.regions import Job, Region, Target, num_elements, overlap, relative
from jaxinfer.models.safetensors_files import DTYPES, FLOATING, CheckpointError, some
from jaxinfer.models.transformer import ParameterSpec
from pallas_kernels.tensors import QuantizedTensor

READ_BYTES = 4 << 20  # by one job, or one chunk that is larger
_STATE = "state"  # where Orbax's newer interface puts a tree; the older one puts it in the directory itself
_METADATA = "_METADATA"
_NODE_CACHE_BYTES = 100_000_000  # of the index of chunks, so that it is read once
_FAILURES = (ValueError, OSError, RuntimeError, NotImplementedError, IndexError, KeyError)  # tensorstore's
FIELDS = ("values", "scales", "zeros")  # of a QuantizedTensor


@dataclass(frozen=True)
class _StoredArray:
    """One array of the checkpoint."""

    name: str
    path: Path  # of the checkpoint
    store: Any  # tensorstore.TensorStore

    def __str__(self) -> str:
        return f"array {self.name!r} in {self.path}"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.store.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.store.dtype.numpy_dtype)

    def read(self, region: Region) -> np.ndarray:
        try:
            return self.store[region].read().result() if region else np.asarray(self.store.read().result())
        except _FAILURES as error:
            raise CheckpointError(f"{self} cannot be read: {_first_line(error)}") from error


@dataclass(frozen=True)
class OrbaxParameter:
    """One parameter, and its arrays by field: of a plain one only `values`. A `StoredParameter`."""

    name: str
    spec: ParameterSpec
    arrays: Mapping[str, _StoredArray]

    def num_bytes(self, region: Region) -> int:
        """The region's share of its arrays' bytes."""
        total = sum(math.prod(array.shape) * array.dtype.itemsize for array in self.arrays.values())
        return total * num_elements(region) // max(math.prod(self.spec.shape), 1)

    def jobs(self, targets: Sequence[Target]) -> list[Job]:
        """What fills the targets."""
        if self.spec.format is None:
            return list(_jobs(self.arrays["values"], [(target.region, target.into) for target in targets]))
        stored = abstract_weight(self.spec.format, self.spec.shape)
        found: list[Job] = []
        for field, array in self.arrays.items():
            pieces = []
            for target in targets:
                into = getattr(target.into, field)
                if field != "values":
                    pieces.append((_groups(target.region, stored), into))
                elif target.into.pack_block == stored.pack_block:
                    pieces.append((_packed(target.region, stored), into))
                else:
                    found += _repacking_jobs(array, stored.pack_block or 0, target)
            found += _jobs(array, pieces)
        return found


def open_orbax(path: Path, specs: Mapping[str, ParameterSpec]) -> dict[str, OrbaxParameter]:
    """The parameters `specs` of the checkpoint at `path`; reads metadata only. Raises CheckpointError."""
    path = path / _STATE if (path / _STATE).is_dir() else path
    metadata = _read_metadata(path / _METADATA)
    expected = {
        _array_name(name, field, spec): struct
        for name, spec in specs.items()
        for field, struct in _arrays(spec).items()
    }
    held = _names(metadata, path)
    missing, unknown = [n for n in expected if n not in held], [n for n in sorted(held) if n not in expected]
    if missing or unknown:
        parts = [f"missing arrays: {some(missing)}"] * bool(missing) + [f"unknown arrays: {some(unknown)}"] * bool(
            unknown
        )
        raise CheckpointError(f"{path} does not hold the model of config.json; {'; '.join(parts)}")
    arrays = _opened(path, metadata, list(expected))
    found = {}
    for name, spec in specs.items():
        own = {field: arrays[_array_name(name, field, spec)] for field in _arrays(spec)}
        for field, struct in _arrays(spec).items():
            _check(own[field], struct, spec)
        found[name] = OrbaxParameter(name, spec, own)
    return found


def _arrays(spec: ParameterSpec) -> dict[str, Any]:
    """The `jax.ShapeDtypeStruct`s of a parameter's arrays by field."""
    if spec.format is None:
        return {"values": jax.ShapeDtypeStruct(spec.shape, spec.dtype)}
    weight = abstract_weight(spec.format, spec.shape)
    return {field: getattr(weight, field) for field in FIELDS if getattr(weight, field) is not None}


def _array_name(name: str, field: str, spec: ParameterSpec) -> str:
    return name if spec.format is None else f"{name}.{field}"


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(path.read_bytes(), object_pairs_hook=without_duplicates)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is no finished Orbax checkpoint: it has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("tree_metadata"), dict):
        raise CheckpointError(f"{path} has no tree_metadata, so it does not say what the checkpoint holds")
    return metadata


def _names(metadata: Mapping[str, Any], path: Path) -> set[str]:
    """The arrays that the checkpoint says it has: the keys of the tree that lead to each, with dots between them."""
    try:
        return {
            ".".join(str(key["key"]) for key in entry["key_metadata"]) for entry in metadata["tree_metadata"].values()
        }
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path / _METADATA} has a tree_metadata that is not Orbax's: {error!r}") from error


def _opened(path: Path, metadata: Mapping[str, Any], names: list[str]) -> dict[str, _StoredArray]:
    """The arrays' own metadata is read here, all at once."""
    context = tensorstore.Context({"cache_pool#ocdbt": {"total_bytes_limit": _NODE_CACHE_BYTES}})
    base: dict[str, Any] = {"driver": "file", "path": f"{path.resolve()}/"}
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    opening = {}
    for name in names:
        store = (
            {"driver": "ocdbt", "base": base, "path": f"{name}/", "cache_pool": "cache_pool#ocdbt"}
            if metadata.get("use_ocdbt", True)
            else base | {"path": f"{path.resolve()}/{name}/"}
        )
        # a chunk that is not there would be zeros
        spec = {"driver": driver, "kvstore": store, "fill_missing_data_reads": False}
        opening[name] = tensorstore.open(spec, open=True, read=True, context=context)
    found = {}
    for name, future in opening.items():
        try:
            found[name] = _StoredArray(name, path, future.result())
        except _FAILURES as error:
            raise CheckpointError(f"array {name!r} in {path} cannot be opened: {_first_line(error)}") from error
    return found


def _check(array: _StoredArray, expected: Any, spec: ParameterSpec) -> None:
    supported = [DTYPES[code] for code in FLOATING] if spec.format is None else [np.dtype(expected.dtype)]
    if array.shape != expected.shape:
        raise CheckpointError(f"{array} has shape {list(array.shape)}; config.json makes it {list(expected.shape)}")
    if array.dtype not in supported:
        raise CheckpointError(f"{array} is {array.dtype}; supported: {', '.join(map(str, supported))}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---- regions


def _groups(region: Region, stored: QuantizedTensor) -> Region:
    """Of `[..., groups, out]`, that of a weight's region."""
    *leading, outputs, inputs = region
    size = stored.group_size
    groups = slice(0, 1) if stored.num_groups == 1 else slice(inputs.start // size, inputs.stop // size)
    return (*leading, groups, outputs)


def _packed(region: Region, stored: QuantizedTensor) -> Region:
    """Of the values: two nibbles a byte, whole blocks."""
    if stored.pack_block is None:
        return region
    *others, inputs = region
    return (*others, slice(inputs.start // 2, inputs.stop // 2))


def _jobs(array: _StoredArray, pieces: list[tuple[Region, np.ndarray]]) -> Iterator[Job]:
    """Chunks side by side, as many as READ_BYTES hold, each read once for all the pieces that need some of it."""
    pieces = [piece for piece in pieces if num_elements(piece[0])]
    if not pieces:
        return
    sizes = _cell(array)
    spans = [
        range(
            min(region[axis].start for region, _ in pieces) // size,
            -(-max(region[axis].stop for region, _ in pieces) // size),
        )
        for axis, size in enumerate(sizes)
    ]
    for place in itertools.product(*spans):
        cell = tuple(slice(index * size, (index + 1) * size) for index, size in zip(place, sizes, strict=True))
        parts = [(found, region, out) for region, out in pieces if (found := overlap(region, cell)) is not None]
        if parts:
            yield _cell_job(array, parts)


def _cell(array: _StoredArray) -> list[int]:
    """A box of whole chunks."""
    sizes = list(array.store.chunk_layout.read_chunk.shape)
    for axis in reversed(range(len(sizes))):
        fit = max(1, READ_BYTES // (math.prod(sizes) * array.dtype.itemsize))
        chunks = -(-array.shape[axis] // sizes[axis])
        sizes[axis] *= min(fit, chunks)
        if fit < chunks:
            break
    return sizes


def _cell_job(array: _StoredArray, parts: list[tuple[Region, Region, np.ndarray]]) -> Job:
    """`parts`: what each region needs of the cell, the region, and its memory."""
    box = tuple(
        slice(min(part.start for part in along), max(part.stop for part in along))
        for along in zip(*(found for found, _, _ in parts), strict=True)
    )

    def job() -> None:
        read = array.read(box)
        for found, region, out in parts:
            into = out[relative(found, region)] if found else out  # an index of a number would be a copy
            np.copyto(into, read[relative(found, box)], casting="unsafe")

    return job


# ---- nibbles


def _repacking_jobs(array: _StoredArray, block: int, target: Target) -> Iterator[Job]:
    """Some outputs at a time: the stored blocks that hold the region's inputs, and what of them is the region's."""
    *leading, outputs, inputs = target.region
    whole_blocks = slice(inputs.start // block * block // 2, -(-inputs.stop // block) * block // 2)
    first = inputs.start - 2 * whole_blocks.start
    step = max(1, READ_BYTES // (whole_blocks.stop - whole_blocks.start))
    for place in itertools.product(*(range(part.stop - part.start) for part in leading)):
        matrix = tuple(slice(part.start + at, part.start + at + 1) for part, at in zip(leading, place, strict=True))
        out = target.into.values[place]
        for start in range(outputs.start, outputs.stop, step):
            rows = slice(start, min(start + step, outputs.stop))
            region = (*matrix, rows, whole_blocks)
            into = out[rows.start - outputs.start : rows.stop - outputs.start]
            yield _repacking_job(array, region, block, first, into, target.into.pack_block)


def _repacking_job(array: _StoredArray, region: Region, block: int, first: int, out: np.ndarray, out_block: int) -> Job:
    def job() -> None:
        read = array.read(region).reshape(out.shape[0], -1, block // 2)
        nibbles = np.concatenate([read & 15, read >> 4], axis=-1).reshape(out.shape[0], -1)
        halves = nibbles[:, first : first + 2 * out.shape[1]].reshape(out.shape[0], -1, 2, out_block // 2)
        out[...] = (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(out.shape)

    return job
