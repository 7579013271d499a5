"""Mistral (Jiang et al. 2023) and Ministral: Llama's decoder with sliding-window attention in all or some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.config import ModelConfig
from jaxinfer.models.decoder_fields import decoder_config, layer_windows
from jaxinfer.models.hugging_face import Fields
from jaxinfer.models.llama import WEIGHTS as WEIGHTS

_DEFAULT_WINDOW = 4096  # transformers' default when the field is absent; null means no window


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """MistralForCausalLM's config.json -> ModelConfig; every layer has the same window. Raises ConfigError."""
    fields = Fields(hf)
    return decoder_config("MistralForCausalLM", fields, (window(fields),) * fields.integer("num_hidden_layers"))


def ministral_config(hf: Mapping[str, Any]) -> ModelConfig:
    """MinistralForCausalLM's config.json -> ModelConfig; `layer_types` says which layers slide. Raises ConfigError."""
    fields = Fields(hf)
    size = window(fields)
    types = fields.layer_types(lambda index: "full_attention" if size is None else "sliding_attention")
    return decoder_config("MinistralForCausalLM", fields, layer_windows(types, size))


def window(fields: Fields) -> int | None:
    """Tokens a query sees, itself included."""
    if fields.has("sliding_window") and fields.get("sliding_window") is None:
        return None
    return fields.integer("sliding_window", _DEFAULT_WINDOW)
