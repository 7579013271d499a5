"""Gemma 3n (Google 2025): the last layers read the K/V of earlier ones; see gemma3n_decoder.py for the rest.

A multimodal directory is served as the language model inside it; its vision and audio parts are not read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxinfer.config import AltUpSpec, ConfigError, ModelConfig, NormSpec, PerLayerInputSpec
from jaxinfer.models import gemma
from jaxinfer.models.decoder_fields import decoder_config, kv_owners, layer_windows, read_activation, read_eps
from jaxinfer.models.gemma import softcap
from jaxinfer.models.hugging_face import Fields
from jaxinfer.models.multimodal import is_multimodal, language_model, renamed
from jaxinfer.models.rope_fields import read_ropes
from jaxinfer.models.sources import Source

DEFAULTS: Mapping[str, Any] = {  # of text_config, whose files leave out what is as transformers has it
    "vocab_size": 262_400,
    "hidden_size": 2048,
    "intermediate_size": 16_384,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
}
_ROPES: Mapping[str, Mapping[str, Any]] = {
    "full_attention": {"rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_theta": 10_000.0},
}
_LAYER = "model.layers.{i}."
PER_LAYER_WEIGHTS: Mapping[str, str | Source] = {
    "per_layer.embed.weight": "model.embed_tokens_per_layer.weight",
    "per_layer.projection.weight": "model.per_layer_model_projection.weight",
    "per_layer.norm.weight": "model.per_layer_projection_norm.weight",
    "layers.{i}.per_layer.gate.weight": _LAYER + "per_layer_input_gate.weight",
    "layers.{i}.per_layer.projection.weight": _LAYER + "per_layer_projection.weight",
    "layers.{i}.per_layer.norm.weight": _LAYER + "post_per_layer_input_norm.weight",
}
_ALT_UP: Mapping[str, str] = {
    "layers.{i}.alt_up.router_norm.weight": _LAYER + "altup.router_norm.weight",
    "layers.{i}.alt_up.router.weight": _LAYER + "altup.modality_router.weight",
    "layers.{i}.alt_up.prediction.weight": _LAYER + "altup.prediction_coefs.weight",
    "layers.{i}.alt_up.correction.weight": _LAYER + "altup.correction_coefs.weight",
    "layers.{i}.alt_up.output_scale": _LAYER + "altup.correct_output_scale",
    "layers.{i}.laurel.left.weight": _LAYER + "laurel.linear_left.weight",
    "layers.{i}.laurel.right.weight": _LAYER + "laurel.linear_right.weight",
    "layers.{i}.laurel.norm.weight": _LAYER + "laurel.post_laurel_norm.weight",
}


def ignored(config: ModelConfig) -> str:
    """Pattern of tensors that may be there unread: other modalities, and K/V projections of layers that have none."""
    parts = r"model\.(vision_tower|audio_tower|embed_vision|embed_audio)\..*"
    sharing = "|".join(str(index) for index, layer in enumerate(config.layers) if layer.kv_from is not None)
    unused = rf"model\.(language_model\.)?layers\.({sharing})\.self_attn\.(k_proj|v_proj|k_norm)\..*"
    return f"{parts}|{unused}" if sharing else parts


def weights(config: ModelConfig) -> Mapping[str, str | Source]:
    """Names in the checkpoint."""
    assert config.alt_up is not None
    plain: dict[str, str | Source] = {**gemma.weights(config), **PER_LAYER_WEIGHTS, **_ALT_UP}
    for i in range(config.alt_up.num_streams - 1):
        plain[f"spread.{i}.weight"] = f"model.altup_projections.{i}.weight"
        plain[f"gather.{i}.weight"] = f"model.altup_unembed_projections.{i}.weight"
    return within_multimodal(plain) if is_multimodal(config.architecture) else plain


def within_multimodal(plain: Mapping[str, str | Source]) -> Mapping[str, str | Source]:
    """Names of the language model inside a directory of Gemma 3n or 4; `lm_head` stays outside."""
    return renamed(plain, lambda name: name.replace("model.", "model.language_model.", 1))


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Gemma3nForCausalLM's config.json, or the text part of Gemma3nForConditionalGeneration's. Raises ConfigError."""
    architecture, fields = language_model(hf, DEFAULTS)
    types = fields.layer_types(lambda index: "sliding_attention" if (index + 1) % 5 else "full_attention")
    depth, head_dim = len(types), fields.integer("head_dim", 256)
    owners = kv_owners(types, fields.integer("num_kv_shared_layers", 15))
    widths = _per_layer(fields, "intermediate_size", depth, int)
    sparsity = fields.get("activation_sparsity_pattern")
    if sparsity is None:
        sparsity = [0.95 if depth > 10 and index < 10 else 0.0 for index in range(depth)]
    else:
        sparsity = _per_layer(fields, "activation_sparsity_pattern", depth, (int, float))
    if not all(0 <= share < 1 for share in sparsity):
        raise ConfigError(f"activation_sparsity_pattern={sparsity} must be from 0 to below 1")
    fields.skip("altup_coef_clip", "altup_lr_multiplier")  # of training
    fields.skip("query_pre_attn_scalar")  # of Gemma 3: scores are not scaled here
    streams, active = fields.integer("altup_num_inputs", 4), fields.integer("altup_active_idx", 0)
    if not 0 <= active < streams:
        raise ConfigError(f"altup_active_idx={active} must be from 0 to below altup_num_inputs={streams}")
    ropes = read_ropes(fields, {"full_attention": head_dim, "sliding_attention": head_dim}, _ROPES)
    vocab_size = fields.integer("vocab_size")
    bias = fields.boolean("attention_bias", False)
    made = decoder_config(
        architecture,
        fields,
        layer_windows(types, fields.integer("sliding_window", 512)),
        ropes=[ropes[kind] for kind in types],
        head_dim=256,
        norm=NormSpec(read_eps(fields, default=1e-6), scale_in_float32=True),
        activation=read_activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        ffn_size=max(widths),
        tie_embeddings=True,
        decoder="gemma3n",
        embed_scale=math.sqrt(fields.integer("hidden_size")),
        norm_place="around",
        qk_norm="head",
        v_norm=True,
        attention_scale=1.0,
        logit_softcap=softcap(fields, "final_logit_softcapping", 30.0),
        qkv_bias=bias,
        o_bias=bias,
        per_layer_input=PerLayerInputSpec(
            fields.integer("hidden_size_per_layer_input", 256),
            fields.integer("vocab_size_per_layer_input", min(vocab_size, 262_144)),
        ),
        alt_up=AltUpSpec(
            streams, active, fields.boolean("altup_correct_scale", True), fields.integer("laurel_rank", 64)
        ),
    )
    layers = tuple(
        dataclasses.replace(layer, kv_from=owner, ffn_size=width, activation_sparsity=share)
        for layer, owner, width, share in zip(made.layers, owners, widths, sparsity, strict=True)
    )
    return dataclasses.replace(made, layers=layers)


def _per_layer(fields: Fields, name: str, depth: int, kind: Any) -> list[Any]:
    """A list with an entry per layer, or one number for all."""
    value = fields.get(name)
    if isinstance(value, list):
        return fields.listed(name, depth, kind) or []
    return [fields.integer(name) if kind is int else fields.number(name)] * depth
