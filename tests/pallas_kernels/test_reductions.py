"""Sums and softmax along rows are right, and their bits are the same in any number of rows."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import devices
from pallas_kernels.reductions import in_lanes, row_sums, softmax


@pytest.mark.parametrize("width", [2, 4, 6, 16, 64, 128, 256, 2048])
def test_bits_do_not_depend_on_the_number_of_rows(width: int) -> None:
    x = np.random.default_rng(width).standard_normal((300, width)).astype(np.float32)
    whole = np.asarray(jax.jit(row_sums)(x))
    np.testing.assert_allclose(whole, x.astype(np.float64).sum(-1), atol=1e-3)
    for rows in (1, 2, 3, 5, 17, 64, 260):
        np.testing.assert_array_equal(jax.jit(row_sums)(x[:rows]), whole[:rows])
        np.testing.assert_array_equal(jax.jit(row_sums)(x[:rows].reshape(rows, 1, width))[:, 0], whole[:rows])


@pytest.mark.parametrize("width", [4, 6, 8, 60, 128])
def test_a_softmax_has_the_same_bits_in_any_number_of_rows(width: int) -> None:
    x = 3 * np.random.default_rng(width).standard_normal((600, width)).astype(np.float32)
    whole = np.asarray(jax.jit(softmax)(x))
    np.testing.assert_allclose(whole, jax.nn.softmax(x, axis=-1), rtol=2e-6)
    for rows in (1, 2, 3, 5, 16, 48, 130, 512):
        np.testing.assert_array_equal(jax.jit(softmax)(x[:rows]), whole[:rows], err_msg=f"{rows} rows")


@pytest.mark.parametrize("function", [jnp.exp, jnp.log], ids=["exp", "log"])
def test_a_few_numbers_are_treated_as_many_are(function: Callable[[jax.Array], jax.Array]) -> None:
    x = np.abs(4 * np.random.default_rng(0).standard_normal(42 * 64)).astype(np.float32)
    program = jax.jit(lambda x: in_lanes(function, x))
    whole = np.asarray(jax.jit(function)(x))
    for size in (1, 2, 3, 6, 7, 12, 42, 64):
        parts = np.concatenate([program(part) for part in x[: x.size // size * size].reshape(-1, size)[:64]])
        np.testing.assert_array_equal(parts, whole[: parts.size], err_msg=f"{size} at a time")


def test_elsewhere_they_are_the_plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product with ones in the program of an accelerator, and the same results."""
    x = np.random.default_rng(0).standard_normal((5, 7, 300)).astype(np.float32)
    on_cpu = [np.asarray(function(x)) for function in (row_sums, softmax, lambda x: in_lanes(jnp.exp, x))]
    monkeypatch.setattr(devices, "on_cpu", lambda: False)
    programs = [jax.jit(lambda x, f=f: f(x)) for f in (row_sums, softmax, lambda x: in_lanes(jnp.exp, x))]
    for program, wanted in zip(programs, on_cpu, strict=True):
        text = program.lower(x).as_text()
        assert "dot_general" not in text and "optimization_barrier" not in text
        np.testing.assert_allclose(program(x), wanted, rtol=1e-5, atol=1e-5)
