"""Row sums are right, and their bits are the same in any number of rows."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pallas_kernels.reductions import row_sums


@pytest.mark.parametrize("width", [16, 64, 128, 256, 2048])
def test_bits_do_not_depend_on_the_number_of_rows(width: int) -> None:
    x = np.random.default_rng(width).standard_normal((300, width)).astype(np.float32)
    whole = np.asarray(jax.jit(row_sums)(x))
    np.testing.assert_allclose(whole, x.astype(np.float64).sum(-1), atol=1e-3)
    for rows in (1, 2, 3, 5, 17, 64, 260):
        np.testing.assert_array_equal(jax.jit(row_sums)(x[:rows]), whole[:rows])
        np.testing.assert_array_equal(jax.jit(row_sums)(x[:rows].reshape(rows, 1, width))[:, 0], whole[:rows])
