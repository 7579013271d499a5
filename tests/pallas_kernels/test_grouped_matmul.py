"""Grouped matmul: portable backends against each group's exact product, the cutting of groups, and the work done."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import tensors
from pallas_kernels.dispatch import BackendError
from pallas_kernels.grouped_matmul import cases, grouped_matmul, xla
from pallas_kernels.grouped_matmul.cases import CASES, FORMATS, Case
from pallas_kernels.grouped_matmul.schedule import schedule
from pallas_kernels.matmul.cases import FORMATS as ALL_FORMATS


@pytest.mark.parametrize("name", CASES)
def test_xla_agrees_with_the_exact_product(name: str) -> None:
    cases.check("xla", CASES[name])


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("-uneven") or name.startswith("dense")])
def test_the_oracle_agrees_with_the_exact_product(name: str) -> None:
    cases.check("reference", CASES[name])


@given(st.lists(st.integers(0, 8), min_size=6, max_size=6), st.sampled_from([1, 4, 16]))
def test_pieces_cover_every_row_of_a_group_once(sizes: list[int], tile_rows: int) -> None:
    rows = 48  # at least as many as are used
    pieces = jax.jit(schedule, static_argnums=(1, 2))(jnp.asarray(sizes, jnp.int32), rows, tile_rows)
    assert len(pieces.tile) == rows // tile_rows + len(sizes) + 1
    owner = np.full(rows, -1)
    for tile, group, start, stop in np.stack(pieces, axis=1):
        assert 0 <= group < len(sizes) and 0 <= tile < rows // tile_rows
        if start < stop:
            assert tile * tile_rows <= start and stop <= (tile + 1) * tile_rows
            assert np.all(owner[start:stop] == -1)
            owner[start:stop] = group
    np.testing.assert_array_equal(owner[: sum(sizes)], np.repeat(np.arange(len(sizes)), sizes))
    assert np.all(owner[sum(sizes) :] == -1)
    assert set(np.asarray(pieces.tile)) == set(range(rows // tile_rows)) and np.all(np.diff(pieces.tile) >= 0)


def test_pieces_without_rows_need_no_weight_of_their_own() -> None:
    """Consecutive pieces name a group of their neighbours', so a kernel that keeps its weight reads none for them."""
    pieces = schedule(jnp.array([0, 3, 0, 0, 2, 0], jnp.int32), 16, 8)
    np.testing.assert_array_equal(np.unique(pieces.group), [1, 4])


def test_empty_groups_cost_nothing() -> None:
    """Weights of groups without rows are not read: what they hold does not matter, nor does their number."""
    x, weight, _ = cases.build(Case("dense", (4, 4, 4)))
    poisoned = weight.at[1].set(jnp.nan)
    product = grouped_matmul(x[:8], poisoned, jnp.array([5, 0, 3], jnp.int32), backend="xla")
    assert not np.any(np.isnan(np.asarray(product, np.float32)))


@pytest.mark.parametrize("name", ["dense", "int8"])
def test_work_grows_with_tokens_not_with_groups(name: str) -> None:
    x, weight, sizes = cases.build(Case(name, (8,) * 8))
    multiply = jax.jit(lambda *operands: grouped_matmul(*operands, backend="xla"))
    compiled = multiply.lower(x, weight, sizes).compile()
    every_product = x.shape[0] * weight.shape[0] * weight.shape[1] * 4  # of all rows with all groups
    assert compiled.memory_analysis().temp_size_in_bytes < every_product


def test_a_float32_row_has_the_same_bits_wherever_its_group_starts() -> None:
    x, weight, _ = cases.build(Case("dense", (6, 6), dtype="float32"))
    multiply = lambda rows, sizes: np.asarray(grouped_matmul(rows, weight, jnp.array(sizes, jnp.int32), backend="xla"))
    whole = multiply(x, [12, 0])
    np.testing.assert_array_equal(multiply(x[3:], [9, 0]), whole[3:])


@pytest.mark.parametrize("name", [name for name in ALL_FORMATS if name not in FORMATS])
def test_formats_that_are_not_served_are_named(name: str) -> None:
    weight = ALL_FORMATS[name](jnp.ones((2, 16, 256)))
    served = weight.zeros is None and weight.outlier_columns is None and weight.sparse_index is None
    if served:
        assert grouped_matmul(jnp.ones((3, 256)), weight, jnp.array([1, 2], jnp.int32)).shape == (3, 16)
    else:
        with pytest.raises(ValueError, match=f"not {weight.format}: quantize experts symmetrically"):
            grouped_matmul(jnp.ones((3, 256)), weight, jnp.array([1, 2], jnp.int32))


def test_empty_operands_give_zeros() -> None:
    assert grouped_matmul(jnp.ones((0, 8)), jnp.ones((2, 4, 8)), jnp.zeros(2, jnp.int32)).shape == (0, 4)


@pytest.mark.parametrize(
    ("x", "weight", "sizes", "message"),
    [
        (jnp.ones((3, 8)), jnp.ones((2, 4, 9)), jnp.ones(2, jnp.int32), r"\(3, 8\), \(2, 4, 9\) and \(2,\)"),
        (jnp.ones((3, 8)), jnp.ones((4, 8)), jnp.ones(4, jnp.int32), r"weight \[groups, out, in\]"),
        (jnp.ones((3, 8)), jnp.ones((2, 4, 8)), jnp.ones(3, jnp.int32), r"and \(3,\)"),
        (jnp.ones((3, 8)), jnp.ones((2, 4, 8)), jnp.ones(2), "group_sizes are int32, got float32"),
        (jnp.ones((3, 8)), jnp.ones((2, 4, 8), jnp.bfloat16), jnp.ones(2, jnp.int32), "must share one"),
        (jnp.ones((3, 8), jnp.int8), jnp.ones((2, 4, 8), jnp.int8), jnp.ones(2, jnp.int32), "x int8 is not floating"),
    ],
)
def test_what_does_not_fit_says_so(x: jax.Array, weight: jax.Array, sizes: jax.Array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grouped_matmul(x, weight, sizes)


def test_a_forced_backend_refuses_by_name() -> None:
    x, weight, sizes = cases.build(Case())
    with pytest.raises(BackendError, match=r"mosaic_tpu.*it is for tpu, the device is cpu"):
        grouped_matmul(x, weight, sizes, backend="mosaic_tpu")


def test_tiles_of_rows_follow_the_groups() -> None:
    assert xla.tile_rows(tokens=16, num_groups=64) == 4
    assert xla.tile_rows(tokens=512, num_groups=8) == 64
    assert xla.tile_rows(tokens=100_000, num_groups=8) == xla.MOST_ROWS


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_rows_of_no_group_are_zero_whatever_they_hold(backend: str) -> None:
    x = jnp.ones((3, 64)).at[2].set(jnp.nan)
    weight = tensors.quantize(jnp.ones((1, 8, 64)), "int8", activation="int8")
    product = grouped_matmul(x, weight, jnp.array([2], jnp.int32), backend=backend)
    assert np.isfinite(product).all()
    assert (np.asarray(product[2]) == 0).all()
