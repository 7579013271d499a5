"""Block sizes: measured ones from `tuning/<device>.json`, else the kernel's own default; a log line says which.

`scripts/tune_kernels.py` writes the tables. A kernel lists in KEYS what its block sizes depend on, so that an entry
that could never match is found by a test and not by a slow server.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Any

from pallas_kernels.devices import Device

logger = logging.getLogger(__name__)

_ATTENTION = ("phase", "dtype", "kv_dtype", "q_heads", "kv_heads", "head_dim", "page_size", "window")
KEYS: dict[str, tuple[str, ...]] = {
    "attention.mosaic_tpu": _ATTENTION,
    "attention.mosaic_gpu": _ATTENTION,
    "attention.triton": _ATTENTION,
    "matmul.mosaic_tpu": ("format", "rows", "in_size", "out_size"),
    "matmul.triton": ("format", "rows", "in_size", "out_size"),
    "grouped_matmul.mosaic_tpu": ("format", "rows", "in_size", "out_size", "num_groups"),
    "grouped_matmul.triton": ("format", "rows", "in_size", "out_size", "num_groups"),
}
PHASES = ("decode", "prefill")

_logged: set[tuple[str, str, str]] = set()
_asked: ContextVar[list[Question] | None] = ContextVar("asked", default=None)
_forced: ContextVar[Mapping[str, Mapping[str, int]]] = ContextVar("forced", default=MappingProxyType({}))


def block_sizes(kernel: str, device: Device, default: Mapping[str, int], **key: Any) -> dict[str, int]:
    """The block sizes of `kernel` ("op.backend") for `key`, the fields of KEYS[kernel]; `default` where none is known.

    `rows` is looked up as `row_bucket(rows)`. A table's entry may leave out blocks, which then have their default.
    """
    if set(key) != set(KEYS[kernel]):
        raise ValueError(f"{kernel} is tuned by {', '.join(KEYS[kernel])}; got {', '.join(key)}")
    questions, overrides = _asked.get(), _forced.get()
    if questions is not None:
        questions.append(Question(kernel, key, dict(default)))
    if kernel in overrides:
        return {**default, **overrides[kernel]}
    for entry in _table(device.name).get(kernel, []):
        if entry["key"] == key:
            _log_once(kernel, device, key, "measured", entry["blocks"])
            return {**default, **entry["blocks"]}
    _log_once(kernel, device, key, "default", default)
    return dict(default)


@dataclass(frozen=True)
class Question:
    """What a kernel asked for while it was traced."""

    kernel: str
    key: dict[str, Any]
    default: dict[str, int]


@contextmanager
def asked() -> Iterator[list[Question]]:
    """Collects the questions of whatever is traced inside."""
    questions: list[Question] = []
    token = _asked.set(questions)
    try:
        yield questions
    finally:
        _asked.reset(token)


@contextmanager
def forced(kernel: str, blocks: Mapping[str, int]) -> Iterator[None]:
    """Whatever is traced inside gets these block sizes for `kernel`, tables aside."""
    token = _forced.set({**_forced.get(), kernel: dict(blocks)})
    try:
        yield
    finally:
        _forced.reset(token)


def row_bucket(rows: int) -> int:
    """The power of two that stands for `rows` in a table's key."""
    return 1 << max(0, rows - 1).bit_length()


@functools.cache
def _table(device: str) -> dict[str, list[dict[str, Any]]]:
    """`{kernel: [{"key": ..., "blocks": ...}]}` of a device; empty where none was measured."""
    file = resources.files("pallas_kernels") / "tuning" / f"{device}.json"
    return read_table(file.read_text(), str(file)) if file.is_file() else {}


def read_table(text: str, name: str) -> dict[str, list[dict[str, Any]]]:
    """The kernels of a table's JSON. Raises ValueError, naming the file, for one that is not such a table."""
    try:
        kernels = json.loads(text)["kernels"]
        for kernel, entries in kernels.items():
            for entry in entries:
                if set(entry["key"]) != set(KEYS[kernel]):
                    raise ValueError(f"a key of {kernel} has {', '.join(KEYS[kernel])}, not {', '.join(entry['key'])}")
                if not all(isinstance(size, int) and size > 0 for size in entry["blocks"].values()):
                    raise ValueError(f"block sizes of {kernel} are integers above 0, not {entry['blocks']}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{name} is not a table of block sizes: {error!r}") from error
    return kernels


def _log_once(kernel: str, device: Device, key: Mapping[str, Any], source: str, blocks: Mapping[str, int]) -> None:
    described = ", ".join(f"{name}={value}" for name, value in key.items())
    if (kernel, device.name, described) not in _logged:
        _logged.add((kernel, device.name, described))
        logger.info("%s on %s (%s): %s block sizes %s", kernel, device.name, described, source, dict(blocks))
