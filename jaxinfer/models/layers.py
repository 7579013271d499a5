"""The parts a decoder layer is made of: linear maps, RMS norm, rotary embedding, attention projections, gated MLP.

Hides where weights lie and in which precision things are computed. Every parameter names its logical axes
(`axes`), which sharding/ maps to a mesh; nothing here knows of meshes, pages or batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinfer.config import ModelConfig, RopeSpec
from pallas_kernels.matmul import matmul
from pallas_kernels.reductions import row_sums

# attend(layer_index, q [tokens, q_heads, head_dim], k, v [tokens, kv_heads, head_dim] or None) -> like q
Attend = Callable[[int, jax.Array, jax.Array | None, jax.Array | None], jax.Array]
Rotation = tuple[jax.Array, jax.Array]  # cos, sin: f32[tokens, 1, head_dim // 2]


def parameter(shape: tuple[int, ...], dtype: jnp.dtype, axes: tuple[str, ...], rngs: nnx.Rngs) -> nnx.Param:
    """A weight of `shape`: ones for vectors (norm scales), else normal with the fan-in's scale."""
    if len(shape) == 1:
        return nnx.Param(jnp.ones(shape, dtype), axes=axes)
    scale = 1.0 / math.sqrt(shape[-1])
    return nnx.Param((scale * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype), axes=axes)


class Linear(nnx.Module):
    """`x [rows, in] -> [rows, out]`; the weight is `[out, in]`, as Hugging Face stores it and a CPU reads it."""

    def __init__(
        self, in_size: int, out_size: int, axes: tuple[str, str], *, dtype: jnp.dtype, backend: str, rngs: nnx.Rngs
    ):
        self.weight = parameter((out_size, in_size), dtype, axes, rngs)
        self.backend = backend

    def __call__(self, x: jax.Array) -> jax.Array:
        return matmul(x, self.weight[...], backend=self.backend)


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), in float32, scaled in the input's dtype."""

    def __init__(self, size: int, eps: float, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight = parameter((size,), dtype, ("embed",), rngs)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(row_sums(wide * wide) / x.shape[-1] + self.eps)
        return (wide * scale[..., None]).astype(x.dtype) * self.weight[...]


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> np.ndarray:
    """f32[head_dim // 2] radians per position. Sources: RoFormer (Su et al. 2021); Llama 3.1 for the scaling."""
    frequency = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.scaling is not None:
        s = rope.scaling
        turns = s.original_max_position * frequency / (2 * math.pi)  # rotations within the original context
        smooth = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
        frequency = (1 - smooth) * frequency / s.factor + smooth * frequency
    return frequency.astype(np.float32)


def rotation(rope: RopeSpec, head_dim: int, positions: jax.Array) -> Rotation:
    """cos and sin for `positions: i32[tokens]`."""
    angle = positions.astype(jnp.float32)[:, None, None] * inverse_frequencies(rope, head_dim)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotate `x [tokens, heads, head_dim]`; dimension i pairs with i + head_dim // 2."""
    cos, sin = by
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Projections around `attend`. MHA, GQA and MQA differ only in `kv_heads`."""

    def __init__(self, config: ModelConfig, index: int, *, dtype: jnp.dtype, backend: str, rngs: nnx.Rngs):
        self.index, self.head_dim = index, config.head_dim
        self.owns_kv = config.layers[index].kv_from is None
        q_size, kv_size = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
        kwargs: dict[str, Any] = {"dtype": dtype, "backend": backend, "rngs": rngs}
        self.q = Linear(config.embed_size, q_size, ("heads", "embed"), **kwargs)
        if self.owns_kv:
            self.k = Linear(config.embed_size, kv_size, ("kv_heads", "embed"), **kwargs)
            self.v = Linear(config.embed_size, kv_size, ("kv_heads", "embed"), **kwargs)
        self.o = Linear(q_size, config.embed_size, ("embed", "heads"), **kwargs)

    def __call__(self, x: jax.Array, by: Rotation | None, attend: Attend) -> jax.Array:
        q = self._heads(self.q(x), by)
        k = self._heads(self.k(x), by) if self.owns_kv else None
        v = self._heads(self.v(x), None) if self.owns_kv else None
        return self.o(attend(self.index, q, k, v).reshape(x.shape[0], -1))

    def _heads(self, x: jax.Array, by: Rotation | None) -> jax.Array:
        heads = x.reshape(x.shape[0], -1, self.head_dim)
        return heads if by is None else rotate(heads, by)


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020): `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, backend: str, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "backend": backend, "rngs": rngs}
        self.gate = Linear(config.embed_size, config.ffn_size, ("ffn", "embed"), **kwargs)
        self.up = Linear(config.embed_size, config.ffn_size, ("ffn", "embed"), **kwargs)
        self.down = Linear(config.ffn_size, config.embed_size, ("embed", "ffn"), **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = self.gate(x).astype(jnp.float32)
        return self.down((jax.nn.silu(gate) * self.up(x)).astype(x.dtype))
