"""GPT-OSS (OpenAI 2025, arXiv 2508.10925): attention sinks, every other layer slides, experts with a clamped SwiGLU."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxinfer.config import ActivationSpec, ExpertsSpec, ModelConfig, NormSpec
from jaxinfer.models import llama
from jaxinfer.models.decoder_fields import decoder_config, layer_windows, read_eps
from jaxinfer.models.hugging_face import Fields
from jaxinfer.models.sources import Source

_MLP = "model.layers.{i}.mlp."
_GATE_UP, _BIAS = _MLP + "experts.gate_up_proj", _MLP + "experts.gate_up_proj_bias"
WEIGHTS: Mapping[str, str | Source] = {
    **llama.WEIGHTS,
    "layers.{i}.attention.sinks": "model.layers.{i}.self_attn.sinks",
    "layers.{i}.mlp.router.weight": _MLP + "router.weight",
    "layers.{i}.mlp.router.bias": _MLP + "router.bias",
    "layers.{i}.mlp.experts.gate": Source(_GATE_UP, part=0, of=2, axis=1, interleaved=True, transposed=True),
    "layers.{i}.mlp.experts.up": Source(_GATE_UP, part=1, of=2, axis=1, interleaved=True, transposed=True),
    "layers.{i}.mlp.experts.down": Source(_MLP + "experts.down_proj", transposed=True),
    "layers.{i}.mlp.experts.gate_bias": Source(_BIAS, part=0, of=2, axis=1, interleaved=True),
    "layers.{i}.mlp.experts.up_bias": Source(_BIAS, part=1, of=2, axis=1, interleaved=True),
    "layers.{i}.mlp.experts.down_bias": _MLP + "experts.down_proj_bias",
}
_YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """GptOssForCausalLM's config.json -> ModelConfig; YaRN where it names no rope. Raises ConfigError."""
    fields = Fields(hf)
    per_token = fields.integer("num_experts_per_tok", 4)
    fields.fixed({"hidden_act": "silu", "experts_per_token": per_token})
    fields.skip("initial_context_length")  # the rope's original_max_position_embeddings says it too
    experts = ExpertsSpec(
        num_experts=fields.integer("num_local_experts", 128),
        per_token=per_token,
        ffn_size=fields.integer("intermediate_size"),
        routing="top_k_then_softmax",
        bias=True,
    )
    alpha, limit = fields.number("swiglu_alpha", 1.702), fields.number("swiglu_limit", 7.0)
    types = fields.layer_types(lambda index: "full_attention" if index % 2 else "sliding_attention")
    bias = fields.boolean("attention_bias", True)
    made = decoder_config(
        "GptOssForCausalLM",
        fields,
        layer_windows(types, fields.integer("sliding_window", 128)),
        default_rope={"rope_theta": 150_000.0, **_YARN},
        head_dim=64,
        norm=NormSpec(read_eps(fields, default=1e-5), scale_in_float32=True),
        activation=ActivationSpec("clamped_swiglu", alpha, limit),
        qkv_bias=bias,
        o_bias=bias,
        sinks=True,
    )
    return dataclasses.replace(made, layers=tuple(dataclasses.replace(layer, experts=experts) for layer in made.layers))
