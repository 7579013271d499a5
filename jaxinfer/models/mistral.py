"""Mistral (Jiang et al. 2023) and Ministral: Llama's decoder with sliding-window attention in all or some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.config import ConfigError, ModelConfig
from jaxinfer.models.hugging_face import Fields, decoder_config
from jaxinfer.models.llama import WEIGHTS as WEIGHTS

_DEFAULT_WINDOW = 4096  # transformers' default when the field is absent; null means no window


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """MistralForCausalLM's config.json -> ModelConfig; every layer has the same window. Raises ConfigError."""
    fields = Fields(hf)
    return decoder_config("MistralForCausalLM", fields, (_window(fields),) * fields.integer("num_hidden_layers"))


def ministral_config(hf: Mapping[str, Any]) -> ModelConfig:
    """MinistralForCausalLM's config.json -> ModelConfig; `layer_types` says which layers slide. Raises ConfigError."""
    fields = Fields(hf)
    window, depth = _window(fields), fields.integer("num_hidden_layers")
    types = fields.get("layer_types")
    if types is None:
        return decoder_config("MinistralForCausalLM", fields, (window,) * depth)
    if not isinstance(types, list) or len(types) != depth:
        raise ConfigError(f"layer_types={types!r} must list num_hidden_layers={depth} layers")
    choices: dict[Any, int | None] = {"full_attention": None, "sliding_attention": window}
    for kind in types:
        if not isinstance(kind, str) or kind not in choices:
            raise ConfigError(f"layer_types has {kind!r}; supported: {', '.join(choices)}")
    if window is None and "sliding_attention" in types:
        raise ConfigError("sliding_window is null, but layer_types has 'sliding_attention' layers")
    return decoder_config("MinistralForCausalLM", fields, tuple(choices[kind] for kind in types))


def _window(fields: Fields) -> int | None:
    """Tokens a query sees, itself included."""
    if fields.has("sliding_window") and fields.get("sliding_window") is None:
        return None
    return fields.integer("sliding_window", _DEFAULT_WINDOW)
