"""A mixture of experts: which experts a token goes to, and their MLPs as grouped matrix multiplications.

Hides sorting tokens by expert and back. Work grows with tokens times experts per token; a token's result is added up in
the order of its experts' weights, whoever its neighbours are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.config import ExpertsSpec, ModelConfig
from jaxinfer.models.layers import Build, Linear, gated, in_order, matrix, parameter
from pallas_kernels.grouped_matmul import backend_for, grouped_matmul
from pallas_kernels.reductions import row_sums, softmax


def route(scores: jax.Array, spec: ExpertsSpec) -> tuple[jax.Array, jax.Array]:
    """Router scores f32[tokens, experts] -> weights f32[tokens, per_token] and experts i32[tokens, per_token]."""
    if spec.routing == "top_k_then_softmax":
        best, index = jax.lax.top_k(scores, spec.per_token)
        return softmax(best), index
    weights, index = jax.lax.top_k(softmax(scores), spec.per_token)
    if spec.renormalize:
        weights = weights / row_sums(weights)[..., None]
    return weights, index


class ExpertMLPs(nnx.Module):
    """The experts' own weights `[experts, out, in]`."""

    def __init__(self, config: ModelConfig, spec: ExpertsSpec, build: Build):
        self.activation, self.bias, self.num_experts = config.activation, spec.bias, spec.num_experts
        self.backend, self.invariant = backend_for(build.matmul_backend), build.invariant
        wide, narrow = (spec.num_experts, spec.ffn_size, config.embed_size), ("experts", "ffn", "embed")
        self.gate = matrix(wide, narrow, build, "gate")
        self.up = matrix(wide, narrow, build, "up")
        self.down = matrix(
            (spec.num_experts, config.embed_size, spec.ffn_size), ("experts", "embed", "ffn"), build, "down"
        )
        if spec.bias:
            self.gate_bias = parameter(wide[:2], narrow[:2], build, fill=0.0)
            self.up_bias = parameter(wide[:2], narrow[:2], build, fill=0.0)
            self.down_bias = parameter((spec.num_experts, config.embed_size), ("experts", "embed"), build, fill=0.0)

    def __call__(self, x: jax.Array, weights: jax.Array, experts: jax.Array) -> jax.Array:
        """`x [tokens, embed]` through the experts of `route` -> f32[tokens, embed], weighted and added up."""
        tokens, per_token = experts.shape
        flat = experts.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        expert = flat[order]
        sizes = jnp.bincount(flat, length=self.num_experts).astype(jnp.int32)

        def linear(rows: jax.Array, name: str) -> jax.Array:
            weight = getattr(self, name).get_value()
            product = grouped_matmul(
                rows, weight, sizes, backend=self.backend, invariant=self.invariant, out_dtype=jnp.float32
            )
            return product + getattr(self, f"{name}_bias")[...][expert] if self.bias else product

        rows = x[order // per_token]
        hidden = gated(linear(rows, "gate"), linear(rows, "up"), self.activation).astype(x.dtype)
        out = jnp.zeros((tokens * per_token, x.shape[1]), jnp.float32).at[order].set(linear(hidden, "down"))
        parts = out.reshape(tokens, per_token, -1) * weights[..., None]
        return in_order([parts[:, i] for i in range(per_token)])


class Experts(nnx.Module):
    """A router and its experts in the place of an MLP."""

    def __init__(self, config: ModelConfig, spec: ExpertsSpec, build: Build):
        self.spec = spec
        self.router = Linear(config.embed_size, spec.num_experts, ("experts", "embed"), build.plain(), bias=spec.bias)
        self.experts = ExpertMLPs(config, spec, build.at("experts"))

    def __call__(self, x: jax.Array) -> jax.Array:
        weights, experts = route(self.router(x).astype(jnp.float32), self.spec)
        return self.experts(x, weights, experts).astype(x.dtype)
