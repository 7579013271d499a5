"""Meshes as people write them: what is understood, what is refused, and with which words."""

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.config import ConfigError, EngineConfig, ExpertsSpec, LayerSpec, ModelConfig, NormSpec
from jaxinfer.placement import check_mesh
from sharding.mesh_config import AXES, MAX_DEVICES, MeshConfig, MeshError, divisors, factors, kv_shards

SIZES = st.integers(1, 5)


# ---- parsing


def test_axes_are_named_in_any_order_with_any_spaces() -> None:
    mesh = MeshConfig.parse(" tensor = 4 ,context=2,, pipe=02 ")
    assert mesh == MeshConfig(pipe=2, context=2, tensor=4)
    assert (mesh.num_devices, mesh.group, str(mesh)) == (16, 4, "pipe=2,context=2,tensor=4")
    assert MeshConfig.parse("expert=2,tensor=3").group == 6


@pytest.mark.parametrize("text", ["", " ", ",", "tensor=1", "data=1,pipe=1"])
def test_one_device(text: str) -> None:
    assert MeshConfig.parse(text) == MeshConfig()
    assert str(MeshConfig.parse(text)) == "one device"


@given(st.builds(MeshConfig, SIZES, SIZES, SIZES, SIZES, SIZES))
def test_what_is_written_is_read(mesh: MeshConfig) -> None:
    assert MeshConfig.parse("" if mesh.num_devices == 1 else str(mesh)) == mesh
    assert list(mesh.sizes) == list(AXES) == ["pipe", "data", "context", "expert", "tensor"]
    assert mesh.num_devices == math.prod(mesh.sizes.values())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tesnor=2", "axis 'tesnor' is not one of pipe, data, context, expert, tensor"),
        ("replica=2", "axis 'replica' is not one of"),
        ("Tensor=2", "axis 'Tensor' is not one of"),
        ("=2", "axis '' is not one of"),
        ("2", "axis '2' is not one of"),
        ("tensor", "'tensor' must be tensor=SIZE, a whole number of at least 1"),
        ("tensor=", "must be tensor=SIZE"),
        ("tensor=2=2", "must be tensor=SIZE"),
        ("tensor=-2", "must be tensor=SIZE"),
        ("tensor=+2", "must be tensor=SIZE"),
        ("tensor=2.0", "must be tensor=SIZE"),
        ("tensor=1_0", "must be tensor=SIZE"),
        ("tensor=two", "must be tensor=SIZE"),
        ("tensor=\u0662", "must be tensor=SIZE"),  # an Arabic two, which int() takes
        ("tensor=\u00b2", "must be tensor=SIZE"),  # a superscript two, which isdigit() takes
        ("tensor=2 context=2", "must be tensor=SIZE"),
        ("tensor=2;context=2", "must be tensor=SIZE"),
        ("tensor=" + "9" * 5000, "must be tensor=SIZE"),
        ("tensor=0", "mesh axis tensor=0 must be a whole number of at least 1"),
        ("tensor=2,data=2,tensor=2", "names axis 'tensor' twice"),
        ("tensor=70000", r"mesh tensor=70000 has 70,000 devices; the limit is 65,536"),
        ("tensor=65536,data=2", "has 131,072 devices; the limit is 65,536"),
    ],
)
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(MeshError, match=words):
        MeshConfig.parse(text)
    with pytest.raises(ConfigError, match=words):
        EngineConfig(mesh=text)


@given(st.text(max_size=30))
def test_any_text_is_a_mesh_or_refused(text: str) -> None:
    try:
        assert MeshConfig.parse(text).num_devices >= 1
    except MeshError as error:
        assert repr(text) in str(error) or "mesh" in str(error)


@pytest.mark.parametrize("size", [True, 2.0, "2", None, -1])
def test_sizes_are_whole_numbers(size: object) -> None:
    with pytest.raises(MeshError, match=f"mesh axis tensor={size!r} must be a whole number of at least 1"):
        MeshConfig(tensor=size)  # type: ignore[arg-type]


def test_the_largest_mesh() -> None:
    assert MeshConfig(data=MAX_DEVICES).num_devices == MAX_DEVICES


