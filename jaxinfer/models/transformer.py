"""The one decoder: every architecture is a ModelConfig for it.

A jitted call takes its weights as one flat tuple of arrays (an nnx.State costs a Python callback per leaf and call);
`abstract_parameters` gives the tuple's order, `merger` the way back to a module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.config import ModelConfig
from jaxinfer.models.layers import MLP, Attend, Attention, RMSNorm, Rotation, parameter, rotation
from pallas_kernels.matmul import matmul


@dataclass(frozen=True)
class ParameterSpec:
    """Shape, dtype and logical axes of one parameter; an axis name may be mapped to a mesh axis by sharding/."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str, ...]


class Embedding(nnx.Module):
    """A `[vocab, embed]` table: rows by token id, or logits against every row."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, backend: str, rngs: nnx.Rngs):
        self.weight = parameter((config.vocab_size, config.embed_size), dtype, ("vocab", "embed"), rngs)
        self.backend = backend

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return jnp.take(self.weight[...], tokens, axis=0, mode="clip")

    def logits(self, hidden: jax.Array) -> jax.Array:
        return matmul(hidden, self.weight[...], backend=self.backend, out_dtype=jnp.float32)


class Layer(nnx.Module):
    """Pre-norm attention and MLP, each with its residual."""

    def __init__(self, config: ModelConfig, index: int, *, dtype: jnp.dtype, backend: str, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.embed_size, config.norm_eps, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, index, dtype=dtype, backend=backend, rngs=rngs)
        self.mlp_norm = RMSNorm(config.embed_size, config.norm_eps, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, backend=backend, rngs=rngs)

    def __call__(self, x: jax.Array, by: Rotation | None, attend: Attend) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), by, attend)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nnx.Module):
    """A packed batch of tokens in, hidden states out; `attend` knows which tokens belong together."""

    def __init__(
        self, config: ModelConfig, *, dtype: jnp.dtype = jnp.float32, matmul_backend: str = "auto", rngs: nnx.Rngs
    ):
        self.config = config
        kwargs: dict[str, Any] = {"dtype": dtype, "backend": matmul_backend, "rngs": rngs}
        self.embed = Embedding(config, **kwargs)
        self.layers = nnx.List([Layer(config, index, **kwargs) for index in range(len(config.layers))])
        self.norm = RMSNorm(config.embed_size, config.norm_eps, dtype=dtype, rngs=rngs)
        if not config.tie_embeddings:
            self.unembedding = Embedding(config, **kwargs)

    def __call__(self, tokens: jax.Array, positions: jax.Array, attend: Attend) -> jax.Array:
        """`tokens, positions: i32[tokens]` -> normed hidden states `[tokens, embed]`."""
        rotations = {
            spec.rope: rotation(spec.rope, self.config.head_dim, positions)
            for spec in self.config.layers
            if spec.rope is not None
        }
        x = self.embed(tokens)
        for spec, layer in zip(self.config.layers, self.layers, strict=True):
            x = layer(x, None if spec.rope is None else rotations[spec.rope], attend)
        return self.norm(x)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """`hidden [rows, embed]` -> logits `f32[rows, vocab]`."""
        table = self.embed if self.config.tie_embeddings else self.unembedding
        return table.logits(hidden)


def abstract_parameters(config: ModelConfig, dtype: jnp.dtype) -> dict[str, ParameterSpec]:
    """Name -> spec of every parameter, in the order of the flat tuple; allocates nothing."""
    model = nnx.eval_shape(lambda: Transformer(config, dtype=dtype, rngs=nnx.Rngs(0)))
    return {
        ".".join(map(str, path)): ParameterSpec(leaf.shape, jnp.dtype(leaf.dtype), leaf.get_metadata("axes"))
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    }


def merger(
    config: ModelConfig, dtype: jnp.dtype, matmul_backend: str
) -> Callable[[tuple[jax.Array, ...]], Transformer]:
    """A function from the flat tuple of arrays back to a module; call it while tracing."""
    abstract = nnx.eval_shape(lambda: Transformer(config, dtype=dtype, matmul_backend=matmul_backend, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    structure = jax.tree.structure(state)
    return lambda parameters: nnx.merge(graph, jax.tree.unflatten(structure, parameters))


def random_parameters(config: ModelConfig, dtype: jnp.dtype, seed: int) -> tuple[jax.Array, ...]:
    """Random weights in flat order, for tests and for speed measurements."""
    model = Transformer(config, dtype=dtype, rngs=nnx.Rngs(seed))
    return tuple(jax.tree.leaves(nnx.state(model)))
