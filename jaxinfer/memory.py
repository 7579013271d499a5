"""How long a sequence may get and how many K/V pages there are, from the model, the options and the machine."""

from __future__ import annotations

import math
import os

import jax

from jaxinfer.batch import device_kv_spec, page_size_of
from jaxinfer.config import ConfigError, EngineConfig, ModelConfig, PageGroup, page_groups

KV_SHARE = 0.25  # of a device's memory, for K/V pages, where kv_memory_bytes does not say


def max_model_len(model: ModelConfig, config: EngineConfig) -> int:
    """Longest prompt plus completion in tokens. Raises ConfigError where the options ask for more than there is."""
    length = model.max_position if config.max_model_len is None else config.max_model_len
    if length > model.max_position:
        raise ConfigError(f"max_model_len={length} is over the model's {model.max_position} positions")
    if not config.chunked_prefill and config.max_num_batched_tokens < length:
        raise ConfigError(
            f"chunked_prefill=False needs max_num_batched_tokens of at least max_model_len={length}, "
            f"not {config.max_num_batched_tokens}"
        )
    return length


def pages_per_group(model: ModelConfig, config: EngineConfig, length: int) -> tuple[int, ...]:
    """Pages of each page group on one device, trash page included: for every slot, cut to the memory there may be used.

    A data shard has its slots' pages alone, a context shard its part of every sequence's, a stage its layers'.

    Raises ConfigError where not even one sequence of `length` tokens fits; the message says how many bytes would do.
    """
    groups, mesh = page_groups(model), config.mesh_sizes
    page_size = page_size_of(config)
    page_bytes = [
        device_kv_spec(group.shape, config).token_bytes * page_size * len(group.layers) // mesh.pipe for group in groups
    ]
    per_sequence = [math.ceil(_pages_per_sequence(group, config, length, page_size) / mesh.context) for group in groups]
    least = [pages + 2 for pages in per_sequence]  # with the trash page and one to copy from
    more = [(config.max_num_seqs // mesh.data - 1) * pages for pages in per_sequence]
    least_bytes, more_bytes = (
        sum(pages * size for pages, size in zip(counts, page_bytes, strict=True)) for counts in (least, more)
    )
    budget = config.kv_memory_bytes
    if budget is None:
        budget = kv_budget(mesh.num_devices)
    if budget < least_bytes:
        raise ConfigError(
            f"kv_memory_bytes={budget} is too little: one sequence of max_model_len={length} needs {least_bytes} "
            f"bytes{' on each device' if mesh.num_devices > 1 else ''}; give at least that many, lower max_model_len"
            ", or spread sequences over more devices with a context axis of the mesh"
        )
    spare = min(budget - least_bytes, more_bytes)
    return tuple(few + many * spare // max(1, more_bytes) for few, many in zip(least, more, strict=True))


def _pages_per_sequence(group: PageGroup, config: EngineConfig, length: int, page_size: int) -> int:
    """Most pages one sequence holds: all its rows, or the window and what two calls in flight may add."""
    rows = length
    if group.window is not None:
        rows = min(length, group.window + 2 * max(config.max_num_batched_tokens, config.loop_steps))
    return math.ceil(rows / page_size) + (0 if group.window is None else 2)  # pages slide out late


def kv_budget(num_devices: int) -> int:
    """Bytes for K/V pages of one of the devices that engines of this process use: KV_SHARE of its memory.

    Devices of a CPU share its memory.
    """
    return int(_device_memory_bytes(num_devices) * KV_SHARE)


def _device_memory_bytes(num_devices: int) -> int:
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // min(num_devices, jax.local_device_count())
