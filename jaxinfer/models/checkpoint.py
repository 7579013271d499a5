"""Hugging Face safetensors directories into placed arrays, one tensor at a time; never a whole file, never pickle.

Hides the file format, sharded indices, dtype conversion and placement. The arrays own their memory: nothing stays
mapped to a file, so replacing one while it is served changes nothing. Everything is checked before weights are read.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.models import weight_name
from jaxinfer.models.hugging_face import without_duplicates
from jaxinfer.models.transformer import ParameterSpec, abstract_parameters

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SOURCE_DTYPES: Mapping[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 8
_IGNORED = re.compile(r".*\brotary_emb\.inv_freq")  # derived from config.json; old files carry it
_FOREIGN_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".h5", ".msgpack", ".npz")
_CHUNK_BYTES = 4 << 20  # read and converted at once, per thread
_MAX_THREADS = 4
_ALIGNMENT_BYTES = 64  # XLA:CPU takes a NumPy buffer as it is, without a copy, from this alignment on

Place = Callable[[ParameterSpec], jax.sharding.Sharding | jax.Device | None]
Progress = Callable[[str, int, int], None]


class CheckpointError(ValueError):
    """Weights that cannot be loaded; the message names the tensor, the file and what was expected."""


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor's bytes lie."""

    name: str
    file: FileIO
    dtype_code: str
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    end: int

    def __str__(self) -> str:
        return f"tensor {self.name!r} in {self.file.name}"


def load_parameters(
    model_dir: str | Path,
    config: ModelConfig,
    dtype: jnp.dtype,
    *,
    place: Place | None = None,
    progress: Progress | None = None,
) -> tuple[jax.Array, ...]:
    """The model's parameters as `dtype`, in the order of `abstract_parameters(config, dtype)`.

    `place(spec)` says where each goes (None: the default device); `progress(name, bytes_read, bytes_total)` is called
    after each tensor. Peak host memory is the parameters that stay on the host plus one tensor.
    Raises CheckpointError for anything missing, unknown, mis-shaped, truncated, duplicate or of an unsupported dtype.
    """
    directory = Path(model_dir)
    with ExitStack() as files, ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        stored = _find_tensors(directory, files)
        plan = _match(abstract_parameters(config, jnp.dtype(dtype)), stored, config, directory)
        num_bytes_total = sum(tensor.end - tensor.start for tensor, _ in plan)
        parameters, num_bytes = [], 0
        for tensor, spec in plan:
            host = _read(tensor, np.dtype(spec.dtype), pool)
            parameters.append(jax.block_until_ready(jax.device_put(host, place(spec) if place is not None else None)))
            num_bytes += tensor.end - tensor.start
            if progress is not None:
                progress(tensor.name, num_bytes, num_bytes_total)
    return tuple(parameters)


# ---- what is there


