"""Per-layer embeddings of Gemma 3n and 4: a small vector per token and layer, and how a layer adds its own.

Source: Gemma 3n's model card and reference implementation (2025).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.config import ModelConfig, PerLayerInputSpec
from jaxinfer.models.layers import Build, Linear, Norm, activate
from jaxinfer.models.transformer import Lookup


class PerLayerInputs(nnx.Module):
    """Token ids and embeddings -> one small vector for every layer."""

    def __init__(self, config: ModelConfig, spec: PerLayerInputSpec, build: Build):
        self.config, self.spec = config, spec
        width = len(config.layers) * spec.size
        self.embed = Lookup(spec.vocab_size, width, build, scale=math.sqrt(spec.size))
        self.projection = Linear(config.embed_size, width, ("per_layer", "embed"), build.plain())
        self.norm = Norm(spec.size, config.norm, build, axis="per_layer")

    def __call__(self, tokens: jax.Array, x: jax.Array) -> jax.Array:
        """`tokens i32[tokens]`, embeddings `x [tokens, embed]` -> `[tokens, layers, size]`, both of this device's run.

        A token past the table's vocabulary has the entry of token 0.
        """
        shape = (x.shape[0], len(self.config.layers), self.spec.size)
        of_token = self.embed(jnp.where(tokens < self.spec.vocab_size, tokens, 0)).reshape(shape)
        of_context = self.projection(x) * jnp.asarray(self.config.embed_size**-0.5, x.dtype)
        return (self.norm(of_context.reshape(shape)) + of_token) * jnp.asarray(2**-0.5, x.dtype)


def of_layer(vectors: jax.Array, index: int, num_layers: int, stage: jax.Array | int) -> jax.Array:
    """Of `vectors [tokens, layers, size]` those `[tokens, size]` of the `index`-th layer of a stage of `num_layers`."""
    if isinstance(stage, int):
        return vectors[:, stage * num_layers + index]
    return jax.lax.dynamic_index_in_dim(vectors, stage * num_layers + index, axis=1, keepdims=False)


class PerLayerGate(nnx.Module):
    """What a layer makes of its vector: `norm(projection(act(gate(x)) * vector))`, to be added."""

    def __init__(self, config: ModelConfig, spec: PerLayerInputSpec, build: Build):
        self.activation = config.activation
        self.gate = Linear(config.embed_size, spec.size, ("per_layer", "embed"), build.plain())
        self.projection = Linear(spec.size, config.embed_size, ("embed", "per_layer"), build.plain())
        self.norm = Norm(config.embed_size, config.norm, build)

    def __call__(self, x: jax.Array, vector: jax.Array) -> jax.Array:
        """`x [tokens, embed]`, `vector [tokens, size]` -> `[tokens, embed]`."""
        gate = activate(self.gate(x).astype(jnp.float32), self.activation).astype(x.dtype)
        return self.norm(self.projection(gate * vector))
