"""Parts of a layer by themselves: activations, and linear maps whose W8A8 inputs lie on several devices."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinfer.config import ActivationSpec, LayerSpec, ModelConfig, NormSpec
from jaxinfer.models.layers import Build, Linear, activate
from pallas_kernels import tensors
from pallas_kernels.tensors import QuantizedTensor
from sharding.mesh import make_mesh
from sharding.mesh_config import MeshConfig
from sharding.shards import ALONE, Shards, shards_of

DEVICES, ROWS, IN_SIZE, OUT_SIZE = 4, 16, 1024, 64
MODEL = ModelConfig("t", 10, OUT_SIZE, IN_SIZE, 2, 2, 8, NormSpec(1e-5), True, 64, (LayerSpec(),))
MESH = make_mesh(MeshConfig(tensor=DEVICES))
SUMS = {"whole": (False, 1), "scattered": (True, ROWS), "in a ring": (True, 1)}  # split tokens, rows of a ring


@pytest.mark.parametrize(("name", "exact"), [("gelu", math.erfc), ("gelu_tanh", None)])
def test_the_tail_of_gelu_keeps_its_digits(name: str, exact: Any) -> None:
    """Far below zero, where a norm may make it large again."""
    x = np.linspace(-8, 4, 200, dtype=np.float32)
    wide = x.astype(np.float64)
    if exact is None:
        wanted = wide / (1 + np.exp(-math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3)))
    else:
        wanted = np.array([0.5 * each * exact(-each / math.sqrt(2)) for each in wide])
    np.testing.assert_allclose(jax.jit(lambda x: activate(x, ActivationSpec(name)))(x), wanted, rtol=2e-5)


def linear(shards: Shards, weight: QuantizedTensor, bias: jax.Array | None, dtype: jnp.dtype) -> Linear:
    build = Build(MODEL, dtype, "auto", nnx.Rngs(0), shards=shards)
    made = Linear(weight.shape[1], OUT_SIZE, ("embed", "ffn"), build, bias=bias is not None)
    made.weight = nnx.Param(weight)
    if bias is not None:
        made.bias = nnx.Param(bias)
    return made


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("how", SUMS)
def test_w8a8_of_split_inputs_is_that_of_one_device(how: str, activation: str, dtype: str, bias: bool) -> None:
    """int8 in float32 has its bits, before a bias is added; elsewhere only the sum of the parts is rounded.

    Rows differ a hundredfold in size, so one that took another's scale would be seen.
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((ROWS, IN_SIZE)) * np.logspace(-1, 1, ROWS)[:, None], dtype)
    whole = tensors.quantize(rng.standard_normal((OUT_SIZE, IN_SIZE)) / 32, activation, activation=activation)
    added = jnp.asarray(rng.standard_normal(OUT_SIZE), dtype) if bias else None
    split_tokens, ring_rows = SUMS[how]
    own = replace(shards_of(MESH, ("kv_heads/2",), split_tokens=split_tokens), ring_rows=ring_rows)

    def part(x: jax.Array, weight: QuantizedTensor) -> jax.Array:
        return linear(own, weight, added, jnp.dtype(dtype))(x)

    by_input = MESH.sharding((), MESH.axes_of("ffn"))
    weights = replace(whole, values=by_input, scales=MESH.everywhere)
    out = MESH.sharding(MESH.axes_of("ffn")) if split_tokens else MESH.everywhere
    got = jax.jit(MESH.run(part, (by_input, weights), out))(x, whole)
    wanted = linear(ALONE, whole, added, jnp.dtype(dtype))(x)
    exact = linear(ALONE, whole, added, jnp.dtype("float32"))(x.astype(jnp.float32))
    if (dtype, activation, bias) == ("float32", "int8", False):
        np.testing.assert_array_equal(got, wanted)
        return
    error, least = relative(got, exact), relative(wanted, exact)
    assert error <= (2e-6 if dtype == "float32" else (1.2 if bias else 2.0) * least)


def relative(got: jax.Array, exact: jax.Array) -> float:
    """Root mean square of the error, each row in units of its largest."""
    size = jnp.max(jnp.abs(exact), axis=1, keepdims=True)
    return float(jnp.sqrt(jnp.mean(((got.astype(jnp.float32) - exact) / size) ** 2)))
