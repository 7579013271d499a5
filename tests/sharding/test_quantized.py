"""How a quantized weight's arrays follow its sharding."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from sharding.quantized import leaf_shardings

MESH = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("pipe", "a", "b"))


@pytest.mark.parametrize(
    ("spec", "ndim", "num_groups", "per_group"),
    [
        (("a", "b"), 2, 4, ("b", "a")),
        (("a", "b"), 2, 1, (None, "a")),
        ((None, ("a", "b")), 2, 4, (("a", "b"), None)),
        (("a",), 2, 4, (None, "a")),
        (("pipe", None, ("a", "b")), 3, 1, ("pipe", None, None)),
        (("pipe", "a", "b", None), 4, 2, ("pipe", "a", None, "b")),
        ((), 2, 4, ()),
    ],
)
def test_scales_go_with_their_outputs_and_groups(spec: tuple, ndim: int, num_groups: int, per_group: tuple) -> None:
    weight = NamedSharding(MESH, PartitionSpec(*spec))
    values, scales, zeros = leaf_shardings(weight, ndim, num_groups)
    assert values == weight and scales == zeros
    assert scales.is_equivalent_to(NamedSharding(MESH, PartitionSpec(*per_group)), ndim)


def test_one_device() -> None:
    alone = SingleDeviceSharding(jax.devices()[3])
    assert leaf_shardings(alone, 2, 4) == (alone, alone, alone)
