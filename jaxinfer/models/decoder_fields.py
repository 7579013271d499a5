"""The fields of config.json that Llama and its relatives share, as a ModelConfig; architectures add their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxinfer.config import ActivationSpec, ConfigError, LayerSpec, ModelConfig, NormSpec
from jaxinfer.models.hugging_face import Fields
from jaxinfer.models.rope_fields import read_rope
from jaxinfer.rope import RopeSpec

# Fields that may be present with one value only: the one this decoder implements.
FIXED: Mapping[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}
# Hugging Face's names of nonlinearities -> ours
ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def decoder_config(
    architecture: str,
    fields: Fields,
    windows: Sequence[int | None],
    *,
    ropes: Sequence[RopeSpec | None] | None = None,
    default_rope: Mapping[str, Any] | None = None,
    head_dim: int | None = None,
    norm: NormSpec | None = None,
    activation: ActivationSpec | None = None,
    ffn_size: int | None = None,
    tie_embeddings: bool = False,
    **features: Any,
) -> ModelConfig:
    """The fields that Llama and its relatives share, and `features` of ModelConfig. Ends with `finish`.

    windows, ropes: one entry per layer (ropes None: one for all, read from the fields). default_rope, head_dim and
    tie_embeddings are what absent fields mean. A window that no sequence can outgrow is none: its layers share pages
    with the others.
    """
    fields.fixed(FIXED)
    embed_size, q_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    vocab_size = fields.integer("vocab_size")
    head_dim = read_head_dim(fields, head_dim)
    max_position = fields.integer("max_position_embeddings")
    if ropes is None:
        rope, max_position = read_rope(fields, head_dim, max_position, default=default_rope)
        ropes = [rope] * len(windows)
    windows = tuple(None if window is not None and window >= max_position else window for window in windows)
    bos = fields.token_ids("bos_token_id", vocab_size)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        embed_size=embed_size,
        ffn_size=fields.integer("intermediate_size") if ffn_size is None else ffn_size,
        q_heads=q_heads,
        kv_heads=fields.integer("num_key_value_heads", q_heads),
        head_dim=head_dim,
        norm=norm or NormSpec(read_eps(fields)),
        tie_embeddings=fields.boolean("tie_word_embeddings", tie_embeddings),
        max_position=max_position,
        layers=tuple(LayerSpec(window=window, rope=rope) for window, rope in zip(windows, ropes, strict=True)),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
        activation=activation or read_activation(fields, "hidden_act", "silu"),
        **features,
    )
    fields.finish()
    return config


def read_head_dim(fields: Fields, default: int | None = None) -> int:
    """`head_dim`; absent: `default`, or hidden_size / num_attention_heads."""
    embed_size, q_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if fields.get("head_dim") is not None or default is not None:
        return fields.integer("head_dim", default)
    if q_heads < 1 or embed_size % q_heads:
        raise ConfigError(f"hidden_size={embed_size} is not a multiple of num_attention_heads={q_heads}; give head_dim")
    return embed_size // q_heads


def read_eps(fields: Fields, name: str = "rms_norm_eps", default: float | None = None) -> float:
    eps = fields.number(name, default)
    if eps < 0:
        raise ConfigError(f"{name}={eps} must not be negative")
    return eps


def read_activation(fields: Fields, name: str, default: str) -> ActivationSpec:
    return ActivationSpec(fields.choice(name, ACTIVATIONS, default))


def layer_windows(types: Sequence[str], window: int | None) -> list[int | None]:
    """The window of each layer by its type. Raises ConfigError where a layer slides over no window."""
    if window is None and "sliding_attention" in types:
        raise ConfigError("sliding_window is null, but layer_types has 'sliding_attention' layers")
    return [window if kind == "sliding_attention" else None for kind in types]


def kv_owners(types: Sequence[str], num_shared: int) -> list[int | None]:
    """Cross-layer attention of Gemma 3n and 4: per layer, the layer whose K/V it reads, None for its own.

    The last `num_shared` layers read those of the last layer of their type before them.
    """
    first = len(types) - num_shared
    owners = {kind: index for index, kind in enumerate(types[: max(first, 0)])}
    missing = set(types) - owners.keys()
    if not 0 <= num_shared <= len(types) or missing:
        raise ConfigError(
            f"num_kv_shared_layers={num_shared} of {len(types)} layers leaves none with K/V of its own of type "
            f"{', '.join(sorted(missing))}"
        )
    return [None if index < first else owners[kind] for index, kind in enumerate(types)]
