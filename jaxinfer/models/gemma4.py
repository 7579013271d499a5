"""Gemma 4 (Google 2026), its text models: shared K/V, wider global heads, keys as values; see gemma4_decoder.py.

A multimodal directory is served as the language model inside it; its vision and audio parts are not read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxinfer.config import ConfigError, ExpertsSpec, ModelConfig, NormSpec, PerLayerInputSpec
from jaxinfer.models import gemma, gemma3n
from jaxinfer.models.decoder_fields import decoder_config, kv_owners, layer_windows, read_activation, read_eps
from jaxinfer.models.gemma import softcap
from jaxinfer.models.hugging_face import Fields
from jaxinfer.models.multimodal import is_multimodal, language_model
from jaxinfer.models.rope_fields import read_ropes
from jaxinfer.models.sources import Source

ignored = gemma3n.ignored
DEFAULTS: Mapping[str, Any] = {  # of text_config, whose files leave out what is as transformers has it
    "vocab_size": 262_144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
}
_ROPES: Mapping[str, Mapping[str, Any]] = {
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_theta": 10_000.0},
}
_LAYER = "model.layers.{i}."
_GATE_UP = _LAYER + "experts.gate_up_proj"
_OWN: Mapping[str, str | Source] = {
    "layers.{i}.scalar": _LAYER + "layer_scalar",
    "layers.{i}.sparse.router.weight": _LAYER + "router.proj.weight",
    "layers.{i}.sparse.router_scale": _LAYER + "router.scale",
    "layers.{i}.sparse.expert_scale": _LAYER + "router.per_expert_scale",
    "layers.{i}.sparse.experts.gate": Source(_GATE_UP, part=0, of=2, axis=1),
    "layers.{i}.sparse.experts.up": Source(_GATE_UP, part=1, of=2, axis=1),
    "layers.{i}.sparse.experts.down": _LAYER + "experts.down_proj",
    "layers.{i}.sparse.norm.weight": _LAYER + "pre_feedforward_layernorm_2.weight",
    "layers.{i}.sparse.out_norm.weight": _LAYER + "post_feedforward_layernorm_2.weight",
    "layers.{i}.sparse.mlp_out_norm.weight": _LAYER + "post_feedforward_layernorm_1.weight",
}


def weights(config: ModelConfig) -> Mapping[str, str | Source]:
    """Names in the checkpoint."""
    plain = {**gemma.weights(config), **gemma3n.PER_LAYER_WEIGHTS, **_OWN}
    return gemma3n.within_multimodal(plain) if is_multimodal(config.architecture) else plain


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Gemma4ForCausalLM's config.json, or the text part of Gemma4ForConditionalGeneration's. Raises ConfigError."""
    architecture, fields = language_model(hf, DEFAULTS)
    types = fields.layer_types(lambda index: "sliding_attention" if (index + 1) % 6 else "full_attention")
    types = [*types[:-1], "full_attention"]  # whatever the file says, as transformers has it
    head_dims, kv_heads = _kv_shapes(fields, types)
    global_head_dim = next(size for size, kind in zip(head_dims, types, strict=True) if kind == "full_attention")
    ropes = read_ropes(
        fields,
        {"full_attention": global_head_dim or 512, "sliding_attention": fields.integer("head_dim", 256)},
        _ROPES,
    )
    if fields.get("use_bidirectional_attention") not in (None, "vision"):
        raise ConfigError(
            f"use_bidirectional_attention={fields.get('use_bidirectional_attention')!r} is not supported; "
            "supported: null, 'vision' (which does not concern text)"
        )
    owners = kv_owners(types, fields.integer("num_kv_shared_layers", 0))
    double, ffn_size = fields.boolean("use_double_wide_mlp", False), fields.integer("intermediate_size")
    k_eq_v, bias = fields.boolean("attention_k_eq_v", False), fields.boolean("attention_bias", False)
    experts = _experts(fields)
    made = decoder_config(
        architecture,
        fields,
        layer_windows(types, fields.integer("sliding_window", 512)),
        ropes=[ropes[kind] for kind in types],
        head_dim=256,
        norm=NormSpec(read_eps(fields, default=1e-6), scale_in_float32=True),
        activation=read_activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        tie_embeddings=True,
        decoder="gemma4",
        embed_scale=math.sqrt(fields.integer("hidden_size")),
        norm_place="around",
        qk_norm="head",
        v_norm=True,
        attention_scale=1.0,
        logit_softcap=softcap(fields, "final_logit_softcapping", None),
        qkv_bias=bias,
        o_bias=bias,
        per_layer_input=_per_layer_input(fields),
    )
    layers = tuple(
        dataclasses.replace(
            layer,
            kv_from=owner,
            experts=experts,
            head_dim=head_dim,
            kv_heads=heads,
            ffn_size=2 * ffn_size if double and owner is not None else None,
            k_eq_v=k_eq_v and kind == "full_attention",
        )
        for layer, owner, head_dim, heads, kind in zip(made.layers, owners, head_dims, kv_heads, types, strict=True)
    )
    return dataclasses.replace(made, layers=layers)


def _kv_shapes(fields: Fields, types: list[str]) -> tuple[list[int | None], list[int | None]]:
    """head_dim and KV heads of each layer, None being the model's; global layers have their own.

    From `per_layer_config` (transformers 5), or `global_head_dim` and `num_global_key_value_heads`.
    """
    is_global = [kind == "full_attention" for kind in types]
    table = fields.table("per_layer_config")
    if table is None:
        size, heads = fields.integer("global_head_dim", 512), fields.get("num_global_key_value_heads")
        if heads is not None:
            heads = fields.integer("num_global_key_value_heads")
        if not fields.boolean("attention_k_eq_v", False):
            heads = None
        return [size if own else None for own in is_global], [heads if own else None for own in is_global]
    fields.fixed({"global_head_dim": None, "num_global_key_value_heads": None})
    sizes: list[int | None] = []
    kv_heads: list[int | None] = []
    for index in range(len(types)):
        layer = table.table(str(index))
        for name, values in (("head_dim", sizes), ("num_key_value_heads", kv_heads)):
            values.append(None if layer is None or layer.get(name) is None else layer.integer(name))
        if layer is not None:
            layer.finish()
    table.finish()
    for kind in set(types):
        if len({size for size, own in zip(sizes, types, strict=True) if own == kind}) > 1:
            raise ConfigError(f"per_layer_config gives {kind} layers different head_dims: {sizes}")
    return sizes, kv_heads


def _per_layer_input(fields: Fields) -> PerLayerInputSpec | None:
    size, vocab_size = fields.integer("hidden_size_per_layer_input", 256), fields.integer("vocab_size")
    table_size = fields.integer("vocab_size_per_layer_input", vocab_size)
    return PerLayerInputSpec(size, table_size) if size else None


def _experts(fields: Fields) -> ExpertsSpec | None:
    names = ("num_experts", "top_k_experts", "moe_intermediate_size")
    if not fields.boolean("enable_moe_block", False):
        fields.skip(*names, "expert_intermediate_size")
        return None
    num_experts, per_token, ffn_size = (fields.integer(name) for name in names)
    fields.fixed({"expert_intermediate_size": ffn_size})  # its name in the first files
    return ExpertsSpec(num_experts, per_token, ffn_size)
