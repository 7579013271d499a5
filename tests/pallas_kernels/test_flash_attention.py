"""Dense attention against a plain softmax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.flash import flash_attention


def drawn(batch: int, q_tokens: int, kv_tokens: int, q_heads: int, kv_heads: int, head_dim: int) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = [(q_tokens, q_heads), (kv_tokens, kv_heads), (kv_tokens, kv_heads)]
    return [jnp.asarray(rng.standard_normal((batch, *shape, head_dim)), jnp.float32) for shape in shapes]


def plain(q, k, v, lengths, causal, window):
    """Softmax over all rows at once, one batch element and head after the other."""
    group = q.shape[2] // k.shape[2]
    out, lse = np.zeros(q.shape), np.zeros(q.shape[:3])
    for b, length in enumerate(lengths):
        for head in range(q.shape[2]):
            scores = np.asarray(q[b, :, head], np.float64) @ np.asarray(k[b, :length, head // group]).T
            scores /= np.sqrt(q.shape[3])
            position = length - q.shape[1] + np.arange(q.shape[1])[:, None]
            row = np.arange(length)[None, :]
            if causal:
                scores[row > position] = -np.inf
            if window is not None:
                scores[row <= position - window] = -np.inf
            total = np.log(np.exp(scores).sum(axis=1))
            lse[b, :, head] = total
            out[b, :, head] = np.exp(scores - total[:, None]) @ np.asarray(v[b, :length, head // group])
    return out, lse


@pytest.mark.parametrize("backend", ["auto", "xla", "reference"])
@pytest.mark.parametrize(
    ("shape", "lengths", "causal", "window"),
    [
        ((2, 150, 150, 4, 2, 64), (150, 150), True, None),
        ((1, 3, 200, 4, 1, 32), (170,), True, None),
        ((2, 20, 40, 2, 2, 16), (25, 40), False, None),
        ((1, 130, 300, 2, 1, 32), (300,), True, 40),
    ],
    ids=["causal", "continued", "not-causal", "window"],
)
def test_is_a_softmax(shape, lengths, causal, window, backend) -> None:
    q, k, v = drawn(*shape)
    out, lse = flash_attention(q, k, v, lengths=jnp.asarray(lengths), causal=causal, window=window, backend=backend)
    expected_out, expected_lse = plain(q, k, v, lengths, causal, window)
    np.testing.assert_allclose(out, expected_out, atol=2e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-5)


def test_is_what_jax_computes() -> None:
    q, k, v = drawn(2, 100, 100, 4, 2, 32)
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(flash_attention(q, k, v)[0], expected, atol=2e-5)


@pytest.mark.parametrize(
    ("shapes", "options", "words"),
    [
        (((1, 2, 4, 8), (1, 2, 3, 8)), {}, "q_heads a multiple of kv_heads"),
        (((1, 5, 4, 8), (1, 2, 4, 8)), {}, "5 causal queries are more than the 2 rows"),
        (((2, 4, 8), (2, 4, 8)), {}, r"q \[batch, q_tokens"),
        (((1, 2, 4, 8), (1, 2, 4, 8)), {"causal": False, "window": 3}, "window=3 needs causal=True"),
    ],
)
def test_bad_shapes_are_named(shapes: tuple, options: dict, words: str) -> None:
    q, k = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=words):
        flash_attention(q, k, k, **options)
