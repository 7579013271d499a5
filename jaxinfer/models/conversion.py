"""A model directory into one of the same model with its weights as an Orbax checkpoint, a part of them at a time.

Hides how a checkpoint larger than memory is written, and that the new directory appears whole or not at all.
"""

from __future__ import annotations

import gc
import os
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.config import ConfigError
from jaxinfer.models import load_config
from jaxinfer.models.checkpoint import ORBAX_DIR, num_threads, open_checkpoint
from jaxinfer.models.orbax_files import FIELDS
from jaxinfer.models.regions import Host
from jaxinfer.models.shard_reads import planned, read_in_order
from jaxinfer.models.transformer import abstract_parameters
from jaxinfer.placement import PlacedParameter
from pallas_kernels.tensors import QuantizedTensor

CHUNK_BYTES = 1 << 20  # of an array, at most: what a region needs is not much less than what is read for it
BATCH_BYTES = 512 << 20  # written at once
COPIED = (  # besides weights, what a directory may have that is read, or belongs to the weights
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "README*",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


@dataclass(frozen=True)
class Converted:
    """What was written."""

    num_parameters: int
    num_bytes: int  # of the arrays


def convert(
    model_dir: str | Path,
    out: str | Path,
    dtype: jnp.dtype,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> Converted:
    """Write `out`: the files of `model_dir` that describe the model, and its weights, plain ones as `dtype`.

    The weights are logical parameters by name, quantized ones as dicts of their arrays, each in its own shape. Host
    memory: about 2 * 512 MiB, or twice the largest parameter, beside what is being read. `out` appears once it is
    complete; a run that is killed leaves `out.unfinished-*` without a config.json, which no command loads.
    Raises ConfigError where `out` exists or cannot be, CheckpointError for weights that cannot be read.
    """
    source, target = Path(model_dir), Path(out)
    _check_place(source, target)
    unfinished = target.with_name(f"{target.name}.unfinished-{secrets.token_hex(4)}")
    unfinished.mkdir()
    try:
        converted = _write_weights(source, unfinished / ORBAX_DIR, jnp.dtype(dtype), progress)
        _copy_files(source, unfinished)
        if os.path.lexists(target):
            raise ConfigError(f"{target} has come into being meanwhile; it is left as it is")
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return converted


def _check_place(source: Path, target: Path) -> None:
    if os.path.lexists(target):
        raise ConfigError(f"{target} exists; name a directory that does not")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent}, in which {target.name} would be, is not a directory")
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise ConfigError(f"{target} would lie inside the model directory {source}; name one beside it")


def _write_weights(
    source: Path, path: Path, dtype: jnp.dtype, progress: Callable[[str, int, int], None] | None
) -> Converted:
    config = load_config(source)
    specs = abstract_parameters(config, dtype)
    reads = planned([PlacedParameter((name,), spec, False, spec.shape, None) for name, spec in specs.items()])
    total = sum(read.num_bytes for read in reads)
    writer, done = _Writer(path.resolve()), 0
    with ExitStack() as files, ThreadPoolExecutor(num_threads()) as pool:
        stored = open_checkpoint(source, config, specs, files)
        for read, (host,) in read_in_order(reads, stored, pool, num_threads()):
            (name,) = read.parameter.names
            writer.add(name, host, read.num_bytes)
            done += read.num_bytes
            if progress is not None:
                progress(name, done, total)
    writer.finish()
    return Converted(len(specs), total)


class _Writer:
    """An Orbax checkpoint that grows by batches: Orbax's partial saving. Nothing is at `path` before `finish`."""

    def __init__(self, path: Path):
        from orbax.checkpoint.experimental import v1 as orbax  # takes seconds

        self._orbax, self._path = orbax, path
        self._context = orbax.Context()
        saving = self._context.array.saving
        saving.use_compression = False  # weights hardly shrink, and reading them would take several times as long
        saving.storage_options.chunk_byte_size = CHUNK_BYTES
        self._batch: dict[str, Any] = {}
        self._batch_bytes = 0

    def add(self, name: str, host: Host, num_bytes: int) -> None:
        if self._batch and self._batch_bytes + num_bytes > BATCH_BYTES:
            self._save()
        self._batch[name] = jax.device_put(_fields(host))  # Orbax would copy NumPy arrays once more
        self._batch_bytes += num_bytes

    def finish(self) -> None:
        self._save()
        with self._context:
            self._orbax.partial.finalize(self._path)

    def _save(self) -> None:
        with self._context:
            self._orbax.partial.save(self._path, self._batch)
        self._batch, self._batch_bytes = {}, 0
        gc.collect()  # what was saved is part of cycles


def _fields(host: Host) -> Any:
    if not isinstance(host, QuantizedTensor):
        return host
    return {field: getattr(host, field) for field in FIELDS if getattr(host, field) is not None}


def _copy_files(source: Path, target: Path) -> None:
    """config.json last: until it is there, nothing takes the directory for a model."""
    for pattern in COPIED:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                copy = target / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
    shutil.copyfile(source / "config.json", target / "config.json")