def _find_tensors(directory: Path, files: ExitStack) -> dict[str, _Tensor]:
    """Every tensor of the directory by name; the opened files are closed by `files`."""
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
        return f"{wanted}; it holds {_some(safe)}: rename a single file, or add the index that lists the shards"
    foreign = [name for name in names if name.endswith(_FOREIGN_SUFFIXES)]
    if foreign:
        return (
            f"{wanted}, only {_some(foreign)}: pickled and foreign formats are never read, since unpickling runs code "
            "from the file. If you trust it, convert it once with transformers: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    return f"{wanted}; give a Hugging Face directory with safetensors weights"


def _read_shards(directory: Path, files: ExitStack) -> dict[str, _Tensor]:
    """The tensors of every shard that the index names, checked against the index both ways."""
    weight_map = _read_index(directory / INDEX_FILE)
    shard_names = sorted(set(weight_map.values()))
    absent = [name for name in shard_names if not os.path.isfile(directory / name)]
    if absent:
        raise CheckpointError(f"{directory / INDEX_FILE} names shards that are not there: {_some(absent)}")
    tensors: dict[str, _Tensor] = {}
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


def _read_header(file: FileIO) -> dict[str, _Tensor]:
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


def _tensor(name: str, entry: Any, file: FileIO, data_start: int) -> _Tensor:
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
    if code in SOURCE_DTYPES:
        expected = math.prod(shape) * SOURCE_DTYPES[code].itemsize
        if end - begin != expected:
            raise CheckpointError(
                f"tensor {name!r} in {file.name} spans {end - begin} bytes; {code} {shape} needs {expected}"
            )
    return _Tensor(name, file, code, tuple(shape), data_start + begin, data_start + end)


def _check_layout(tensors: list[_Tensor], file: FileIO, data_start: int, file_bytes: int) -> None:
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


# ---- what the model needs


def _match(
    specs: Mapping[str, ParameterSpec], stored: Mapping[str, _Tensor], config: ModelConfig, directory: Path
) -> list[tuple[_Tensor, ParameterSpec]]:
    """The tensor for each parameter, in order; everything that does not fit is an error."""
    wanted = {weight_name(config.architecture, name): spec for name, spec in specs.items()}
    missing = [name for name in wanted if name not in stored]
    tied = {weight_name(config.architecture, "unembedding.weight")} if config.tie_embeddings else set()
    unknown = [
        f"{tensor.name} ({Path(str(tensor.file.name)).name})"
        for name, tensor in stored.items()
        if name not in wanted and name not in tied and not _IGNORED.fullmatch(name)
    ]
    if missing or unknown:
        parts = [f"missing tensors: {_some(missing)}"] * bool(missing)
        parts += [f"unknown tensors: {_some(unknown)}"] * bool(unknown)
        raise CheckpointError(f"{directory} does not hold the {config.architecture} of config.json; {'; '.join(parts)}")
    for name, spec in wanted.items():
        tensor = stored[name]
        if tensor.dtype_code not in SOURCE_DTYPES:
            raise CheckpointError(f"{tensor} is {tensor.dtype_code}; supported: {', '.join(SOURCE_DTYPES)}")
        if tensor.shape != spec.shape:
            raise CheckpointError(f"{tensor} has shape {list(tensor.shape)}; config.json makes it {list(spec.shape)}")
    return [(stored[name], spec) for name, spec in wanted.items()]


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# ---- reading


def _read(tensor: _Tensor, dtype: np.dtype, pool: ThreadPoolExecutor) -> np.ndarray:
    """The tensor in memory of its own, as `dtype`, read-only and aligned so that XLA:CPU need not copy it."""
    size = math.prod(tensor.shape)
    memory = np.empty(size * dtype.itemsize + _ALIGNMENT_BYTES, np.uint8)
    offset = -memory.ctypes.data % _ALIGNMENT_BYTES
    flat = memory[offset : offset + size * dtype.itemsize].view(dtype)
    step = _CHUNK_BYTES // SOURCE_DTYPES[tensor.dtype_code].itemsize
    starts = range(0, size, step)
    for _ in pool.map(lambda start: _read_chunk(tensor, start, flat[start : start + step]), starts):
        pass  # re-raises what a chunk raised
    flat.flags.writeable = False
    return flat.reshape(tensor.shape)


def _read_chunk(tensor: _Tensor, start: int, out: np.ndarray) -> None:
    """Elements [start, start + out.size) into `out`, converted when the dtypes differ."""
    source_dtype = SOURCE_DTYPES[tensor.dtype_code]
    chunk = out if out.dtype == source_dtype else np.empty(out.size, source_dtype)
    view = memoryview(chunk.view(np.uint8))
    position = tensor.start + start * source_dtype.itemsize
    while view:
        try:
            count = os.preadv(tensor.file.fileno(), [view], position)
        except OSError as error:
            raise CheckpointError(f"{tensor} cannot be read: {error.strerror}") from error
        if count == 0:
            raise CheckpointError(f"{tensor} is truncated: the file ended at byte {position} while it was read")
        view, position = view[count:], position + count
    if chunk is not out:
        np.copyto(out, chunk, casting="unsafe")
