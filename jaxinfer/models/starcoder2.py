"""StarCoder2 (Lozhkov et al. 2024, arXiv 2402.19173): layer norms with biases, an MLP without a gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.config import ModelConfig, NormSpec
from jaxinfer.models import llama
from jaxinfer.models.decoder_fields import decoder_config, read_activation, read_eps
from jaxinfer.models.hugging_face import Fields
from jaxinfer.models.sources import Source

WEIGHTS: Mapping[str, str | Source] = {
    **llama.WEIGHTS,
    "layers.{i}.attention_norm.bias": "model.layers.{i}.input_layernorm.bias",
    "layers.{i}.mlp_norm.bias": "model.layers.{i}.post_attention_layernorm.bias",
    "layers.{i}.mlp.up.weight": "model.layers.{i}.mlp.c_fc.weight",
    "layers.{i}.mlp.up.bias": "model.layers.{i}.mlp.c_fc.bias",
    "layers.{i}.mlp.down.weight": "model.layers.{i}.mlp.c_proj.weight",
    "layers.{i}.mlp.down.bias": "model.layers.{i}.mlp.c_proj.bias",
    "norm.bias": "model.norm.bias",
}


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Starcoder2ForCausalLM's config.json -> ModelConfig. Raises ConfigError."""
    fields = Fields(hf)
    eps = read_eps(fields, "norm_epsilon", 1e-5)
    fields.fixed(
        {"norm_type": "layer_norm", "mlp_type": "default", "scale_attn_weights": True, "layer_norm_epsilon": eps}
    )
    # What transformers does not read: softmax is in float32, norm_epsilon and hidden_act decide.
    fields.skip("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "activation_function", "rms_norm_eps")
    bias = fields.boolean("use_bias", True)
    window = None if fields.get("sliding_window") is None else fields.integer("sliding_window")
    return decoder_config(
        "Starcoder2ForCausalLM",
        fields,
        [window] * fields.integer("num_hidden_layers"),
        norm=NormSpec(eps, kind="layer"),
        activation=read_activation(fields, "hidden_act", "gelu_pytorch_tanh"),
        tie_embeddings=True,
        gated_mlp=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
    )
