"""Gemma 1 and 2 (Gemma Team 2024, arXiv 2403.08295 and 2408.00118): scaled embeddings, norms of one plus the weight.

Gemma 2 norms outputs too, caps attention scores and logits, and lets every other layer slide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxinfer.config import ActivationSpec, ConfigError, ModelConfig, NormSpec
from jaxinfer.models import llama
from jaxinfer.models.decoder_fields import ACTIVATIONS, decoder_config, layer_windows, read_activation, read_eps
from jaxinfer.models.hugging_face import Fields
from jaxinfer.models.sources import Source

_SANDWICH: Mapping[str, str] = {
    "layers.{i}.attention_out_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.mlp_norm.weight": "model.layers.{i}.pre_feedforward_layernorm.weight",
    "layers.{i}.mlp_out_norm.weight": "model.layers.{i}.post_feedforward_layernorm.weight",
}


def weights(config: ModelConfig) -> Mapping[str, str | Source]:
    """Names in the checkpoint. Gemma 2 names attention's output norm as Llama does the MLP's input norm."""
    return llama.WEIGHTS if config.norm_place == "before" else {**llama.WEIGHTS, **_SANDWICH}


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """GemmaForCausalLM's config.json -> ModelConfig. Raises ConfigError.

    `hidden_act` "gelu" in the first files meant the tanh form, as `hidden_activation` says since.
    """
    fields = Fields(hf)
    given = fields.get("hidden_activation")
    fields.fixed({"use_bidirectional_attention": False})
    if given is None:
        activation = ActivationSpec(fields.choice("hidden_act", {**ACTIVATIONS, "gelu": "gelu_tanh"}, "gelu"))
    else:
        fields.skip("hidden_act")
        activation = read_activation(fields, "hidden_activation", given)
    windows = (None,) * fields.integer("num_hidden_layers")
    return decoder_config("GemmaForCausalLM", fields, windows, **family(fields), activation=activation)


def config2(hf: Mapping[str, Any]) -> ModelConfig:
    """Gemma2ForCausalLM's config.json -> ModelConfig. Raises ConfigError."""
    fields = Fields(hf)
    types = fields.layer_types(lambda index: "full_attention" if index % 2 else "sliding_attention")
    fields.fixed({"use_bidirectional_attention": False})
    fields.skip("hidden_act")
    window = fields.integer("sliding_window", 4096)
    fields.fixed({"sliding_window_size": window})  # its name in the first files, which have both
    return decoder_config(
        "Gemma2ForCausalLM",
        fields,
        layer_windows(types, window),
        **family(fields),
        activation=read_activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        norm_place="around",
        attention_scale=query_scale(fields),
        attention_softcap=softcap(fields, "attn_logit_softcapping", 50.0),
        logit_softcap=softcap(fields, "final_logit_softcapping", 30.0),
    )


def family(fields: Fields) -> dict[str, Any]:
    """What Gemma 1, 2 and 3 have in common."""
    bias = fields.boolean("attention_bias", False)
    return {
        "head_dim": 256,
        "norm": NormSpec(read_eps(fields, default=1e-6), offset=1.0, scale_in_float32=True),
        "embed_scale": math.sqrt(fields.integer("hidden_size")),
        "tie_embeddings": True,
        "qkv_bias": bias,
        "o_bias": bias,
    }


def query_scale(fields: Fields) -> float:
    """What scores are multiplied by."""
    scalar = fields.number("query_pre_attn_scalar", 256)
    if scalar <= 0:
        raise ConfigError(f"query_pre_attn_scalar={scalar} must be positive")
    return scalar**-0.5


def softcap(fields: Fields, name: str, default: float | None) -> float | None:
    """A cap `c` for `c * tanh(x / c)`; null is none."""
    if (fields.has(name) and fields.get(name) is None) or (not fields.has(name) and default is None):
        return None
    cap = fields.number(name, default)
    if cap <= 0:
        raise ConfigError(f"{name}={cap} must be positive, or null for none")
    return cap
