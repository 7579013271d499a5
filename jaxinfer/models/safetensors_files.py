"""The tensors of a Hugging Face safetensors directory: what is there, checked, and its bytes; never pickle.

Hides the file format and sharded indices. Headers are read and checked against each other and against the files' sizes
before any tensor is; nothing is mapped.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from jaxinfer.models.hugging_face import without_duplicates

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES: Mapping[str, np.dtype] = {  # those that are read; tensors of others may be there
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
FLOATING = ("BF16", "F16", "F32")  # what a weight that is not quantized may be stored as
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 8
_FOREIGN_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".h5", ".msgpack", ".npz")


class CheckpointError(ValueError):
    """Weights that cannot be loaded; the message names the tensor, the file and what was expected."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie."""

    name: str
    file: FileIO
    dtype_code: str
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    end: int

    def __str__(self) -> str:
        return f"tensor {self.name!r} in {self.file.name}"

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.dtype_code]

    @property
    def num_bytes(self) -> int:
        return self.end - self.start

    def read_into(self, out: np.ndarray, first: int = 0) -> None:
        """Elements [first, first + out.size) in the file's order; `out` is contiguous and of the stored dtype."""
        self.read_bytes_into(memoryview(out.reshape(-1).view(np.uint8)), first * self.dtype.itemsize)

    def read_bytes_into(self, view: memoryview, first: int) -> None:
        """Bytes [first, first + len(view)). CheckpointError where they cannot be read."""
        position = self.start + first
        assert self.start <= position <= self.end - len(view), f"{self}: {len(view)} bytes from {first} on"
        while view:
            try:
                count = os.preadv(self.file.fileno(), [view], position)
            except OSError as error:
                raise CheckpointError(f"{self} cannot be read: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(f"{self} is truncated: the file ended at byte {position} while it was read")
            view, position = view[count:], position + count

    def read(self) -> np.ndarray:
        """All of it, in memory of its own."""
        out = np.empty(self.shape, self.dtype)
        self.read_into(out)
        return out


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first few of them, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def find_tensors(directory: Path, files: ExitStack) -> dict[str, StoredTensor]:
    """Every tensor of the directory by name; the opened files are closed by `files`. Raises CheckpointError."""
    if not os.path.isdir(directory):
        raise CheckpointError(f"model directory {directory} does not exist or is not a directory")
    if os.path.lexists(directory / SINGLE_FILE):
        return _read_header(_open(directory / SINGLE_FILE, files))
    if os.path.lexists(directory / INDEX_FILE):
        return _read_shards(directory, files)
    raise CheckpointError(_nothing_found(directory))


def _nothing_found(directory: Path) -> str:
    wanted = f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}"
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    safe = [name for name in names if name.endswith(".safetensors")]
    if safe:
        return f"{wanted}; it holds {some(safe)}: rename a single file, or add the index that lists the shards"
    foreign = [name for name in names if name.endswith(_FOREIGN_SUFFIXES)]
    if foreign:
        return (
            f"{wanted}, only {some(foreign)}: pickled and foreign formats are never read, since unpickling runs code "
            "from the file. If you trust it, convert it once with transformers: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    return f"{wanted}; give a Hugging Face directory with safetensors weights"


def _read_shards(directory: Path, files: ExitStack) -> dict[str, StoredTensor]:
    """The tensors of every shard that the index names, checked against the index both ways."""
    weight_map = _read_index(directory / INDEX_FILE)
    shard_names = sorted(set(weight_map.values()))
    absent = [name for name in shard_names if not os.path.isfile(directory / name)]
    if absent:
        raise CheckpointError(f"{directory / INDEX_FILE} names shards that are not there: {some(absent)}")
    tensors: dict[str, StoredTensor] = {}
    for shard_name in shard_names:
        for name, tensor in _read_header(_open(directory / shard_name, files)).items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {name!r} is in two shards: {tensors[name].file.name}, {tensor.file.name}"
                )
            if name not in weight_map:
                raise CheckpointError(f"{tensor} is not listed in {INDEX_FILE}")
            tensors[name] = tensor
    for name, shard_name in weight_map.items():
        if name not in tensors or Path(str(tensors[name].file.name)).name != shard_name:
            raise CheckpointError(
                f"tensor {name!r} is missing from {directory / shard_name}, where {INDEX_FILE} puts it"
            )
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """weight_map: tensor name -> file name. A name that is more than a file name could leave the directory."""
    try:
        index = _parse_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map from tensor names to files")
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and PurePosixPath(name).name == name and not re.search(r"[\\\0]", name)
        if not plain or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} puts tensor {tensor!r} in {name!r}; it must be a *.safetensors file beside it"
            )
    return weight_map


