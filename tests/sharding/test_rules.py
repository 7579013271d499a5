"""Parameters land on a mesh as their logical axes say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxinfer.config import LayerSpec, ModelConfig, NormSpec
from jaxinfer.models.transformer import ParameterSpec, abstract_parameters
from jaxinfer.rope import RopeSpec
from sharding.rules import partition

MODEL = ModelConfig("test", 64, 32, 48, 4, 2, 8, NormSpec(1e-5), False, 128, (LayerSpec(rope=RopeSpec(1e4)),) * 2)


def mesh(size: int) -> Mesh:
    if len(jax.devices()) < size:
        pytest.skip(f"needs {size} devices")
    return Mesh(np.array(jax.devices()[:size]), ("tensor",))


def test_every_matrix_is_split_and_every_norm_replicated() -> None:
    for name, spec in abstract_parameters(MODEL, jnp.float32).items():
        sharding = partition(spec, mesh(2))
        shard = sharding.shard_shape(spec.shape)
        assert np.prod(shard) * (1 if "norm" in name else 2) == np.prod(spec.shape), name


def test_embedding_splits_along_the_vocabulary() -> None:
    spec = ParameterSpec((64, 32), jnp.float32, ("vocab", "embed"))
    assert partition(spec, mesh(2)).spec == PartitionSpec("tensor", None)


def test_a_size_that_does_not_divide_is_named() -> None:
    spec = ParameterSpec((6, 32), jnp.float32, ("kv_heads", "embed"))
    words = r"'kv_heads' of size 6 does not divide over tensor=4; sizes that do: \[1, 2, 3\]"
    with pytest.raises(ValueError, match=words):
        partition(spec, mesh(4))
