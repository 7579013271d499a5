"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama's decoder with biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.config import ModelConfig
from jaxinfer.models.decoder_fields import decoder_config, layer_windows
from jaxinfer.models.hugging_face import Fields
from jaxinfer.models.llama import WEIGHTS as WEIGHTS


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Qwen2ForCausalLM's config.json -> ModelConfig. Raises ConfigError."""
    fields = Fields(hf)
    return decoder_config("Qwen2ForCausalLM", fields, windows(fields), qkv_bias=True)


def windows(fields: Fields) -> list[int | None]:
    """By `layer_types`; without them, with `use_sliding_window`, layers from `max_window_layers` on slide."""
    fields.fixed({"use_mrope": False})
    used = fields.boolean("use_sliding_window", False)
    size = fields.integer("sliding_window", 4096) if fields.get("sliding_window") is not None or used else None
    first = fields.integer("max_window_layers", 28)
    types = fields.layer_types(lambda index: "sliding_attention" if used and index >= first else "full_attention")
    return layer_windows(types, size if used else None)
