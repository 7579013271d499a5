"""Llama 2, 3 and 3.x (Touvron et al. 2023; "The Llama 3 Herd of Models", 2024), and what shares their shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.config import ModelConfig
from jaxinfer.models.hugging_face import Fields, decoder_config

# Our flat name -> Hugging Face's. {i} is the layer. Both store weights as [out, in].
WEIGHTS: Mapping[str, str] = {
    "embed.weight": "model.embed_tokens.weight",
    "layers.{i}.attention_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "layers.{i}.attention.q.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "layers.{i}.attention.k.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "layers.{i}.attention.v.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "layers.{i}.attention.o.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "layers.{i}.mlp_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.mlp.gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "layers.{i}.mlp.up.weight": "model.layers.{i}.mlp.up_proj.weight",
    "layers.{i}.mlp.down.weight": "model.layers.{i}.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "unembedding.weight": "lm_head.weight",
}


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """LlamaForCausalLM's config.json -> ModelConfig; every layer sees all tokens. Raises ConfigError."""
    fields = Fields(hf)
    fields.fixed({"sliding_window": None})
    return decoder_config("LlamaForCausalLM", fields, (None,) * fields.integer("num_hidden_layers"))
