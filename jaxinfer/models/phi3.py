"""Phi-3 and Phi-4 (Abdin et al. 2024, arXiv 2404.14219 and 2412.08905): Llama's decoder with fused projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.config import ModelConfig
from jaxinfer.models import llama
from jaxinfer.models.decoder_fields import decoder_config, read_head_dim
from jaxinfer.models.hugging_face import Fields
from jaxinfer.models.rope_fields import read_rope
from jaxinfer.models.sources import Source

_QKV, _GATE_UP = "model.layers.{i}.self_attn.qkv_proj.weight", "model.layers.{i}.mlp.gate_up_proj.weight"
WEIGHTS: Mapping[str, str | Source] = {
    **llama.WEIGHTS,
    "layers.{i}.attention.q.weight": Source(_QKV, part=0, of=3),
    "layers.{i}.attention.k.weight": Source(_QKV, part=1, of=3),
    "layers.{i}.attention.v.weight": Source(_QKV, part=2, of=3),
    "layers.{i}.mlp.gate.weight": Source(_GATE_UP, part=0, of=2),
    "layers.{i}.mlp.up.weight": Source(_GATE_UP, part=1, of=2),
}


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Phi3ForCausalLM's config.json -> ModelConfig. Raises ConfigError.

    Its files have called LongRoPE "su" and "yarn" too.
    """
    fields = Fields(hf)
    fields.fixed({"lm_head_bias": False, "mlp_bias": False, "full_attn_mod": 1, "interpolate_factor": 1})
    depth, max_position = fields.integer("num_hidden_layers"), fields.integer("max_position_embeddings")
    rope, _ = read_rope(
        fields,
        read_head_dim(fields),
        max_position,
        may_be_partial=True,
        aliases={"su": "longrope", "yarn": "longrope"},
    )
    window = None if fields.get("sliding_window") is None else fields.integer("sliding_window")
    return decoder_config("Phi3ForCausalLM", fields, [window] * depth, ropes=[rope] * depth)
