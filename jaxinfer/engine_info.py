"""What an engine serves and how it would run it, as JSON: for `jaxinfer info`, the server, and benchmarks' files."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.batch import device_kv_spec, kv_spec, page_size_of
from jaxinfer.blueprint import device_bytes
from jaxinfer.config import EngineConfig, KVShape, ModelConfig, PageGroup, page_groups
from jaxinfer.models.transformer import abstract_parameters
from jaxinfer.perf.kv_size import kv_choices

if TYPE_CHECKING:
    from jaxinfer.engine import Engine


def describe(engine: Engine) -> dict[str, Any]:
    """The model, effective options, memory, kernels, versions."""
    model, config, state = engine.model, engine.config, engine.device_state
    mesh = engine.blueprint.mesh
    devices: list[Any] = sorted(state.slots.tokens.sharding.device_set, key=lambda device: device.id)
    return {
        "model": str(engine.model_dir.name),
        **_shape(model, config),
        "parameter_bytes": engine.parameter_bytes,
        "max_model_len": engine.max_model_len,
        "has_tokenizer": engine.tokenizer is not None,
        "chat_templates": [] if engine.chat_template is None else list(engine.chat_template.names),
        "dtype": config.dtype,
        **_memory(model, config, engine.max_model_len, engine.num_pages),
        "attention_backend": state.cache.layers[0].backend,
        "matmul_backend": config.matmul_backend,
        "invariant": config.invariant,
        "programs": [str(shape) for shape in engine.programs.declared()],
        "programs_on_demand": [str(shape) for shape in engine.programs.on_demand()],
        "device": str(devices[0]),
        "num_devices": len(devices),
        "mesh": {} if mesh is None else {axis: size for axis, size in mesh.config.sizes.items() if size > 1},
        "parameter_bytes_per_device": sum(map(device_bytes, engine.blueprint.parameters)),
        "kv_bytes_per_device": sum(map(device_bytes, jax.tree.leaves(engine.blueprint.state.cache))),
        "platform": jax.default_backend(),
        "versions": {"jax": jax.__version__, "numpy": np.__version__},
    }


def _shape(model: ModelConfig, config: EngineConfig) -> dict[str, Any]:
    specs = abstract_parameters(model, jnp.dtype(config.dtype)).values()
    formats = Counter("plain" if spec.format is None else str(spec.format) for spec in specs)
    return {
        "architecture": model.architecture,
        "num_parameters": sum(math.prod(spec.shape) for spec in specs),
        "weights": dict(formats),
        "vocab_size": model.vocab_size,
        "num_layers": len(model.layers),
        "q_heads": model.q_heads,
        "kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
    }


def _memory(model: ModelConfig, config: EngineConfig, max_model_len: int, num_pages: tuple[int, ...]) -> dict[str, Any]:
    def row_bytes(shape: KVShape) -> int:
        return kv_spec(shape, config).token_bytes

    def group_info(group: PageGroup, pages: int) -> dict[str, Any]:
        return {
            "window": group.window,
            "kv_heads": group.shape.kv_heads,
            "head_dim": group.shape.head_dim,
            "layers": list(group.layers),
            "num_pages": pages - 1,
            "page_bytes": device_kv_spec(group.shape, config).token_bytes
            * page_size_of(config)
            * (len(group.layers) // config.mesh_sizes.pipe),
        }

    groups = page_groups(model)
    return {
        "kv_dtype": jnp.dtype(kv_spec(groups[0].shape, config).dtype).name,
        "kv_bytes_per_token": sum(row_bytes(group.shape) * len(group.layers) for group in groups),
        "kv_choices": [dataclasses.asdict(choice) for choice in kv_choices(model, max_model_len, row_bytes)],
        "page_size": page_size_of(config),
        "page_groups": [group_info(group, pages) for group, pages in zip(groups, num_pages, strict=True)],
    }