def _open(path: Path, files: ExitStack) -> FileIO:
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} is not a file, or a link to one that is gone")
    try:
        return files.enter_context(FileIO(str(path)))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error


def _read_header(file: FileIO) -> dict[str, StoredTensor]:
    """Every tensor of one file. Format: 8-byte little-endian header length, JSON header, then the tensors' bytes."""
    file_bytes = os.fstat(file.fileno()).st_size
    header_bytes = int.from_bytes(file.read(8), "little")
    if file_bytes < 8 or header_bytes > file_bytes - 8:
        raise CheckpointError(f"{file.name} is truncated: {file_bytes} bytes end before its header does")
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(f"{file.name} has a header of {header_bytes} bytes; the limit is {MAX_HEADER_BYTES}")
    try:
        header = _parse_json(_read_exactly(file, header_bytes))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name} is not a safetensors file: its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.name} is not a safetensors file: its header is not an object")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    tensors = {name: _tensor(name, entry, file, 8 + header_bytes) for name, entry in entries.items()}
    _check_layout(list(tensors.values()), file, 8 + header_bytes, file_bytes)
    return tensors


def _read_exactly(file: FileIO, num_bytes: int) -> bytes:
    parts: list[bytes] = []
    while num_bytes and (part := file.read(num_bytes)):
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def _tensor(name: str, entry: Any, file: FileIO, data_start: int) -> StoredTensor:
    """One header entry, checked on its own: types, and that its size is what shape and dtype say."""
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"tensor {name!r} in {file.name} needs dtype, shape and data_offsets, has {reprlib.repr(entry)}"
        ) from None
    whole = all(type(number) is int and 0 <= number < 2**63 for number in numbers)
    if not whole or len(shape) > MAX_DIMENSIONS or not isinstance(code, str) or end < begin:
        raise CheckpointError(
            f"tensor {name!r} in {file.name} has an impossible header entry: {reprlib.repr(entry)}; it may have "
            f"{MAX_DIMENSIONS} dimensions, and numbers from 0 to 2**63 - 1"
        )
    if code in DTYPES:
        expected = math.prod(shape) * DTYPES[code].itemsize
        if end - begin != expected:
            raise CheckpointError(
                f"tensor {name!r} in {file.name} spans {end - begin} bytes; {code} {shape} needs {expected}"
            )
    return StoredTensor(name, file, code, tuple(shape), data_start + begin, data_start + end)


def _check_layout(tensors: list[StoredTensor], file: FileIO, data_start: int, file_bytes: int) -> None:
    """The tensors tile the file's data: no overlap, no hole, nothing past either end."""
    position, before = data_start, "the header"
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.end > file_bytes:
            raise CheckpointError(
                f"{tensor} is truncated: it ends at byte {tensor.end}, the file at {file_bytes}; download it again"
            )
        if tensor.start != position:
            what = "overlaps" if tensor.start < position else "leaves a hole after"
            raise CheckpointError(f"{tensor} {what} {before}: it starts at byte {tensor.start}, expected {position}")
        position, before = tensor.end, repr(tensor.name)
    if position != file_bytes:
        raise CheckpointError(f"{file.name} has {file_bytes - position} bytes after its last tensor, {before}")


def _parse_json(data: bytes) -> Any:
    return json.loads(data, object_pairs_hook=without_duplicates)
