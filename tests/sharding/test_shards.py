"""What layers ask of devices, on eight virtual CPU devices: rings against plain gathers and sums, all against numpy."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding.mesh import DeviceMesh, make_mesh
from sharding.mesh_config import MeshConfig
from sharding.shards import ALONE, Shards, shards_of

# devices of a group -> a mesh that has them: as one axis, as factors of it, and beside other axes
MESHES = {
    2: make_mesh(MeshConfig(data=2, tensor=2)),
    4: make_mesh(MeshConfig(expert=2, tensor=2)),
    8: make_mesh(MeshConfig(tensor=8), [2, 4]),
}
RUNS = (1, 2, 3, 7)  # tokens of a device
EMBED, FFN = 6, 16
FLOAT32 = 1e-5


def shards(mesh: DeviceMesh, *, ring_rows: int = 1, split_tokens: bool = True) -> Shards:
    return replace(shards_of(mesh, ("kv_heads/2",), split_tokens=split_tokens), ring_rows=ring_rows)


def run(
    mesh: DeviceMesh, function: Callable[..., Any], *arguments: tuple[np.ndarray, tuple[str, ...]], out: Any
) -> Any:
    """`function` on every device; each argument with the logical axes of its dimensions, "" where it is whole."""
    places = tuple(mesh.sharding(*(of(mesh, axis) for axis in axes)) for _, axes in arguments)
    results = jax.tree.map(lambda axes: mesh.sharding(*(of(mesh, axis) for axis in axes)), out, is_leaf=is_axes)
    return jax.jit(mesh.run(function, places, results))(*(value for value, _ in arguments))


def of(mesh: DeviceMesh, axis: str) -> tuple[str, ...]:
    return mesh.names("expert", "tensor") if axis == "tokens" else mesh.axes_of(axis)


def is_axes(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(axis, str) for axis in value)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("rows", RUNS)
@pytest.mark.parametrize("count", MESHES)
def test_a_ring_that_enters_is_a_gather(count: int, rows: int) -> None:
    """The same rows in the same order, whatever pieces they came in; results may be any pytree."""
    mesh, x = MESHES[count], random(count * rows, EMBED)
    wide, narrow = random(FFN, EMBED), random(EMBED, 3)

    def layer(x: jax.Array, weight: jax.Array, whole: jax.Array, own: Shards) -> Any:
        return own.entering(x, lambda piece: {"split": piece @ weight.T, "whole": (piece @ whole)[:, None]})

    made = {}
    for ring_rows in (1, rows, rows + 1):
        own = shards(mesh, ring_rows=ring_rows)
        arguments = ((x, ("tokens", "")), (wide, ("ffn", "")), (narrow, ("", "")))
        out = {"split": ("", "ffn"), "whole": ("", "", "")}
        made[ring_rows] = run(mesh, lambda *each, own=own: layer(*each, own), *arguments, out=out)
    for found in made.values():
        np.testing.assert_allclose(found["split"], x @ wide.T, rtol=FLOAT32, atol=FLOAT32)
        np.testing.assert_allclose(found["whole"][:, 0], x @ narrow, rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("rows", RUNS)
@pytest.mark.parametrize("count", MESHES)
def test_a_ring_that_leaves_is_a_scattered_sum(count: int, rows: int) -> None:
    """Halves of a run go opposite ways round; a run of one token has an empty half."""
    mesh, x, weight = MESHES[count], random(count * rows, FFN), random(EMBED, FFN)
    for ring_rows in (1, rows + 1):
        own = shards(mesh, ring_rows=ring_rows)

        def layer(x: jax.Array, weight: jax.Array, own: Shards = own) -> jax.Array:
            return own.leaving(x, lambda piece: piece @ weight.T, "ffn")

        found = run(mesh, layer, (x, ("", "ffn")), (weight, ("", "ffn")), out=("tokens", ""))
        np.testing.assert_allclose(found, x @ weight.T, rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("count", MESHES)
def test_rings_are_rings(count: int) -> None:
    """Below `ring_rows` one collective does it; from there on, only exchanges between neighbours."""
    mesh, tokens = MESHES[count], 4 * count

    def layer(x: jax.Array, own: Shards) -> jax.Array:
        return own.leaving(own.entering(x, lambda piece: jnp.tile(piece, (1, 2))), lambda piece: piece[:, :1], "ffn")

    def text(ring_rows: int) -> str:
        own, place = shards(mesh, ring_rows=ring_rows), mesh.sharding(of(mesh, "tokens"), ())
        function = mesh.run(lambda x: layer(x, own), (place,), place)
        return jax.jit(function).lower(jnp.zeros((tokens, EMBED))).as_text()

    ring, plain = text(4), text(5)
    assert "collective_permute" in ring and "all_gather" not in ring and "reduce_scatter" not in ring
    assert "collective_permute" not in plain and "all_gather" in plain and "reduce_scatter" in plain


@pytest.mark.parametrize("count", MESHES)
def test_tokens_that_are_not_split_stay_whole(count: int) -> None:
    mesh, x, weight = MESHES[count], random(5, FFN), random(EMBED, FFN)
    own = shards(mesh, split_tokens=False)

    def layer(x: jax.Array, weight: jax.Array) -> Any:
        assert own.token_shards == 1
        assert own.entering(x, lambda piece: piece) is x and own.own_tokens(x) is x and own.all_tokens(x) is x
        return own.leaving(x, lambda piece: piece @ weight.T, "ffn"), own.scatter_tokens(x @ weight.T)

    found = run(mesh, layer, (x, ("", "ffn")), (weight, ("", "ffn")), out=(("", ""), ("", "")))
    for each in found:
        np.testing.assert_allclose(each, x @ weight.T, rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("count", MESHES)
def test_runs_of_tokens(count: int) -> None:
    mesh, x = MESHES[count], random(3 * count, EMBED)
    own = shards(mesh)

    def ask(x: jax.Array) -> Any:
        mine = own.own_tokens(x)
        assert mine.shape[0] == 3 and own.token_shards == count
        partial = x * (1.0 + own.index("heads"))
        return mine, own.all_tokens(mine), own.scatter_tokens(partial)

    mine, every, scattered = run(mesh, ask, (x, ("", "")), out=(("tokens", ""), ("", ""), ("tokens", "")))
    np.testing.assert_array_equal(mine, x)
    np.testing.assert_array_equal(every, x)
    np.testing.assert_allclose(scattered, x * sum(range(1, count + 1)), rtol=FLOAT32)


@pytest.mark.parametrize("count", MESHES)
def test_reductions(count: int) -> None:
    mesh, x = MESHES[count], random(4, 2 * count)
    own = shards(mesh, split_tokens=False)

    def ask(x: jax.Array) -> Any:
        assert own.count("ffn") == own.count("heads") == count
        first = own.sum(own.once(jnp.ones(3), "ffn"), "ffn")
        return own.sum(x.sum(1), "ffn"), own.max(x.max(1), "ffn"), own.columns(x, "ffn"), first

    total, highest, columns, first = run(mesh, ask, (x, ("", "ffn")), out=(("",), ("",), ("", ""), ("",)))
    np.testing.assert_allclose(total, x.sum(1), rtol=FLOAT32, atol=FLOAT32)
    np.testing.assert_array_equal(highest, x.max(1))
    np.testing.assert_array_equal(columns, x)
    np.testing.assert_array_equal(first, np.ones(3))


@pytest.mark.parametrize("count", [4, 8])
def test_fewer_kv_heads_than_devices_are_counted_once(count: int) -> None:
    """Two heads over more devices: a sum over their axis takes each once, however many devices hold it."""
    mesh = make_mesh(MeshConfig(tensor=count), [2])
    own, x = shards(mesh), random(3, 2 * EMBED)

    def ask(x: jax.Array) -> jax.Array:
        assert own.count("kv_heads/2") == 2 and x.shape[1] == EMBED
        return own.sum(x.sum(1), "kv_heads/2")

    found = run(mesh, ask, (x, ("", "kv_heads/2")), out=("",))
    np.testing.assert_allclose(found, x.sum(1), rtol=FLOAT32, atol=FLOAT32)
    queries = np.arange(count, dtype=np.float32)  # one per device: each lies where its K/V head does
    heads = np.repeat(np.arange(2, dtype=np.float32), 1)
    both = run(mesh, lambda q, kv: q * 10 + kv, (queries, ("heads",)), (heads, ("kv_heads/2",)), out=("heads",))
    np.testing.assert_array_equal(both, queries * 10 + queries // (count // 2))


def test_experts_and_their_parts_have_their_own_axes() -> None:
    own = shards(make_mesh(MeshConfig(expert=4, tensor=2)))
    assert [own.count(axis) for axis in ("experts", "expert_ffn", "ffn", "vocab", "embed")] == [4, 2, 8, 8, 1]


def test_alone_every_answer_is_the_identity() -> None:
    x = jnp.ones((3, 4))
    for answer in (
        ALONE.sum(x, "ffn"),
        ALONE.max(x, "ffn"),
        ALONE.once(x, "ffn"),
        ALONE.columns(x, "columns"),
        ALONE.own_tokens(x),
        ALONE.all_tokens(x),
        ALONE.entering(x, lambda piece: piece),
        ALONE.leaving(x, lambda piece: piece, "ffn"),
        ALONE.scatter_tokens(x),
    ):
        assert answer is x
    assert (ALONE.count("ffn"), ALONE.index("ffn"), ALONE.token_shards) == (1, 0, 1)
    assert shards_of(None, ()) is ALONE
