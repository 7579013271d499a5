"""Short digests by which the hosts of a group see that they run the same code on the same model.

Hides how much of a checkpoint is looked at: enough to tell two fine-tunes of a model apart, and little of it is read.
"""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

import jaxinfer
import pallas_kernels
import sharding
from jaxinfer.config import EngineConfig
from jaxinfer.models.checkpoint import ORBAX_DIR
from jaxinfer.models.safetensors_files import find_tensors

MAX_SAMPLES = 1024  # tensors that are looked into: each costs a read, of a network's file system perhaps
SAMPLE_BYTES = 512


def facts(model_dir: Path, config: EngineConfig) -> dict[str, Any]:
    """All that every host's engine has to have alike, as JSON has it, so that a message can name what differs.

    Raises CheckpointError where there are no weights that can be read, OSError where there is no config.
    """
    options = dataclasses.asdict(config)
    del options["compilation_cache_dir"]  # a path, and each host's own
    files = {"config.json": sha256((model_dir / "config.json").read_bytes()).hexdigest()}
    return {**options, **files, "weights": of_weights(model_dir), "source": of_source()}


def of_source() -> str:
    """Of the Python files whose functions become programs: a version's number stays the same while they are edited."""
    digest = sha256()
    for package in (jaxinfer, pallas_kernels, sharding):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{root.name}/{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def of_weights(model_dir: Path) -> str:
    """Of safetensors files: every tensor's name, dtype and shape, and some bytes of at most MAX_SAMPLES of them.

    How tensors are spread over files does not matter. Of an Orbax checkpoint only that it is one: its files differ from
    one conversion to the next.
    """
    if (model_dir / ORBAX_DIR).is_dir():
        return "Orbax"
    digest = sha256()
    with ExitStack() as files:
        tensors = [tensor for _, tensor in sorted(find_tensors(model_dir, files).items())]
        stride = -(-len(tensors) // MAX_SAMPLES)
        for index, tensor in enumerate(tensors):
            digest.update(f"{tensor.name}\0{tensor.dtype_code}\0{tensor.shape}\0".encode())
            if index % stride == 0:
                middle = tensor.num_bytes // 2
                sample = bytearray(min(SAMPLE_BYTES, tensor.num_bytes - middle))
                tensor.read_bytes_into(memoryview(sample), middle)
                digest.update(sample)
    return digest.hexdigest()
