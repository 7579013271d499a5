"""Gemma 4's decoder: global layers of another head size, per-layer inputs, and a mixture of experts beside the MLP.

A decoder of its own because its layer has three branches and its router norms and scales what it sees.
Source: transformers' Gemma 4 (2026), of which the text part is held here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.config import ExpertsSpec, ModelConfig
from jaxinfer.models.experts import ExpertMLPs, route
from jaxinfer.models.layers import (
    MLP,
    Attend,
    Attention,
    Build,
    Linear,
    Norm,
    Rotations,
    parameter,
    root_mean_square_norm,
    rotations,
)
from jaxinfer.models.per_layer_inputs import PerLayerGate, PerLayerInputs, of_layer
from jaxinfer.models.transformer import layer_modules, token_tables


class Gemma4Experts(nnx.Module):
    """Experts beside the dense MLP: both see the residual, each through norms of its own."""

    def __init__(self, config: ModelConfig, spec: ExpertsSpec, build: Build):
        self.config, self.spec = config, spec
        self.router = Linear(config.embed_size, spec.num_experts, ("routes", "embed"), build.plain())
        self.router_scale = parameter((config.embed_size,), ("embed",), build, fill=1.0)
        self.expert_scale = parameter((spec.num_experts,), ("routes",), build, fill=1.0)
        self.experts = ExpertMLPs(config, spec, build.at("experts"))
        self.norm = Norm(config.embed_size, config.norm, build)
        self.out_norm = Norm(config.embed_size, config.norm, build)
        self.mlp_out_norm = Norm(config.embed_size, config.norm, build)

    def __call__(self, x: jax.Array, dense: jax.Array) -> jax.Array:
        """`x [tokens, embed]`: the residual; `dense`: what the MLP made of it -> both branches' sum."""
        seen = root_mean_square_norm(x.astype(jnp.float32), self.config.norm.eps).astype(x.dtype)
        seen = seen * self.router_scale[...] * jnp.asarray(self.config.embed_size**-0.5, x.dtype)
        weights, experts = route(self.router(seen).astype(jnp.float32), self.spec)
        weights = weights * self.expert_scale[...].astype(jnp.float32)[experts]
        sparse = self.experts(self.norm(x), weights, experts).astype(x.dtype)
        return self.mlp_out_norm(dense) + self.out_norm(sparse)


class Gemma4Layer(nnx.Module):
    """Attention, MLP with experts beside it where the model has them, the per-layer input, and a scalar over all."""

    def __init__(self, config: ModelConfig, index: int, build: Build):
        experts = config.layers[index].experts
        self.has_experts, self.has_input = experts is not None, config.per_layer_input is not None
        self.attention = Attention(config, index, build.at("attention"))
        self.mlp = MLP(config, index, build.at("mlp"))
        if experts is not None:
            self.sparse = Gemma4Experts(config, experts, build.at("sparse"))
        if config.per_layer_input is not None:
            self.per_layer = PerLayerGate(config, config.per_layer_input, build)
        self.attention_norm = Norm(config.embed_size, config.norm, build)
        self.attention_out_norm = Norm(config.embed_size, config.norm, build)
        self.mlp_norm = Norm(config.embed_size, config.norm, build)
        self.mlp_out_norm = Norm(config.embed_size, config.norm, build)
        self.scalar = parameter((1,), ("one",), build, fill=1.0)

    def __call__(self, x: jax.Array, by: Rotations, attend: Attend, vector: jax.Array | None) -> jax.Array:
        x = x + self.attention_out_norm(self.attention(self.attention_norm(x), by, attend))
        fed = self.mlp(self.mlp_norm(x))
        if self.has_experts:
            fed = self.sparse(x, fed)
        x = x + self.mlp_out_norm(fed)
        if vector is not None:
            x = x + self.per_layer(x, vector)
        return x * self.scalar[...]


Stage = jax.Array | int  # of a pipeline
Stream = tuple[jax.Array, jax.Array | None]  # the residual [tokens, embed] and per-layer vectors, where there are any


class Gemma4Decoder(nnx.Module):
    """A packed batch of tokens in, hidden states out; `attend` knows which tokens belong together."""

    def __init__(self, config: ModelConfig, build: Build):
        self.config = config
        self.embed, self.unembedding = token_tables(config, build)
        if config.per_layer_input is not None:
            self.per_layer = PerLayerInputs(config, config.per_layer_input, build)
        self.layers = layer_modules(Gemma4Layer, config, build)
        self.norm = Norm(config.embed_size, config.norm, build)

    def begin(self, tokens: jax.Array) -> Stream:
        x = self.embed(tokens)
        return x, None if self.config.per_layer_input is None else self.per_layer(tokens, x)

    def through(
        self, stream: Stream, positions: jax.Array, lengths: jax.Array | None, attend: Attend, stage: Stage = 0
    ) -> Stream:
        by = rotations(self.config, positions, lengths)
        x, vectors = stream
        for index, layer in enumerate(self.layers):
            x = layer(x, by, attend, None if vectors is None else of_layer(vectors, index, len(self.layers), stage))
        return x, vectors

    def finish(self, stream: Stream) -> jax.Array:
        return self.norm(stream[0])

    def unembed(self, hidden: jax.Array) -> jax.Array:
        return self.unembedding.logits(hidden, self.config.logit_softcap)
