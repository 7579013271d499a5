"""Gemma 3 (Gemma Team 2025, arXiv 2503.19786): five sliding layers to a global one, each kind with a rope of its own.

A multimodal directory is served as the language model inside it; its vision tower is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.config import ConfigError, ModelConfig
from jaxinfer.models import gemma
from jaxinfer.models.decoder_fields import decoder_config, layer_windows, read_activation, read_head_dim
from jaxinfer.models.gemma import family, query_scale, softcap
from jaxinfer.models.multimodal import is_multimodal, language_model, renamed
from jaxinfer.models.rope_fields import read_ropes
from jaxinfer.models.sources import Source

IGNORED = r"(model\.)?(vision_tower|multi_modal_projector)\..*"
DEFAULTS: Mapping[str, Any] = {  # of text_config, whose files leave out what is as transformers has it
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}
_ROPES: Mapping[str, Mapping[str, Any]] = {
    "full_attention": {"rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_theta": 10_000.0},
}


def weights(config: ModelConfig) -> Mapping[str, str | Source]:
    """Names in the checkpoint."""
    plain = gemma.weights(config)
    return renamed(plain, lambda name: f"language_model.{name}") if is_multimodal(config.architecture) else plain


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Gemma3ForCausalLM's config.json, or the text part of Gemma3ForConditionalGeneration's. Raises ConfigError."""
    architecture, fields = language_model(hf, DEFAULTS)
    pattern = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", 6))
    if pattern < 1:
        raise ConfigError(f"sliding_window_pattern={pattern} must be at least 1")
    types = fields.layer_types(lambda index: "sliding_attention" if (index + 1) % pattern else "full_attention")
    fields.fixed({"use_bidirectional_attention": False, "attn_logit_softcapping": None})
    fields.skip("hidden_act")
    head_dim = read_head_dim(fields, 256)
    ropes = read_ropes(fields, {"full_attention": head_dim, "sliding_attention": head_dim}, _ROPES)
    return decoder_config(
        architecture,
        fields,
        layer_windows(types, fields.integer("sliding_window", 4096)),
        ropes=[ropes[kind] for kind in types],
        **family(fields),
        activation=read_activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        norm_place="around",
        qk_norm="head",
        attention_scale=query_scale(fields),
        logit_softcap=softcap(fields, "final_logit_softcapping", None),
    )
