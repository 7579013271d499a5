"""The one decoder: every architecture is a ModelConfig for it, or for a decoder of its own with the same interface.

A jitted call takes its weights as one flat tuple of arrays (an nnx.State costs a Python callback per leaf and call);
`abstract_parameters` gives the tuple's order, `merger` the way back to a module.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.config import ModelConfig
from jaxinfer.models.experts import Experts
from jaxinfer.models.layers import MLP, Attend, Attention, Build, Norm, Rotations, parameter, rotations
from jaxinfer.weight_formats import WeightFormat
from pallas_kernels.matmul import matmul
from sharding import topology
from sharding.shards import ALONE, Shards

# ModelConfig.decoder -> "module:class"
DECODERS: dict[str, str] = {
    "transformer": "jaxinfer.models.transformer:Transformer",
    "gemma3n": "jaxinfer.models.gemma3n_decoder:Gemma3nDecoder",
    "gemma4": "jaxinfer.models.gemma4_decoder:Gemma4Decoder",
}


class Decoder(Protocol):
    """What the engine asks of a model, or of one pipeline stage of it.

    Between its parts goes a stream: a pytree of arrays with tokens along one axis of each, of this device's run only
    where tokens are split (sharding/shards.py).
    """

    def begin(self, tokens: jax.Array) -> Any:
        """`tokens: i32[tokens]` -> the stream before the first layer."""
        ...

    def through(
        self, stream: Any, positions: jax.Array, lengths: jax.Array | None, attend: Attend, stage: jax.Array | int = 0
    ) -> Any:
        """The stream after this stage's layers. `positions: i32[tokens]`; `lengths` as `rotation` has it."""
        ...

    def finish(self, stream: Any) -> jax.Array:
        """The stream after the last layer -> normed hidden `[tokens, embed]`."""
        ...

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """`hidden [rows, embed]` -> logits `f32[rows, vocab]`.

        Of this device's part of the vocabulary where it is split, -inf where that is padding.
        """
        ...


def run_decoder(
    model: Decoder, tokens: jax.Array, positions: jax.Array, attend: Attend, lengths: jax.Array | None = None
) -> jax.Array:
    """`tokens, positions: i32[tokens]` through a whole model -> normed hidden `[tokens, embed]`."""
    return model.finish(model.through(model.begin(tokens), positions, lengths, attend))


@dataclass(frozen=True)
class ParameterSpec:
    """Shape, dtype and logical axes of one parameter; an axis name may be mapped to a mesh axis by sharding/."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str, ...]
    format: WeightFormat | None = None  # how a quantized weight is held
    parts: tuple[str, ...] = ()  # of a fused one, the parameters whose outputs follow one another in it


class Lookup(nnx.Module):
    """A `[vocab, size]` table of rows by token id; split along `size`, so that a gather brings rows together."""

    def __init__(self, vocab_size: int, size: int, build: Build, *, scale: float | None = None):
        self.weight = parameter((vocab_size, size), ("rows", "columns"), build)
        self.scale, self.shards = scale, build.shards

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Rows `[tokens, size]`, times `scale` rounded to their dtype; of this device's run of the tokens."""
        rows = jnp.take(self.weight[...], tokens, axis=0, mode="clip")
        return _scaled(self.shards.columns(rows, "columns"), self.scale)


class Unembedding(nnx.Module):
    """A `[vocab, size]` table against whose every row logits are computed; where a model ties them, also looked up.

    Split along the vocabulary, and padded: as many rows on every device.
    """

    def __init__(self, vocab_size: int, size: int, build: Build, *, scale: float | None = None):
        self.weight = parameter((vocab_size, size), ("vocab", "embed"), build)
        self.vocab_size, self.scale, self.shards = vocab_size, scale, build.shards
        self.backend, self.invariant = build.matmul_backend, build.invariant

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """As Lookup gives them: the sum over devices, of which one has the row."""
        table, shards = self.weight[...], self.shards
        if not shards.names("vocab"):
            return _scaled(jnp.take(table, tokens, axis=0, mode="clip"), self.scale)
        local = jnp.clip(tokens, 0, self.vocab_size - 1) - shards.index("vocab") * table.shape[0]
        here = (local >= 0) & (local < table.shape[0])
        rows = jnp.where(here[:, None], jnp.take(table, local, axis=0, mode="clip"), 0)
        return _scaled(shards.own_tokens(shards.sum(rows, "vocab")), self.scale)

    def logits(self, hidden: jax.Array, softcap: float | None) -> jax.Array:
        logits = matmul(hidden, self.weight[...], backend=self.backend, invariant=self.invariant, out_dtype=jnp.float32)
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        local = logits.shape[1]
        if local * self.shards.count("vocab") == self.vocab_size:
            return logits
        token = self.shards.index("vocab") * local + jnp.arange(local)
        return jnp.where(token < self.vocab_size, logits, -jnp.inf)


