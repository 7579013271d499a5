"""OLMo 2 (OLMo Team 2024, arXiv 2501.00656): norms of what attention and MLP give, and of whole queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.config import ModelConfig, NormSpec
from jaxinfer.models import llama
from jaxinfer.models.decoder_fields import decoder_config, read_eps
from jaxinfer.models.hugging_face import Fields
from jaxinfer.models.sources import Source

WEIGHTS: Mapping[str, str | Source] = {
    **llama.WEIGHTS,
    "layers.{i}.attention_out_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.mlp_out_norm.weight": "model.layers.{i}.post_feedforward_layernorm.weight",
}


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Olmo2ForCausalLM's config.json -> ModelConfig. Raises ConfigError."""
    fields = Fields(hf)
    bias = fields.boolean("attention_bias", False)
    return decoder_config(
        "Olmo2ForCausalLM",
        fields,
        (None,) * fields.integer("num_hidden_layers"),
        norm=NormSpec(read_eps(fields), scale_in_float32=True),
        norm_place="after",
        qk_norm="projection",
        qkv_bias=bias,
        o_bias=bias,
    )
