"""Gemma 3n's decoder: several residual streams of which each layer updates one and corrects the others (AltUp).

A decoder of its own because its residual is `[streams, tokens, embed]`: no option of the common layer expresses that.
Sources: AltUp (Baykal et al. 2023, arXiv 2301.13310), LAuReL (Menghani et al. 2024, arXiv 2411.07501).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.config import AltUpSpec, ModelConfig
from jaxinfer.models.layers import (
    MLP,
    Attend,
    Attention,
    Build,
    Linear,
    Norm,
    Rotations,
    in_order,
    parameter,
    rotations,
)
from jaxinfer.models.per_layer_inputs import PerLayerGate, PerLayerInputs, of_layer
from jaxinfer.models.transformer import layer_modules, token_tables
from pallas_kernels.reductions import row_sums

_LEAST_POWER = 1e-5  # mean square below which a projected stream is not scaled up further


class AltUp(nnx.Module):
    """Predicts all streams from all, and corrects them by what the layer made of the active one."""

    def __init__(self, config: ModelConfig, spec: AltUpSpec, build: Build):
        n = spec.num_streams
        self.spec, self.embed_size = spec, config.embed_size
        self.router_norm = Norm(config.embed_size, config.norm, build)
        self.router = Linear(config.embed_size, n, ("streams", "embed"), build.plain())
        self.prediction = Linear(n, n * n, ("streams", "streams"), build.plain())
        self.correction = Linear(n, n, ("streams", "streams"), build.plain())
        self.output_scale = parameter((config.embed_size,), ("embed",), build, fill=1.0)

    def predict(self, streams: jax.Array) -> jax.Array:
        """`[streams, tokens, embed]` -> the same: each plus a mixture of all."""
        n = self.spec.num_streams
        mixture = self.prediction(self._modalities(streams[self.spec.active])).reshape(-1, n, n)  # [tokens, to, from]
        return streams + in_order([mixture[:, :, i].T[..., None] * streams[i] for i in range(n)])

    def correct(self, predicted: jax.Array, made: jax.Array) -> jax.Array:
        """Add to every stream its share of what the layer `made [tokens, embed]` beyond its prediction."""
        share = self.correction(self._modalities(made)) + jnp.asarray(1.0, made.dtype)
        return predicted + share.T[..., None] * (made - predicted[self.spec.active])

    def output(self, corrected: jax.Array) -> jax.Array:
        """The active stream as the per-layer input's gate sees it."""
        active = corrected[self.spec.active]
        return active * self.output_scale[...] if self.spec.scale_corrected else active

    def _modalities(self, x: jax.Array) -> jax.Array:
        scaled = self.router_norm(x) * jnp.asarray(1 / self.embed_size, x.dtype)
        return jnp.tanh(self.router(scaled).astype(jnp.float32)).astype(x.dtype)


class Laurel(nnx.Module):
    """A low-rank map beside the residual."""

    def __init__(self, config: ModelConfig, spec: AltUpSpec, build: Build):
        self.left = Linear(config.embed_size, spec.laurel_rank, ("laurel", "embed"), build.plain())
        self.right = Linear(spec.laurel_rank, config.embed_size, ("embed", "laurel"), build.plain())
        self.norm = Norm(config.embed_size, config.norm, build)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.norm(self.right(self.left(x)))


class Gemma3nLayer(nnx.Module):
    """Attention beside LAuReL and an MLP on the active stream, between AltUp's prediction and correction."""

    def __init__(self, config: ModelConfig, index: int, build: Build):
        assert config.alt_up is not None and config.per_layer_input is not None
        self.active = config.alt_up.active
        self.alt_up = AltUp(config, config.alt_up, build)
        self.laurel = Laurel(config, config.alt_up, build)
        self.attention = Attention(config, index, build.at("attention"))
        self.mlp = MLP(config, index, build.at("mlp"))
        self.per_layer = PerLayerGate(config, config.per_layer_input, build)
        self.attention_norm = Norm(config.embed_size, config.norm, build)
        self.attention_out_norm = Norm(config.embed_size, config.norm, build)
        self.mlp_norm = Norm(config.embed_size, config.norm, build)
        self.mlp_out_norm = Norm(config.embed_size, config.norm, build)

    def __call__(self, streams: jax.Array, by: Rotations, attend: Attend, vector: jax.Array) -> jax.Array:
        predicted = self.alt_up.predict(streams)
        active = predicted[self.active]
        normed = self.attention_norm(active)
        attended = active + self.attention_out_norm(self.attention(normed, by, attend))
        x = (attended + self.laurel(normed)) * jnp.asarray(2**-0.5, active.dtype)
        corrected = self.alt_up.correct(predicted, x + self.mlp_out_norm(self.mlp(self.mlp_norm(x))))
        added = self.per_layer(self.alt_up.output(corrected), vector)
        return jnp.concatenate([corrected[:1], corrected[1:] + added])


Stage = jax.Array | int  # of a pipeline
Stream = tuple[jax.Array, jax.Array]  # residuals [streams, tokens, embed], per-layer vectors [tokens, layers, size]


class Gemma3nDecoder(nnx.Module):
    """Embeddings spread over the streams, the layers, and the streams' mean."""

    def __init__(self, config: ModelConfig, build: Build):
        assert config.alt_up is not None and config.per_layer_input is not None
        self.config, others = config, range(config.alt_up.num_streams - 1)
        self.embed, self.unembedding = token_tables(config, build)
        self.per_layer = PerLayerInputs(config, config.per_layer_input, build)
        size = config.embed_size
        self.spread = nnx.List([Linear(size, size, ("embed_out", "embed"), build.plain()) for _ in others])
        self.gather = nnx.List([Linear(size, size, ("embed_out", "embed"), build.plain()) for _ in others])
        self.layers = layer_modules(Gemma3nLayer, config, build)
        self.norm = Norm(config.embed_size, config.norm, build)

    def begin(self, tokens: jax.Array) -> Stream:
        x = self.embed(tokens)
        vectors = self.per_layer(tokens, x)
        return jnp.stack([x, *(_as_loud_as(x, project(x)) for project in self.spread)]), vectors

    def through(
        self, stream: Stream, positions: jax.Array, lengths: jax.Array | None, attend: Attend, stage: Stage = 0
    ) -> Stream:
        by = rotations(self.config, positions, lengths)
        streams, vectors = stream
        for index, layer in enumerate(self.layers):
            streams = layer(streams, by, attend, of_layer(vectors, index, len(self.layers), stage))
        return streams, vectors

    def finish(self, stream: Stream) -> jax.Array:
        streams = stream[0]
        first = streams[0]
        parts = [first, *(_as_loud_as(first, project(streams[i])) for i, project in enumerate(self.gather, start=1))]
        return self.norm(in_order(parts) * jnp.asarray(1 / len(parts), first.dtype))

    def unembed(self, hidden: jax.Array) -> jax.Array:
        return self.unembedding.logits(hidden, self.config.logit_softcap)


def _as_loud_as(reference: jax.Array, x: jax.Array) -> jax.Array:
    """`x [tokens, embed]` with the root mean square of `reference`, row by row."""
    return (x.astype(jnp.float32) * jnp.sqrt(_power(reference) / jnp.maximum(_power(x), _LEAST_POWER))).astype(x.dtype)


def _power(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (row_sums(wide * wide) / x.shape[-1])[..., None]
