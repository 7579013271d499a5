"""The parts a decoder layer is made of: linear maps, norms, rotary embedding, attention projections, MLP.

Hides where weights lie and in which precision things are computed. Every parameter names its logical axes
(`axes`), which sharding/ maps to a mesh; nothing here knows of meshes, pages or batches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.config import ActivationSpec, LayerSpec, ModelConfig, NormSpec
from jaxinfer.models import weight_format
from jaxinfer.models.quantized_checkpoint import abstract_weight
from jaxinfer.rope import DynamicScaling, LongScaling, RopeSpec
from pallas_kernels.matmul import matmul, matmul_rows
from pallas_kernels.reductions import row_sums
from pallas_kernels.tensors import QuantizedTensor, quantize_rows
from sharding.shards import ALONE, Shards

# attend(layer_index, q [tokens, q_heads, head_dim], k, v [tokens, kv_heads, head_dim] or None, sinks) -> like q
Attend = Callable[[int, jax.Array, jax.Array | None, jax.Array | None, jax.Array | None], jax.Array]
Rotation = tuple[jax.Array, jax.Array]  # cos, sin: f32[tokens, 1, rotary_dim // 2]
Rotations = Mapping[tuple[RopeSpec, int], Rotation]  # by rope and head_dim
Parts = tuple[str, ...]  # names of the parameters whose outputs follow one another in a fused one


@dataclass(frozen=True)
class Build:
    """How modules are made: dtype of parameters, which kernels multiply, and where random values come from."""

    config: ModelConfig
    dtype: jnp.dtype
    matmul_backend: str
    rngs: nnx.Rngs
    invariant: bool = False  # a row's bits must not depend on the other rows, in bfloat16 either
    path: str = ""  # of the module being made, as parameters are named: "layers.3.attention."
    shards: Shards = ALONE  # the devices that share a layer
    stages: int = 1  # of a pipeline: the module has one stage's layers
    fused: bool = False  # linear maps of the same inputs are one

    def plain(self) -> Build:
        """For weights that checkpoints never quantize."""
        return replace(self, config=replace(self.config, quantization=None))

    def at(self, name: str | int) -> Build:
        """For a part of this module."""
        return replace(self, path=f"{self.path}{name}.")

    @property
    def num_layers(self) -> int:
        """Layers of the module being made."""
        return len(self.config.layers) // self.stages


def parameter(
    shape: tuple[int, ...], axes: tuple[str, ...], build: Build, *, fill: float | None = None, parts: Parts = ()
) -> nnx.Param:
    """A weight that is never quantized: all `fill` (norm scales, biases), else normal with the fan-in's scale."""
    if fill is not None:
        return nnx.Param(jnp.full(shape, fill, build.dtype), axes=axes, parts=parts)
    values = jax.random.normal(build.rngs.params(), shape, jnp.float32) / math.sqrt(shape[-1])
    return nnx.Param(values.astype(build.dtype), axes=axes, parts=parts)


def matrix(
    shape: tuple[int, ...], axes: tuple[str, ...], build: Build, name: str = "weight", *, parts: Parts = ()
) -> nnx.Param:
    """A weight `[..., out, in]` as the checkpoint stores it: plain and then random, or quantized and then zero."""
    stored = weight_format(build.config, parts[0] if parts else build.path + name)
    if stored is None:
        return parameter(shape, axes, build, parts=parts)
    held = abstract_weight(stored, shape, in_shards=build.shards.count(axes[-1]))  # how nibbles lie in a device's part
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), held)
    return nnx.Param(zeros, axes=axes, format=stored, parts=parts)