def _scaled(rows: jax.Array, scale: float | None) -> jax.Array:
    return rows if scale is None else rows * jnp.asarray(scale, rows.dtype)


def token_tables(config: ModelConfig, build: Build) -> tuple[Lookup | Unembedding, Unembedding]:
    """The table of token ids and that of logits: one and the same where the model ties them."""
    sizes = config.vocab_size, config.embed_size
    if config.tie_embeddings:
        table = Unembedding(*sizes, build, scale=config.embed_scale)
        return table, table
    return Lookup(*sizes, build, scale=config.embed_scale), Unembedding(*sizes, build)


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
    """Every layer of a decoder, or of one stage of it: all stages' are alike."""
    return nnx.List([layer(config, i, build.at("layers").at(i)) for i in range(build.num_layers)])


class Transformer(nnx.Module):
    """A packed batch of tokens in, hidden states out; `attend` knows which tokens belong together."""

    def __init__(self, config: ModelConfig, build: Build):
        self.config = config
        self.embed, self.unembedding = token_tables(config, build)
        self.layers = layer_modules(Layer, config, build)
        self.norm = Norm(config.embed_size, config.norm, build)

    def begin(self, tokens: jax.Array) -> jax.Array:
        return self.embed(tokens)

    def through(
        self,
        stream: jax.Array,
        positions: jax.Array,
        lengths: jax.Array | None,
        attend: Attend,
        stage: jax.Array | int = 0,
    ) -> jax.Array:
        by = rotations(self.config, positions, lengths)
        for layer in self.layers:
            stream = layer(stream, by, attend)
        return stream

    def finish(self, stream: jax.Array) -> jax.Array:
        return self.norm(stream)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        return self.unembedding.logits(hidden, self.config.logit_softcap)


def make_decoder(
    config: ModelConfig,
    dtype: jnp.dtype,
    matmul_backend: str = "auto",
    seed: int = 0,
    invariant: bool = False,
    shards: Shards = ALONE,
    stages: int = 1,
    fused: bool = False,
) -> Decoder:
    """A module with random weights (under `nnx.eval_shape`: without any).

    `stages`: with the layers of one of them; `fused`: linear maps of the same inputs have their weights in one array.
    """
    module, _, attribute = DECODERS[config.decoder].partition(":")
    decoder: Callable[[ModelConfig, Build], Decoder] = getattr(importlib.import_module(module), attribute)
    rngs = nnx.Rngs(seed)
    build = Build(config, jnp.dtype(dtype), matmul_backend, rngs, invariant, shards=shards, stages=stages, fused=fused)
    return decoder(config, build)


def abstract_parameters(
    config: ModelConfig, dtype: jnp.dtype, stages: int = 1, *, fused: bool = False
) -> dict[str, ParameterSpec]:
    """Name -> spec of every parameter, in the order of the flat tuple; allocates nothing.

    `stages`: of one of them; `fused`: as an engine has them, else as checkpoints do.
    """
    return dict(_abstract_parameters(config, jnp.dtype(dtype), stages, fused))


@functools.lru_cache(maxsize=16)  # it is asked for several times at start, and takes a second for a hundred layers
def _abstract_parameters(config: ModelConfig, dtype: jnp.dtype, stages: int, fused: bool) -> dict[str, ParameterSpec]:
    model = nnx.eval_shape(lambda: make_decoder(config, dtype, stages=stages, fused=fused))
    return {
        ".".join(map(str, path)): ParameterSpec(
            leaf.get_value().shape,
            dtype,
            leaf.get_metadata("axes"),
            leaf.get_metadata("format", None),
            leaf.get_metadata("parts"),
        )
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    }


def merger(
    config: ModelConfig,
    dtype: jnp.dtype,
    matmul_backend: str,
    invariant: bool = False,
    shards: Shards = ALONE,
    stages: int = 1,
    fused: bool = False,
) -> Callable[[tuple[jax.Array, ...]], Decoder]:
    """A function from the flat tuple of arrays (a device's parts of them) back to a module; call it while tracing."""
    make = functools.partial(make_decoder, config, dtype, matmul_backend, invariant=invariant)
    with topology.untargeted():
        graph, state = nnx.split(nnx.eval_shape(lambda: make(shards=shards, stages=stages, fused=fused)))
    structure = jax.tree.structure(state)
    return lambda parameters: nnx.merge(graph, jax.tree.unflatten(structure, parameters))


def random_parameters(config: ModelConfig, dtype: jnp.dtype, seed: int) -> tuple[jax.Array, ...]:
    """Random weights in flat order, for tests and for speed measurements."""
    return tuple(jax.tree.leaves(nnx.state(make_decoder(config, dtype, seed=seed))))
