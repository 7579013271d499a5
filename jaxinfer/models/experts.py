"""A mixture of experts: which experts a token goes to, and their MLPs as grouped matrix multiplications.

Hides sorting tokens by expert and back, and which experts are on which device. Work grows with tokens times experts per
token; a token's result is added up in the order of its experts' weights, whoever its neighbours are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.config import ExpertsSpec, ModelConfig
from jaxinfer.models.layers import Build, Linear, gated, in_order, matrix, parameter
from pallas_kernels.grouped_matmul import backend_for, grouped_matmul
from pallas_kernels.reductions import row_sums, softmax
from sharding.shards import Shards


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
    """The experts' own weights `[experts, out, in]`.

    Where experts are split over devices, each device has every token and computes its own experts' share of it; one sum
    over the devices ends the layer, as for a dense MLP.
    """

    def __init__(self, config: ModelConfig, spec: ExpertsSpec, build: Build):
        self.activation, self.bias, self.num_experts = config.activation, spec.bias, spec.num_experts
        self.backend, self.invariant, self.shards = backend_for(build.matmul_backend), build.invariant, build.shards
        wide, narrow = (spec.num_experts, spec.ffn_size, config.embed_size), ("experts", "expert_ffn", "embed")
        self.gate = matrix(wide, narrow, build, "gate")
        self.up = matrix(wide, narrow, build, "up")
        self.down = matrix(
            (spec.num_experts, config.embed_size, spec.ffn_size), ("experts", "embed", "expert_ffn"), build, "down"
        )
        if spec.bias:
            self.gate_bias = parameter(wide[:2], narrow[:2], build, fill=0.0)
            self.up_bias = parameter(wide[:2], narrow[:2], build, fill=0.0)
            self.down_bias = parameter((spec.num_experts, config.embed_size), ("experts", "embed"), build, fill=0.0)

    def __call__(self, x: jax.Array, weights: jax.Array, experts: jax.Array) -> jax.Array:
        """`x [tokens, embed]` through the experts of `route` -> f32[tokens, embed], weighted and added up."""
        shards = self.shards
        x, weights, experts = shards.all_tokens(x), shards.all_tokens(weights), shards.all_tokens(experts)
        tokens, per_token = experts.shape
        here = self.num_experts // shards.count("experts")
        flat = experts.reshape(-1)
        if here < self.num_experts:  # a token's experts elsewhere come after all groups, where products are zeros
            flat = flat - shards.index("experts") * here
            flat = jnp.where((flat >= 0) & (flat < here), flat, here)
        order = jnp.argsort(flat, stable=True)
        expert = flat[order]
        sizes = jnp.bincount(flat, length=here).astype(jnp.int32)

        def linear(rows: jax.Array, name: str) -> jax.Array:
            weight = getattr(self, name).get_value()
            product = _traced_product(
                rows,
                weight,
                sizes,
                backend=self.backend,
                invariant=self.invariant,
                shards=shards,
                in_axis="expert_ffn" if name == "down" else None,
            )
            return product + self._bias(name, expert, here) if self.bias else product

        rows = x[order // per_token]
        hidden = gated(linear(rows, "gate"), linear(rows, "up"), self.activation).astype(x.dtype)
        out = jnp.zeros((tokens * per_token, x.shape[1]), jnp.float32).at[order].set(linear(hidden, "down"))
        parts = out.reshape(tokens, per_token, -1) * weights[..., None]
        total = in_order([parts[:, i] for i in range(per_token)])
        return total if not shards.names("heads") else shards.scatter_tokens(total.astype(x.dtype)).astype(jnp.float32)

    def _bias(self, name: str, expert: jax.Array, here: int) -> jax.Array:
        """What each row `expert: i32[rows]` adds, f32[rows, ...]; nothing where its expert is on another device."""
        bias = getattr(self, f"{name}_bias")[...]
        if name == "down":
            bias = self.shards.once(bias, "expert_ffn")
        rows = bias[jnp.minimum(expert, here - 1)]
        return rows if here == self.num_experts else jnp.where((expert < here)[:, None], rows, 0)


# Traced once for all layers that are alike, as `layers.Linear` does.
@partial(jax.jit, inline=True, static_argnames=("shards", "in_axis", "backend", "invariant"))
def _traced_product(
    rows: jax.Array, weight: Any, sizes: jax.Array, *, shards: Shards, in_axis: str | None, **options: Any
) -> jax.Array:
    largest = None if in_axis is None else lambda highest: shards.max(highest, in_axis)
    return grouped_matmul(rows, weight, sizes, out_dtype=jnp.float32, largest=largest, **options)


class Experts(nnx.Module):
    """A router and its experts in the place of an MLP."""

    def __init__(self, config: ModelConfig, spec: ExpertsSpec, build: Build):
        self.spec = spec
        self.router = Linear(config.embed_size, spec.num_experts, ("routes", "embed"), build.plain(), bias=spec.bias)
        self.experts = ExpertMLPs(config, spec, build.at("experts"))

    def __call__(self, x: jax.Array) -> jax.Array:
        weights, experts = route(self.router(x).astype(jnp.float32), self.spec)
        return self.experts(x, weights, experts).astype(x.dtype)
