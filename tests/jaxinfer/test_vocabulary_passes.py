"""Passes over the vocabulary, in the layout of CPUs and in that of the others, against NumPy and each other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.vocabulary_passes import LANES, cumulative_sums, group_width, grouped_sum, largest, several_largest
from pallas_kernels import devices

WIDTHS = (1, 20, 127, 128, 300, 4096, 9000)


@pytest.fixture(params=[True, False], ids=["written out", "in loops"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(devices, "on_cpu", lambda: request.param)
    jax.clear_caches()  # else the other layout's programs serve
    return request.param


def rows_of(columns: int) -> np.ndarray:
    """Five rows: random; many ties; all alike; -inf but for one; all -inf."""
    rng = np.random.default_rng(columns)
    x = np.full((5, columns), -np.inf, np.float32)
    x[0] = rng.standard_normal(columns)
    x[1] = rng.integers(0, 3, columns)
    x[2] = 1.5
    x[3, columns // 2] = -2.0
    return x


@pytest.mark.parametrize("columns", [1, 300, 4096, 4097, 128_256])
def test_a_group_width_is_an_odd_number_of_registers_and_makes_about_32_slices(columns: int) -> None:
    width = group_width(columns)
    assert width % LANES == 0 and width // LANES % 2 == 1
    assert -(-columns // width) <= 32 and (columns <= 32 * LANES or columns / width > 10)


@pytest.mark.parametrize("columns", WIDTHS)
def test_grouped_sum(layout: bool, columns: int) -> None:
    x = np.random.default_rng(0).integers(0, 100, (3, columns)).astype(np.float32)
    width = group_width(columns)
    expected = np.zeros((3, width), np.float32)
    for column in range(columns):
        expected[:, column % width] += np.where(x[:, column] > 50, x[:, column], 0)
    found = jax.jit(lambda x: grouped_sum(x, lambda part: jnp.where(part > 50, part, 0), width))(x)
    np.testing.assert_array_equal(found, expected)


def test_a_groups_parts_are_added_in_their_order_in_either_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((4, 9000)).astype(np.float32)
    sums = []
    for on_cpu in (True, False):
        monkeypatch.setattr(devices, "on_cpu", lambda on_cpu=on_cpu: on_cpu)
        sums.append(jax.jit(lambda x: grouped_sum(x, lambda part: part, group_width(9000)))(x))
    np.testing.assert_array_equal(*sums)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("columns", WIDTHS)
def test_largest(layout: bool, columns: int, dtype: str) -> None:
    x = np.asarray(jnp.asarray(rows_of(columns), dtype).astype(jnp.float32))
    best, index, has_nan = jax.jit(largest)(jnp.asarray(x, dtype))
    np.testing.assert_array_equal(best, x.max(axis=1))
    np.testing.assert_array_equal(index, x.argmax(axis=1))
    assert not has_nan.any()


@pytest.mark.parametrize("at", [0, 150, 299])
def test_largest_sees_nan(layout: bool, at: int) -> None:
    x = rows_of(300)
    x[1, at] = np.nan
    assert jax.jit(largest)(x)[2].tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("columns", WIDTHS)
def test_several_largest(layout: bool, columns: int) -> None:
    x, count = rows_of(columns), min(20, columns)
    values, indices = jax.jit(several_largest, static_argnums=1)(x, count)
    expected = np.argsort(-x, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(x, expected, axis=1))


def test_indices_stay_inside_rows_of_nan(layout: bool) -> None:
    x = np.full((2, 30), np.nan, np.float32)
    x[1, 7] = 1.0
    _, indices = jax.jit(several_largest, static_argnums=1)(x, 5)
    assert (np.asarray(indices) >= 0).all() and (np.asarray(indices) < 30).all()


@pytest.mark.parametrize("columns", WIDTHS)
def test_cumulative_sums(layout: bool, columns: int) -> None:
    whole = np.random.default_rng(0).integers(0, 100, (3, columns)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(cumulative_sums)(whole), np.cumsum(whole, axis=1))
    broken = np.random.default_rng(0).random((3, columns), np.float32)
    np.testing.assert_allclose(jax.jit(cumulative_sums)(broken), np.cumsum(broken, axis=1, dtype=np.float64), rtol=1e-5)
