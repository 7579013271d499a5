"""The tiny model's shapes, its Hugging Face config, and jaxinfer's own decoder with attention for training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tiny_corpus import END_OF_TEXT_ID

from jaxinfer.config import ModelConfig
from jaxinfer.models import weight_source
from jaxinfer.models.mistral import ministral_config
from jaxinfer.models.transformer import abstract_parameters, merger, run_decoder

RESIDUAL_WEIGHTS = ("o_proj.weight", "down_proj.weight")
EMBEDDING_SCALE = 0.04
COMPUTE_DTYPE = jnp.dtype("bfloat16")  # 1.6 times as fast as float32 on a CPU with AVX512-BF16; parameters stay float32

Params = dict[str, jax.Array]  # Hugging Face name -> array, projections shaped [out, in]


@dataclass(frozen=True)
class Shape:
    """A Llama block with one window per layer (None: all tokens)."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    windows: tuple[int | None, ...]
    muon_lr: float
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    max_position: int = 1024


SHAPES = {
    "tiny": Shape(256, 8, 4, 32, 688, (128, 128, None, 128, 128, None), muon_lr=0.02),
    "draft": Shape(128, 4, 2, 32, 344, (128, 128, 128, None), muon_lr=0.03),
}


def hf_config(shape: Shape, vocab_size: int) -> dict[str, Any]:
    kinds = ["full_attention" if window is None else "sliding_attention" for window in shape.windows]
    return {
        "architectures": ["MinistralForCausalLM"],
        "model_type": "ministral",
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": len(shape.windows),
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_position,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"},
        "sliding_window": next(window for window in shape.windows if window is not None),
        "layer_types": kinds,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": END_OF_TEXT_ID,
        "pad_token_id": END_OF_TEXT_ID,
        "use_cache": True,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


class Model:
    """jaxinfer's own decoder over parameters that go by their Hugging Face names."""

    def __init__(self, shape: Shape, vocab_size: int):
        self.shape = shape
        self.config: ModelConfig = ministral_config(hf_config(shape, vocab_size))
        specs = abstract_parameters(self.config, jnp.float32)
        self.shapes = {weight_source(self.config, name).name: spec.shape for name, spec in specs.items()}
        self._merge = merger(self.config, COMPUTE_DTYPE, "xla")

    def init(self, seed: int) -> Params:
        """Fan-in scaled projections; those that write to the residual stream are zero: a layer begins as identity."""
        rng = np.random.default_rng(seed)
        params = {}
        for name, shape in self.shapes.items():
            if len(shape) == 1:
                params[name] = jnp.ones(shape)
            elif name.endswith(RESIDUAL_WEIGHTS):
                params[name] = jnp.zeros(shape)
            else:
                scale = shape[1] ** -0.5 if is_projection(name) else EMBEDDING_SCALE
                params[name] = jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)
        return params

    def __call__(self, params: Params, tokens: jax.Array) -> jax.Array:
        """`tokens i32[sequences, tokens]` -> logits `f32[sequences, tokens, vocab]`, computed in bfloat16."""
        sequences, length = tokens.shape
        transformer = self._merge(tuple(params[name].astype(COMPUTE_DTYPE) for name in self.shapes))

        def attend(
            layer: int, q: jax.Array, k: jax.Array | None, v: jax.Array | None, sinks: jax.Array | None
        ) -> jax.Array:
            assert k is not None and v is not None and sinks is None  # a Llama block has K/V of its own and no sinks
            q, k, v = (x.reshape(sequences, length, *x.shape[1:]) for x in (q, k, v))
            return attention(q, k, v, self.config.layers[layer].window).reshape(sequences * length, *q.shape[2:])

        positions = jnp.tile(jnp.arange(length), sequences)
        hidden = run_decoder(transformer, tokens.reshape(-1), positions, attend)
        return transformer.unembed(hidden).reshape(sequences, length, -1)

    def losses(self, params: Params, window: jax.Array) -> jax.Array:
        """Negative log likelihood in nats of `window[:, 1:]`, `f32[sequences, tokens]`."""
        logits = self(params, window[:, :-1])
        target = jnp.take_along_axis(logits, window[:, 1:, None], -1)[..., 0]
        return jax.nn.logsumexp(logits, -1) - target


def is_projection(name: str) -> bool:
    return name.endswith("_proj.weight")


def attention(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
    """`q [B, T, N, H]`, `k, v [B, T, K, H]`: key j is visible to query i iff 0 <= i - j < window."""
    batch, tokens, heads, head_dim = q.shape
    if window is not None and tokens > 2 * window and tokens % window == 0:
        # Each block of `window` queries sees its own block and the one before: 2 * window keys instead of all.
        blocks = tokens // window
        q = q.reshape(batch * blocks, window, heads, head_dim)
        k, v = (_with_previous_block(x, blocks) for x in (k, v))
        distance = window + jnp.arange(window)[:, None] - jnp.arange(2 * window)
        first = jnp.tile(jnp.arange(blocks) == 0, batch)[:, None, None]
        visible = (distance >= 0) & (distance < window) & ~(first & (jnp.arange(2 * window) < window))
    else:
        distance = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
        visible = ((distance >= 0) & (distance < (window or tokens)))[None]
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, head_dim) * head_dim**-0.5
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k)
    scores = jnp.where(visible[:, None, None], scores.astype(jnp.float32), -1e30)
    weights = jax.nn.softmax(scores, -1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(batch, tokens, heads, head_dim)


def _with_previous_block(x: jax.Array, blocks: int) -> jax.Array:
    """`[B, blocks * w, K, H]` -> `[B * blocks, 2 * w, K, H]`; before the first come zeros, which the caller masks."""
    batch, tokens, heads, head_dim = x.shape
    current = x.reshape(batch, blocks, tokens // blocks, heads, head_dim)
    previous = jnp.pad(current[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
    return jnp.concatenate([previous, current], 2).reshape(batch * blocks, -1, heads, head_dim)