class Linear(nnx.Module):
    """`x [rows, in] -> [rows, out]`; the weight is `[out, in]`, as Hugging Face stores it and a CPU reads it.

    Where outputs are split over devices, each computes its own of all tokens; where inputs are, the sum over the
    devices leaves the layer's part (Megatron-LM, Shoeybi et al. 2019, arXiv 1909.08053, section 3).
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        axes: tuple[str, str],
        build: Build,
        *,
        bias: bool = False,
        maps: Sequence[Build] = (),
    ):
        """`maps`: builds of the linear maps whose outputs, in this order, are its own; none: it is one by itself."""
        self.weight = matrix((out_size, in_size), axes, build, parts=tuple(f"{each.path}weight" for each in maps))
        if bias:
            parts = tuple(f"{each.path}bias" for each in maps)
            self.bias = parameter((out_size,), axes[:1], build, fill=0.0, parts=parts)
        self.has_bias, self.in_axis = bias, axes[1]
        self.backend, self.invariant, self.shards = build.matmul_backend, build.invariant, build.shards

    def __call__(self, x: jax.Array) -> jax.Array:
        weight, dtype = self.weight.get_value(), jnp.dtype(jnp.float32) if self.has_bias else x.dtype
        multiply = partial(_product, weight=weight, backend=self.backend, out_dtype=dtype, invariant=self.invariant)
        if not self.shards.names(self.in_axis):
            product = multiply(x)
        elif isinstance(weight, QuantizedTensor) and weight.activation is not None:
            product = self._quantized_sum(x, weight, dtype)
        else:
            product = self.shards.leaving(x, multiply, self.in_axis)
        if not self.has_bias:
            return product
        return (product + self.bias[...]).astype(x.dtype)

    def _quantized_sum(self, x: jax.Array, weight: QuantizedTensor, dtype: jnp.dtype) -> jax.Array:
        """W8A8 of split inputs: a row's scale is that of all its inputs, wherever its part is multiplied.

        Sums in float32 are scaled at the end; in bfloat16, where they are not exact, that would be one more rounding.
        """
        assert weight.activation is not None and weight.scales is not None
        highest = partial(self.shards.max, axis=self.in_axis)
        rows, scales = quantize_rows(x, weight.activation, largest=highest)
        multiply = partial(_rows_product, weight=weight, dtype=x.dtype, out_dtype=dtype, backend=self.backend)
        if dtype != jnp.float32:
            return self.shards.leaving((rows, scales), lambda part: multiply(*part), self.in_axis)
        total = self.shards.leaving(rows, lambda part: multiply(part, None), self.in_axis)
        return total * weight.scales.astype(jnp.float32) * self.shards.own_tokens(scales)[:, None]


# Traced once for all layers that are alike, as attention is (`forward`): a quantized product is a kernel.
_product = jax.jit(matmul, inline=True, static_argnames=("backend", "invariant", "out_dtype"))
_rows_product = jax.jit(matmul_rows, inline=True, static_argnames=("backend", "dtype", "out_dtype"))


class LinearMaps(nnx.Module):
    """Linear maps of the same inputs: each an attribute by its name, or `fused` of all their outputs.

    Fused, a device's weight is its part of each of them, one after the other, and a step has one product for all: fewer
    kernels to launch, fewer arrays to compile for. Maps that are quantized in different ways stay apart.
    """

    def _add_maps(self, in_size: int, outputs: Mapping[str, tuple[int, str]], build: Build, *, bias: bool) -> None:
        """`outputs`: by name, how many and their logical axis; no axis is split further than the first."""
        self.map_names = tuple(outputs)
        self.map_sizes = tuple(size // build.shards.count(axis) for size, axis in outputs.values())
        builds = {name: build.at(name) for name in outputs}
        formats = {weight_format(build.config, each.path + "weight") for each in builds.values()}
        self.is_fused = build.fused and len(outputs) > 1 and len(formats) == 1
        if self.is_fused:
            axes = (next(iter(outputs.values()))[1], "embed")
            total, maps = sum(size for size, _ in outputs.values()), tuple(builds.values())
            self.fused = Linear(in_size, total, axes, build.at("fused"), bias=bias, maps=maps)
            return
        for name, (size, axis) in outputs.items():
            setattr(self, name, Linear(in_size, size, (axis, "embed"), builds[name], bias=bias))

    def _mapped(self, x: jax.Array) -> dict[str, jax.Array]:
        """Of rows `x [rows, in]` by name this device's `[rows, out]`."""
        if not self.is_fused:
            return {name: getattr(self, name)(x) for name in self.map_names}
        ends = list(itertools.accumulate(self.map_sizes))
        return dict(zip(self.map_names, jnp.split(self.fused(x), ends[:-1], axis=1), strict=True))


class Norm(nnx.Module):
    """What a NormSpec says, over the last axis."""

    def __init__(self, size: int, spec: NormSpec, build: Build, *, axis: str = "embed"):
        self.weight = parameter((size,), (axis,), build, fill=1.0 - spec.offset)
        if spec.kind == "layer":
            self.bias = parameter((size,), (axis,), build, fill=0.0)
        self.spec, self.size, self.axis, self.shards = spec, size, axis, build.shards

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        if self.spec.kind == "layer":
            wide = wide - self._mean(wide)
        normed = wide * jax.lax.rsqrt(self._mean(wide * wide) + self.spec.eps)
        if self.spec.kind == "layer":
            return (normed * self.weight[...] + self.bias[...]).astype(x.dtype)
        if self.spec.scale_in_float32:
            return (normed * (self.spec.offset + self.weight[...].astype(jnp.float32))).astype(x.dtype)
        return normed.astype(x.dtype) * (self.spec.offset + self.weight[...])

    def _mean(self, x: jax.Array) -> jax.Array:
        """Over the last axis, which may be split over devices: `f32[..., 1]`."""
        return (self.shards.sum(row_sums(x), self.axis) / self.size)[..., None]


