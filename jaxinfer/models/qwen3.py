"""Qwen3 (Yang et al. 2025, arXiv 2505.09388): Llama's decoder with a norm of each query and key head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxinfer.config import ModelConfig
from jaxinfer.models.decoder_fields import decoder_config
from jaxinfer.models.hugging_face import Fields
from jaxinfer.models.llama import WEIGHTS as WEIGHTS
from jaxinfer.models.qwen2 import windows

_HEAD_DIM = 128  # what an absent head_dim means


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Qwen3ForCausalLM's config.json -> ModelConfig. Raises ConfigError."""
    fields = Fields(hf)
    return qwen3_config("Qwen3ForCausalLM", fields, windows(fields), head_dim=_HEAD_DIM)


def qwen3_config(
    architecture: str, fields: Fields, windows: Sequence[int | None], head_dim: int | None = None
) -> ModelConfig:
    """What dense and sparse models share. Ends with `finish`."""
    bias = fields.boolean("attention_bias", False)
    return decoder_config(architecture, fields, windows, head_dim=head_dim, qkv_bias=bias, o_bias=bias, qk_norm="head")