# ---- K/V heads


@given(st.integers(1, 3000))
def test_divisors(size: int) -> None:
    assert divisors(size) == [n for n in range(1, size + 1) if size % n == 0]


@pytest.mark.parametrize(
    ("kv_heads", "group", "parts"), [(8, 4, 4), (8, 8, 8), (2, 4, 2), (1, 8, 1), (6, 3, 3), (3, 6, 3), (12, 4, 4)]
)
def test_heads_are_split_or_repeated(kv_heads: int, group: int, parts: int) -> None:
    assert kv_shards(kv_heads, group) == parts


def test_heads_that_are_neither_are_refused() -> None:
    words = (
        r"kv_heads=6 neither divide among expert\*tensor=4 devices nor are divided by them; "
        r"sizes that would do: 1, 2, 3, 6, 12, 18, "
    )
    with pytest.raises(MeshError, match=words) as caught:
        kv_shards(6, 4)
    offered = [int(number) for number in str(caught.value).rpartition(": ")[2].split(", ")]
    assert all(kv_shards(6, size) for size in offered)


@given(
    st.sampled_from([1, 2, 3, 4, 6, 8]),
    st.sampled_from([1, 2, 3, 4, 6, 8, 16]),
    st.sets(st.integers(1, 24), max_size=3),
)
def test_factors_are_those_of_the_axes_and_nest(expert: int, tensor: int, kv_heads: set[int]) -> None:
    """Each split of K/V heads is over the outermost sub-axes; or it is refused, with a reason that holds."""
    config = MeshConfig(expert=expert, tensor=tensor)
    group = config.group
    fits = all(heads % group == 0 or group % heads == 0 for heads in kv_heads)
    try:
        of_expert, of_tensor = factors(config, kv_heads)
    except MeshError as error:
        marks = sorted({1, expert, group, *(kv_shards(heads, group) for heads in kv_heads)}) if fits else []
        nests = all(high % low == 0 for low, high in itertools.pairwise(marks))
        assert not fits or not nests, error
        return
    assert fits
    assert (math.prod(of_expert), math.prod(of_tensor)) == (expert, tensor)
    sizes = [*of_expert, *of_tensor]
    leading = {math.prod(sizes[:count]) for count in range(len(sizes) + 1)}
    assert {kv_shards(heads, group) for heads in kv_heads} <= leading


@pytest.mark.parametrize(
    ("config", "kv_heads", "expected"),
    [
        (MeshConfig(tensor=8), [2], ((1,), (2, 4))),
        (MeshConfig(tensor=8), [8], ((1,), (8,))),
        (MeshConfig(tensor=8), [1], ((1,), (8,))),
        (MeshConfig(tensor=8), [4, 2], ((1,), (2, 2, 2))),
        (MeshConfig(expert=2, tensor=4), [4], ((2,), (2, 2))),
        (MeshConfig(expert=4, tensor=2), [2], ((2, 2), (2,))),
        (MeshConfig(expert=2, tensor=2), [2], ((2,), (2,))),
        (MeshConfig(data=3, pipe=2), [5], ((1,), (1,))),
    ],
)
def test_factors(config: MeshConfig, kv_heads: list[int], expected: tuple) -> None:
    assert factors(config, kv_heads) == expected


def test_splits_that_do_not_nest_are_refused() -> None:
    words = r"mesh tensor=6: K/V heads \[2, 3\] need splits into 2 and into 3 parts, which do not nest"
    with pytest.raises(MeshError, match=words):
        factors(MeshConfig(tensor=6), [2, 3])


# ---- models that do not fit

LAYER = LayerSpec()
DENSE = ModelConfig("test", 99, 48, 96, 12, 4, 16, NormSpec(1e-5), False, 128, (LAYER,) * 6)
EXPERTS = ExpertsSpec(num_experts=6, per_token=2, ffn_size=20)
MIXTURE = dataclasses.replace(DENSE, layers=(dataclasses.replace(LAYER, experts=EXPERTS),) * 6)