def kv_heads_axis(kv_heads: int) -> str:
    """The logical axis of a layer's K/V heads: how far it is split depends on their number."""
    return f"kv_heads/{kv_heads}"


def in_order(parts: Sequence[jax.Array]) -> jax.Array:
    """Their sum, added one after the other: the same bits in every batch, which a reduction does not promise."""
    return sum(parts[1:], start=parts[0])


def root_mean_square_norm(x: jax.Array, eps: float) -> jax.Array:
    """`x f32[..., n]` divided by the root of its mean square."""
    return x * jax.lax.rsqrt(row_sums(x * x) / x.shape[-1] + eps)[..., None]


def rotations(config: ModelConfig, positions: jax.Array, lengths: jax.Array | None) -> Rotations:
    """What each distinct (rope, head_dim) of the layers turns the tokens by; see `rotation`."""
    wanted = {
        (layer.rope, config.kv_shape(index).head_dim)
        for index, layer in enumerate(config.layers)
        if layer.rope is not None
    }
    return {(rope, head_dim): rotation(rope, head_dim, positions, lengths) for rope, head_dim in wanted}


def rotation(rope: RopeSpec, head_dim: int, positions: jax.Array, lengths: jax.Array | None = None) -> Rotation:
    """cos and sin for tokens at `positions: i32[tokens]`.

    `lengths: i32[tokens]`: the sequence length that picks a token's frequencies where the rope looks at it
    (jaxinfer.rope.LengthRule); None: all tokens are one sequence.
    """
    sets = rope.frequencies(head_dim)
    frequency: Any = sets[0]
    if lengths is None:
        lengths = jnp.full(positions.shape, positions.shape[0], jnp.int32)
    if isinstance(rope.scaling, LongScaling):
        frequency = jnp.where((lengths > rope.scaling.original_max_position)[:, None], sets[1], sets[0])
    elif isinstance(rope.scaling, DynamicScaling):
        frequency = _dynamic_frequencies(rope, rope.scaling, 2 * sets.shape[1], lengths)
    angle = (positions.astype(jnp.float32)[:, None] * frequency)[:, None, :]
    return jnp.cos(angle) * rope.attention_factor, jnp.sin(angle) * rope.attention_factor


def _dynamic_frequencies(rope: RopeSpec, scaling: DynamicScaling, dim: int, lengths: jax.Array) -> jax.Array:
    """f32[tokens, dim // 2]: the base grows so that the longest wavelength spans `factor` times the length."""
    length = jnp.maximum(lengths, scaling.original_max_position).astype(jnp.float32)
    stretch = scaling.factor * length / scaling.original_max_position - (scaling.factor - 1)
    log_base = math.log(rope.theta) + (dim / (dim - 2)) * jnp.log(stretch)
    return jnp.exp(-log_base[:, None] * (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim))


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotate the first dimensions of `x [tokens, heads, head_dim]`; of these, i pairs with i + half of them."""
    cos, sin = by
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    first, second = wide[..., :half], wide[..., half : 2 * half]
    turned = [first * cos - second * sin, second * cos + first * sin, wide[..., 2 * half :]]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Attention(LinearMaps):
    """Projections around `attend`. MHA, GQA and MQA differ only in `kv_heads`; a layer may read another one's K/V."""

    def __init__(self, config: ModelConfig, index: int, build: Build):
        self.config, self.index, self.shards = config, index, build.shards
        self.layer: LayerSpec = config.layers[index]
        kv = config.kv_shape(index)
        self.head_dim, kv_axis = kv.head_dim, kv_heads_axis(kv.kv_heads)
        q_axis, k_axis = ("head_dim", "head_dim") if config.qk_norm == "head" else ("heads", kv_axis)
        q_size, kv_size = config.q_heads * kv.head_dim, kv.kv_heads * kv.head_dim
        outputs = {"q": (q_size, "heads")}
        if self.layer.kv_from is None:
            outputs |= dict.fromkeys(("k",) if self.layer.k_eq_v else ("k", "v"), (kv_size, kv_axis))
        self._add_maps(config.embed_size, outputs, build, bias=config.qkv_bias)
        if config.qk_norm is not None:
            self.q_norm = Norm(self._norm_size(q_size), config.norm, build, axis=q_axis)
            if self.layer.kv_from is None:
                self.k_norm = Norm(self._norm_size(kv_size), config.norm, build, axis=k_axis)
        self.o = Linear(q_size, config.embed_size, ("embed", "heads"), build.at("o"), bias=config.o_bias)
        if config.sinks:
            self.sinks = parameter((config.q_heads,), ("heads",), build, fill=0.0)

    def __call__(self, x: jax.Array, by: Rotations, attend: Attend) -> jax.Array:
        turn = None if self.layer.rope is None else by[self.layer.rope, self.head_dim]
        projected = self.shards.entering(x, self._mapped)
        q = self._positioned(projected["q"], "q_norm", turn)
        k = v = None
        if self.layer.kv_from is None:
            keys = projected["k"]
            k, v = self._positioned(keys, "k_norm", turn), self._values(projected.get("v", keys))
        sinks = self.sinks[...].astype(jnp.float32) if self.config.sinks else None
        return self.o(attend(self.index, q, k, v, sinks).reshape(q.shape[0], -1))

    def _norm_size(self, projection_size: int) -> int:
        return self.head_dim if self.config.qk_norm == "head" else projection_size

    def _positioned(self, x: jax.Array, norm: str, turn: Rotation | None) -> jax.Array:
        """Queries or keys `[tokens, heads, head_dim]`: normed where the model does, and rotated."""
        if self.config.qk_norm == "projection":
            x = getattr(self, norm)(x)
        heads = x.reshape(x.shape[0], -1, self.head_dim)
        if self.config.qk_norm == "head":
            heads = getattr(self, norm)(heads)
        return heads if turn is None else rotate(heads, turn)

    def _values(self, x: jax.Array) -> jax.Array:
        heads = x.reshape(x.shape[0], -1, self.head_dim)
        if not self.config.v_norm:
            return heads
        return root_mean_square_norm(heads.astype(jnp.float32), self.config.norm.eps).astype(x.dtype)


