"""What several calls compute from the same arrays alone is in a program once, and every call's result is its own."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.shared_work import SharedWork


@partial(jax.jit, static_argnames=("power",))
def layer(shared: dict[str, Any], x: jax.Array, bias: jax.Array | None, *, power: int) -> tuple[jax.Array, jax.Array]:
    angle = jnp.sin(shared["position"]) ** power  # of the batch
    mixed = jnp.tanh(x + angle) + jnp.cos(shared["length"])  # of the layer, and of the batch again
    return mixed if bias is None else mixed + bias, angle


def program(position: jax.Array, other: jax.Array, x: jax.Array) -> list[Any]:
    """Three calls with the same arrays, one with others, one with another option."""
    work, shared = SharedWork(), {"position": position, "length": position + 1, "unused": None}
    found = []
    for bias in (None, x, x):
        x, angle = work.call(layer, shared, x, bias, power=2)
        found += [x, angle]
    found += work.call(layer, shared | {"position": other}, x, None, power=2)
    return [*found, *work.call(layer, shared, x, None, power=3)]


def plainly(position: jax.Array, other: jax.Array, x: jax.Array) -> list[Any]:
    shared, found = {"position": position, "length": position + 1, "unused": None}, []
    for bias in (None, x, x):
        x, angle = layer(shared, x, bias, power=2)
        found += [x, angle]
    found += layer(shared | {"position": other}, x, None, power=2)
    return [*found, *layer(shared, x, None, power=3)]


ARRAYS = tuple(jnp.linspace(start, start + 1, 8) for start in range(3))


def test_results_are_those_of_plain_calls() -> None:
    for ours, expected in zip(jax.jit(program)(*ARRAYS), jax.jit(plainly)(*ARRAYS), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(("operation", "times"), [("sine", 4), ("cosine", 4), ("tanh", 5)])
def test_work_of_the_batch_is_there_once_for_calls_that_are_alike(operation: str, times: int) -> None:
    """Five calls, of which the two with a bias are alike; `tanh` is of what each call has of its own."""
    assert jax.jit(program).lower(*ARRAYS).as_text().count(f"stablehlo.{operation}") == times


def test_each_trace_has_work_of_its_own() -> None:
    """Arrays of one trace would be unknown in another."""
    first, second = (jax.make_jaxpr(program)(*ARRAYS) for _ in range(2))
    assert str(first) == str(second)
    looped = jax.jit(lambda *arrays: jax.lax.fori_loop(0, 2, lambda _, x: program(*arrays[:2], x)[0], arrays[2]))
    assert looped(*ARRAYS).shape == (8,)
