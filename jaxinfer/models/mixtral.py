"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): Mistral's decoder with eight experts in place of each MLP."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxinfer.config import ExpertsSpec, ModelConfig
from jaxinfer.models import llama
from jaxinfer.models.decoder_fields import decoder_config
from jaxinfer.models.hugging_face import Fields
from jaxinfer.models.sources import Source

_MOE = "model.layers.{i}.block_sparse_moe."
WEIGHTS: Mapping[str, str | Source] = {
    **llama.WEIGHTS,
    "layers.{i}.mlp.router.weight": _MOE + "gate.weight",
    "layers.{i}.mlp.experts.gate": _MOE + "experts.{e}.w1.weight",
    "layers.{i}.mlp.experts.up": _MOE + "experts.{e}.w3.weight",
    "layers.{i}.mlp.experts.down": _MOE + "experts.{e}.w2.weight",
}


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """MixtralForCausalLM's config.json -> ModelConfig. Raises ConfigError."""
    fields = Fields(hf)
    experts = ExpertsSpec(
        num_experts=fields.integer("num_local_experts", 8),
        per_token=fields.integer("num_experts_per_tok", 2),
        ffn_size=fields.integer("intermediate_size"),
    )
    window = None if fields.get("sliding_window") is None else fields.integer("sliding_window")
    windows = (window,) * fields.integer("num_hidden_layers")
    made = decoder_config("MixtralForCausalLM", fields, windows, default_rope={"rope_theta": 1e6})
    layers = tuple(dataclasses.replace(layer, experts=experts) for layer in made.layers)
    return dataclasses.replace(made, layers=layers)