def layers(*changes: dict[str, object]) -> ModelConfig:
    return dataclasses.replace(DENSE, layers=tuple(dataclasses.replace(LAYER, **change) for change in changes))


SLIDES, OWN, READS = {"window": 8}, {}, {"kv_from": 0}


@pytest.mark.parametrize(
    ("model", "mesh", "words"),
    [
        (DENSE, "tensor=8", r"q_heads=12 does not divide over tensor=8; sizes that do: 1, 2, 3, 4, 6, 12$"),
        (MIXTURE, "tensor=4,expert=2", r"q_heads=12 does not divide over expert\*tensor=8; sizes that do: 1, 2, 3"),
        (
            dataclasses.replace(DENSE, ffn_size=100),
            "tensor=3",
            r"ffn_size=100 does not divide over tensor=3; sizes that do: 1, 2, 4, 5, 10, 20, 25, 50$",
        ),
        (MIXTURE, "expert=4", r"num_experts=6 does not divide over expert=4; sizes that do: 1, 2, 3, 6$"),
        (MIXTURE, "tensor=3", r"the experts' ffn_size=20 does not divide over tensor=3; sizes that do: 1, 2, 4, 5"),
        (DENSE, "data=3", r"max_num_seqs=16 does not divide over data=3; sizes that do: 1, 2, 4, 8, 16$"),
        (DENSE, "pipe=4", r"num_layers=6 does not divide over pipe=4; sizes that do: 1, 2, 3, 6$"),
        (dataclasses.replace(DENSE, kv_heads=6), "tensor=4", r"kv_heads=6 neither divide among expert\*tensor=4"),
        (layers(OWN, {"kv_heads": 6}), "tensor=4", r"kv_heads=6 neither divide among expert\*tensor=4"),
        (DENSE, "expert=2,tensor=2", r"expert=2: the model has no experts; use tensor=4 instead"),
        (layers(OWN, OWN, READS, READS), "pipe=2", r"layer 2 reads the K/V of layer 0, so stages cannot be alike; use"),
        (
            layers(SLIDES, OWN, OWN, SLIDES),
            "pipe=2",
            r"layer 2 \(window=None instead of 8\) is not as layer 0 of the first stage, and stages of 2 layers must "
            r"be alike; numbers of stages that would do: 1$",
        ),
        (
            layers(SLIDES, OWN, SLIDES, OWN, SLIDES, OWN),
            "pipe=2",
            r"layer 3 \(window=None instead of 8\) is not as layer 0 .* numbers of stages that would do: 1, 3$",
        ),
    ],
)
def test_what_a_mesh_cannot_split(model: ModelConfig, mesh: str, words: str) -> None:
    with pytest.raises(MeshError, match=words):
        check_mesh(model, EngineConfig(mesh=mesh), MeshConfig.parse(mesh))


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        (DENSE, "tensor=4"),
        (DENSE, "tensor=12"),
        (DENSE, "pipe=3,data=2,context=5"),
        (MIXTURE, "expert=2,tensor=2"),
        (MIXTURE, "expert=3,tensor=4"),
        (layers(SLIDES, OWN, SLIDES, OWN, SLIDES, OWN), "pipe=3"),
        (layers(OWN, OWN, READS, READS), "tensor=4,context=3"),
        (dataclasses.replace(DENSE, kv_heads=1), "tensor=12"),
    ],
)
def test_what_a_mesh_can_split(model: ModelConfig, mesh: str) -> None:
    check_mesh(model, EngineConfig(mesh=mesh), MeshConfig.parse(mesh))


@pytest.mark.parametrize("change", [lambda m: m, lambda m: dataclasses.replace(m, q_heads=8, kv_heads=8, ffn_size=64)])
def test_every_size_that_is_offered_is_taken(change: Callable[[ModelConfig], ModelConfig]) -> None:
    model = change(DENSE)
    for size in range(2, 20):
        mesh = MeshConfig(tensor=size)
        try:
            check_mesh(model, EngineConfig(), mesh)
        except MeshError as error:
            offered = [int(word) for word in str(error).rpartition(": ")[2].split(", ")]
            assert size not in offered and offered[0] == 1