class MLP(LinearMaps):
    """`down(act(gate(x)) * up(x))` (GLU variants, Shazeer 2020), or without a gate `down(act(up(x)))`."""

    def __init__(self, config: ModelConfig, index: int, build: Build):
        ffn_size = config.layers[index].ffn_size or config.ffn_size
        outputs = dict.fromkeys(("gate", "up") if config.gated_mlp else ("up",), (ffn_size, "ffn"))
        self._add_maps(config.embed_size, outputs, build, bias=config.mlp_bias)
        self.down = Linear(ffn_size, config.embed_size, ("embed", "ffn"), build.at("down"), bias=config.mlp_bias)
        self.config, self.sparsity = config, config.layers[index].activation_sparsity
        self.size, self.shards = ffn_size, build.shards

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.sparsity > 0.0:  # what is cut off depends on whole rows, of which each device has a part
            return self.down(self._hidden(self.shards.all_tokens(x)))
        return self.down(self.shards.entering(x, self._hidden))

    def _hidden(self, x: jax.Array) -> jax.Array:
        """Of rows `x [rows, embed]` what `down` takes."""
        mapped = self._mapped(x)
        up = mapped["up"].astype(jnp.float32)
        if not self.config.gated_mlp:
            return activate(up, self.config.activation).astype(x.dtype)
        gate = mapped["gate"].astype(jnp.float32)
        if self.sparsity > 0.0:
            gate = self._cut_off(gate)
        return gated(gate, up, self.config.activation).astype(x.dtype)

    def _cut_off(self, gate: jax.Array) -> jax.Array:
        """`relu(gate - cutoff)`, the cutoff being the normal distribution's quantile `sparsity` (Gemma 3n)."""
        centred = gate - self._mean(gate)
        deviation = jnp.sqrt(self._mean(centred * centred))
        return jax.nn.relu(centred - deviation * jax.scipy.stats.norm.ppf(jnp.float32(self.sparsity)))

    def _mean(self, x: jax.Array) -> jax.Array:
        return (self.shards.sum(row_sums(x), "ffn") / self.size)[..., None]


def activate(x: jax.Array, spec: ActivationSpec) -> jax.Array:
    """The nonlinearity of an MLP without a gate."""
    match spec.name:
        case "silu":
            return jax.nn.silu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            # x / 2 * (1 + tanh(y)) as x * sigmoid(2 y): far below zero, 1 + tanh has no digits left.
            return x * jax.nn.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
    raise ValueError(f"{spec.name} needs a gate")


def gated(gate: jax.Array, up: jax.Array, spec: ActivationSpec) -> jax.Array:
    """The product of an MLP's gate and values, f32."""
    if spec.name == "clamped_swiglu":
        gate = jnp.minimum(gate, spec.limit)
        return (jnp.clip(up, -spec.limit, spec.limit) + 1) * gate * jax.nn.sigmoid(spec.alpha * gate)
    return activate(gate, spec) * up
