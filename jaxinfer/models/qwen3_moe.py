"""Qwen3-MoE (Yang et al. 2025, arXiv 2505.09388): Qwen3 with a mixture of experts in all or some layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxinfer.config import ConfigError, ExpertsSpec, ModelConfig
from jaxinfer.models import llama
from jaxinfer.models.hugging_face import Fields
from jaxinfer.models.qwen3 import qwen3_config
from jaxinfer.models.sources import Source

_EXPERT = "model.layers.{i}.mlp.experts.{e}."
WEIGHTS: Mapping[str, str | Source] = {
    **llama.WEIGHTS,
    "layers.{i}.mlp.router.weight": "model.layers.{i}.mlp.gate.weight",
    "layers.{i}.mlp.experts.gate": _EXPERT + "gate_proj.weight",
    "layers.{i}.mlp.experts.up": _EXPERT + "up_proj.weight",
    "layers.{i}.mlp.experts.down": _EXPERT + "down_proj.weight",
}


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Qwen3MoeForCausalLM's config.json -> ModelConfig; some layers may keep a dense MLP. Raises ConfigError."""
    fields = Fields(hf)
    depth, step = fields.integer("num_hidden_layers"), fields.integer("decoder_sparse_step", 1)
    num_experts = fields.integer("num_local_experts", 128)
    if fields.get("num_local_experts") is None:
        num_experts = fields.integer("num_experts", 128)
    fields.fixed({"num_experts": num_experts, "shared_expert_intermediate_size": 0})
    fields.fixed({"qkv_bias": False, "use_qk_norm": True})  # in files of Qwen3-Coder
    experts = ExpertsSpec(
        num_experts=num_experts,
        per_token=fields.integer("num_experts_per_tok", 8),
        ffn_size=fields.integer("moe_intermediate_size", 768),
        renormalize=fields.boolean("norm_topk_prob", False),
    )
    dense = fields.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(index, int) for index in dense) or step < 1:
        raise ConfigError(f"mlp_only_layers={dense!r} must list layers, and decoder_sparse_step={step} be at least 1")
    fields.fixed({"use_mrope": False})
    fields.skip("max_window_layers", "sliding_window")  # which counts with use_sliding_window, and then for all layers
    used = fields.boolean("use_sliding_window", False)
    size = fields.integer("sliding_window", 4096) if used else None
    made = qwen3_config("Qwen3MoeForCausalLM", fields, [size] * depth)
    layers = tuple(
        layer if index in dense or (index + 1) % step else dataclasses.replace(layer, experts=experts)
        for index, layer in enumerate(made.layers)
    )
    return dataclasses.replace(made, layers=layers)
