"""The one decoder: every architecture is a ModelConfig for it, or for a decoder of its own with the same interface.

A jitted call takes its weights as one flat tuple of arrays (an nnx.State costs a Python callback per leaf and call);
`abstract_parameters` gives the tuple's order, `merger` the way back to a module.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.config import ModelConfig
from jaxinfer.models.experts import Experts
from jaxinfer.models.layers import MLP, Attend, Attention, Build, Norm, Rotations, parameter, rotations
from jaxinfer.weight_formats import WeightFormat
from pallas_kernels.matmul import matmul

# ModelConfig.decoder -> "module:class"
DECODERS: dict[str, str] = {
    "transformer": "jaxinfer.models.transformer:Transformer",
    "gemma3n": "jaxinfer.models.gemma3n_decoder:Gemma3nDecoder",
    "gemma4": "jaxinfer.models.gemma4_decoder:Gemma4Decoder",
}


class Decoder(Protocol):
    """What the engine asks of a model."""

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, attend: Attend, lengths: jax.Array | None = None
    ) -> jax.Array:
        """`tokens, positions: i32[tokens]` -> normed hidden `[tokens, embed]`; `lengths` as `rotation` has it."""
        ...

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """`hidden [rows, embed]` -> logits `f32[rows, vocab]`."""
        ...


@dataclass(frozen=True)
class ParameterSpec:
    """Shape, dtype and logical axes of one parameter; an axis name may be mapped to a mesh axis by sharding/."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str, ...]
    format: WeightFormat | None = None  # how a quantized weight is held


class Embedding(nnx.Module):
    """A `[vocab, size]` table: rows by token id, or logits against every row."""

    def __init__(self, vocab_size: int, size: int, build: Build, *, scale: float | None = None):
        self.weight = parameter((vocab_size, size), ("vocab", "embed"), build)
        self.backend, self.invariant, self.scale = build.matmul_backend, build.invariant, scale

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Rows `[tokens, size]`, times `scale` rounded to their dtype."""
        rows = jnp.take(self.weight[...], tokens, axis=0, mode="clip")
        return rows if self.scale is None else rows * jnp.asarray(self.scale, rows.dtype)

    def logits(self, hidden: jax.Array, softcap: float | None) -> jax.Array:
        logits = matmul(hidden, self.weight[...], backend=self.backend, invariant=self.invariant, out_dtype=jnp.float32)
        return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def token_tables(config: ModelConfig, build: Build) -> tuple[Embedding, Embedding]:
    """The table of token ids and that of logits: one and the same where the model ties them."""
    embed = Embedding(config.vocab_size, config.embed_size, build, scale=config.embed_scale)
    tied = config.tie_embeddings
    return embed, embed if tied else Embedding(config.vocab_size, config.embed_size, build)


class Layer(nnx.Module):
    """Attention and an MLP or experts, each with its residual; norms of their inputs, of their outputs, or of both."""

    def __init__(self, config: ModelConfig, index: int, build: Build):
        experts = config.layers[index].experts
        self.norms_input, self.norms_output = config.norm_place != "after", config.norm_place != "before"
        self.attention = Attention(config, index, build.at("attention"))
        mlp = build.at("mlp")
        self.mlp = MLP(config, index, mlp) if experts is None else Experts(config, experts, mlp)
        if self.norms_input:
            self.attention_norm = Norm(config.embed_size, config.norm, build)
            self.mlp_norm = Norm(config.embed_size, config.norm, build)
        if self.norms_output:
            self.attention_out_norm = Norm(config.embed_size, config.norm, build)
            self.mlp_out_norm = Norm(config.embed_size, config.norm, build)

    def __call__(self, x: jax.Array, by: Rotations, attend: Attend) -> jax.Array:
        attended = self.attention(self.attention_norm(x) if self.norms_input else x, by, attend)
        x = x + (self.attention_out_norm(attended) if self.norms_output else attended)
        fed = self.mlp(self.mlp_norm(x) if self.norms_input else x)
        return x + (self.mlp_out_norm(fed) if self.norms_output else fed)


def layer_modules(
    layer: Callable[[ModelConfig, int, Build], nnx.Module], config: ModelConfig, build: Build
) -> nnx.List:
    """Every layer of a decoder."""
    return nnx.List([layer(config, i, build.at("layers").at(i)) for i in range(len(config.layers))])


class Transformer(nnx.Module):
    """A packed batch of tokens in, hidden states out; `attend` knows which tokens belong together."""

    def __init__(self, config: ModelConfig, build: Build):
        self.config = config
        self.embed, self.unembedding = token_tables(config, build)
        self.layers = layer_modules(Layer, config, build)
        self.norm = Norm(config.embed_size, config.norm, build)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, attend: Attend, lengths: jax.Array | None = None
    ) -> jax.Array:
        by = rotations(self.config, positions, lengths)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, by, attend)
        return self.norm(x)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        return self.unembedding.logits(hidden, self.config.logit_softcap)


def make_decoder(
    config: ModelConfig, dtype: jnp.dtype, matmul_backend: str = "auto", seed: int = 0, invariant: bool = False
) -> Decoder:
    """A module with random weights (under `nnx.eval_shape`: without any)."""
    module, _, attribute = DECODERS[config.decoder].partition(":")
    decoder: Callable[[ModelConfig, Build], Decoder] = getattr(importlib.import_module(module), attribute)
    return decoder(config, Build(config, jnp.dtype(dtype), matmul_backend, nnx.Rngs(seed), invariant))


def abstract_parameters(config: ModelConfig, dtype: jnp.dtype) -> dict[str, ParameterSpec]:
    """Name -> spec of every parameter, in the order of the flat tuple; allocates nothing."""
    model = nnx.eval_shape(lambda: make_decoder(config, dtype))
    return {
        ".".join(map(str, path)): ParameterSpec(
            leaf.get_value().shape,
            jnp.dtype(dtype),
            leaf.get_metadata("axes"),
            leaf.get_metadata("format", None),
        )
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    }


def merger(
    config: ModelConfig, dtype: jnp.dtype, matmul_backend: str, invariant: bool = False
) -> Callable[[tuple[jax.Array, ...]], Decoder]:
    """A function from the flat tuple of arrays back to a module; call it while tracing."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make_decoder(config, dtype, matmul_backend, invariant=invariant)))
    structure = jax.tree.structure(state)
    return lambda parameters: nnx.merge(graph, jax.tree.unflatten(structure, parameters))


def random_parameters(config: ModelConfig, dtype: jnp.dtype, seed: int) -> tuple[jax.Array, ...]:
    """Random weights in flat order, for tests and for speed measurements."""
    return tuple(jax.tree.leaves(nnx.state(make_decoder(config, dtype, seed=seed))))
