"""Where every parameter of every architecture lies on a mesh, said once more in plain words, and what that weighs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from mesh_models import MODELS, SIZES, write_model
from mesh_runs import BASE

from jaxinfer.config import ConfigError, ModelConfig
from jaxinfer.models import load_config, transformer
from jaxinfer.models.checkpoint import load_parameters
from jaxinfer.models.layers import Linear
from jaxinfer.models.llama import config as llama_config
from jaxinfer.models.transformer import ParameterSpec, abstract_parameters
from jaxinfer.placement import PlacedParameter, kv_axes, mesh_of, place_parameters
from sharding.mesh import DeviceMesh, make_mesh
from sharding.mesh_config import MeshConfig, MeshError
from sharding.rules import padded_shape, partition

MESHES = ("tensor=4", "expert=2,tensor=2", "pipe=2,tensor=2")
FLOAT32 = jnp.dtype(jnp.float32)

# Dimension by dimension: "-" whole; "group" over the tensor group; "kv" over as much of it as there are K/V heads;
# "all" over stages and the group; or an axis. Those of layers are split over stages besides.
SPLITS: dict[str, tuple[str, ...]] = {
    r"embed\.weight, of logits too": ("all", "-"),
    r"(per_layer\.)?embed\.weight": ("-", "all"),  # tables that are only looked up: by columns
    r"unembedding\.weight": ("all", "-"),
    r"norm\.(weight|bias)": ("-",),
    r"per_layer\.norm\.weight": ("-",),
    r"per_layer\.projection\.weight": ("-", "-"),
    r"(spread|gather)\.\d\.weight": ("-", "-"),
    r"layers\.\d\.attention\.q\.weight": ("group", "-"),
    r"layers\.\d\.attention\.q\.bias": ("group",),
    r"layers\.\d\.attention\.[kv]\.weight": ("kv", "-"),
    r"layers\.\d\.attention\.[kv]\.bias": ("kv",),
    r"layers\.\d\.attention\.o\.weight": ("-", "group"),
    r"layers\.\d\.attention\.o\.bias": ("-",),
    r"layers\.\d\.attention\.q_norm\.weight, of all heads": ("group",),
    r"layers\.\d\.attention\.k_norm\.weight, of all heads": ("kv",),
    r"layers\.\d\.attention\.[qk]_norm\.weight": ("-",),  # of a head
    r"layers\.\d\.attention\.sinks": ("group",),
    r"layers\.\d\.mlp\.(gate|up)\.weight": ("group", "-"),
    r"layers\.\d\.mlp\.(gate|up)\.bias": ("group",),
    r"layers\.\d\.mlp\.down\.weight": ("-", "group"),
    r"layers\.\d\.mlp\.down\.bias": ("-",),
    r"layers\.\d\.(mlp|sparse)\.router\.weight": ("-", "-"),
    r"layers\.\d\.mlp\.router\.bias": ("-",),
    r"layers\.\d\.sparse\.(router|expert)_scale": ("-",),
    r"layers\.\d\.(mlp|sparse)\.experts\.(gate|up)": ("expert", "tensor", "-"),
    r"layers\.\d\.(mlp|sparse)\.experts\.down": ("expert", "-", "tensor"),
    r"layers\.\d\.mlp\.experts\.(gate|up)_bias": ("expert", "tensor"),
    r"layers\.\d\.mlp\.experts\.down_bias": ("expert", "-"),
    r"layers\.\d\.(sparse\.)?(attention_|mlp_)?(out_)?norm\.(weight|bias)": ("-",),
    r"layers\.\d\.scalar": ("-",),
    r"layers\.\d\.alt_up\.(router|prediction|correction)\.weight": ("-", "-"),
    r"layers\.\d\.alt_up\.(router_norm\.weight|output_scale)": ("-",),
    r"layers\.\d\.laurel\.(left|right)\.weight": ("-", "-"),
    r"layers\.\d\.laurel\.norm\.weight": ("-",),
    r"layers\.\d\.per_layer\.(gate|projection)\.weight": ("-", "-"),
    r"layers\.\d\.per_layer\.norm\.weight": ("-",),
}
# Matrices that may be whole: as wide as the residual and narrow the other way, but for Gemma 3n's and 4's own maps
# between residuals. Any other of more than LARGE values must be split.
LARGE = 8 * SIZES["hidden_size"]
MAY_BE_WHOLE = re.compile(r"(spread|gather)\.\d\.weight|per_layer\.projection\.weight|.*router\.weight|.*\.laurel\..*")


def pattern_of(name: str, model: ModelConfig) -> str | None:
    """The key of SPLITS that is meant; None: there is none."""
    if name == "embed.weight" and model.tie_embeddings:
        name += ", of logits too"
    elif name.endswith(("q_norm.weight", "k_norm.weight")) and model.qk_norm == "projection":
        name += ", of all heads"
    found = [pattern for pattern in SPLITS if re.fullmatch(pattern, name)]
    assert len(found) <= 1, f"{name} is meant by {found}"
    return found[0] if found else None


def wrong(parameter: PlacedParameter, model: ModelConfig, mesh: DeviceMesh) -> list[str]:
    """What is not as it should be of a parameter's place."""
    name, found = parameter.names[0], []
    sharding: Any = parameter.sharding
    if parameter.parts:
        found = [problem for part in parameter.parts for problem in wrong(part, model, mesh)]
        if sharding != parameter.parts[0].sharding:
            found.append(f"{parameter.label} is split as {sharding}")
        if parameter.device_shape[0] != sum(part.device_shape[0] for part in parameter.parts):
            found.append(f"{parameter.label}: a device has {list(parameter.device_shape)}")
        return found
    places = list(sharding.spec) + [None] * (len(parameter.shape) - len(sharding.spec))
    if parameter.stacked:
        if places.pop(0) != mesh_axes("pipe", mesh):
            found.append(f"{name} is not split over stages")
    elif name.startswith("layers.") and mesh.config.pipe > 1:
        found.append(f"{name} is not stacked")
    split = SPLITS.get(pattern_of(name, model) or "", ())
    if len(split) != len(places):
        return [*found, f"{name}: no pattern says how {list(parameter.spec.shape)} is to be split"]
    for size, part, word, place in zip(
        parameter.shape[-len(split) :], parameter.device_shape, split, places, strict=True
    ):
        if place != mesh_axes(word, mesh, kv_heads_of(name, model)) or part * count(place, mesh) != size:
            found.append(f"{name} has {place} for {word!r}, {part} of {size}")
    is_whole = all(place is None for place in places)
    has_one_head = re.search(r"attention\.[kv]\.", name) is not None and kv_heads_of(name, model) == 1
    if is_whole and not has_one_head and math.prod(parameter.spec.shape) > LARGE and not MAY_BE_WHOLE.fullmatch(name):
        found.append(f"{name} {list(parameter.spec.shape)} is whole on every device")
    return found


def mesh_axes(word: str, mesh: DeviceMesh, kv_heads: int = 0) -> Any:
    """The entry of a PartitionSpec that a word of SPLITS stands for."""
    axes = {"-": (), "all": ("pipe", "expert", "tensor"), "group": ("expert", "tensor"), "kv": ("expert", "tensor")}
    names = [name for axis in axes.get(word, (word,)) for name in mesh.parts[axis] if mesh.mesh.shape[name] > 1]
    if word == "kv":
        while count(tuple(names), mesh) > min(kv_heads, mesh.config.group):
            names.pop()
        assert count(tuple(names), mesh) == min(kv_heads, mesh.config.group)
    return tuple(names) if len(names) > 1 else (names or [None])[0]


def count(place: Any, mesh: DeviceMesh) -> int:
    names = () if place is None else place if isinstance(place, tuple) else (place,)
    return math.prod(mesh.mesh.shape[name] for name in names)


def kv_heads_of(name: str, model: ModelConfig) -> int:
    return model.kv_shape(int(name.split(".")[1])).kv_heads if name.startswith("layers.") else 0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    for name in MODELS:
        write_model(directory / name, name)
    return {name: directory / name for name in MODELS}


def placed_on(path: Path, sizes: str) -> tuple[ModelConfig, DeviceMesh, tuple[PlacedParameter, ...]] | None:
    """The model on a mesh; None where they do not fit (tests/jaxinfer/test_mesh_models.py has the refusals)."""
    model = load_config(path)
    try:
        mesh = mesh_of(model, dataclasses.replace(BASE, mesh=sizes))
    except ConfigError:
        return None
    assert mesh is not None
    return model, mesh, place_parameters(model, FLOAT32, mesh)


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_split_as_it_should(models: dict[str, Path], name: str, sizes: str) -> None:
    found = placed_on(models[name], sizes)
    if found is None:
        assert "pipe" in sizes or "expert" in sizes
        return
    model, mesh, placed = found
    assert [problem for parameter in placed for problem in wrong(parameter, model, mesh)] == []
    names = [name for parameter in placed for name in parameter.names]
    assert sorted(names) == sorted(abstract_parameters(model, FLOAT32)), "each of the model's parameters once"


def test_every_pattern_is_of_use(models: dict[str, Path]) -> None:
    used = set()
    for path in models.values():
        model = load_config(path)
        for name in abstract_parameters(model, FLOAT32):
            used.add(pattern_of(name, model))
    assert used == set(SPLITS)


# ---- accidents


@pytest.fixture
def no_memory() -> Iterator[None]:
    """Of specs asked for before, and afterwards of those asked for in the test."""
    transformer._abstract_parameters.cache_clear()
    yield
    transformer._abstract_parameters.cache_clear()


def misspell(monkeypatch: pytest.MonkeyPatch, right: str, misspelling: str) -> None:
    """From here on linear maps name an axis wrongly."""
    build = Linear.__init__

    def wrongly(self: Linear, in_size: int, out_size: int, axes: tuple[str, str], *args: Any, **options: Any) -> None:
        build(self, in_size, out_size, tuple(misspelling if a == right else a for a in axes), *args, **options)

    monkeypatch.setattr(Linear, "__init__", wrongly)


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize(
    ("right", "misspelling", "parts"),
    [("heads", "haeds", ("q", "o")), ("ffn", "fnn", ("gate", "up", "down")), ("kv_heads/2", "kv/2", ("k", "v"))],
)
def test_a_misspelt_axis_is_noticed(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, right: str, misspelling: str, parts: tuple[str, ...]
) -> None:
    """An axis that no rule names is whole on every device: the model would run, and need the memory of one device."""
    misspell(monkeypatch, right, misspelling)
    found = placed_on(models["llama"], "tensor=4")
    assert found is not None
    model, mesh, placed = found
    problems = [problem for parameter in placed for problem in wrong(parameter, model, mesh)]
    for part in parts:
        assert any(
            re.match(rf"layers\.0\..*\.{part}\.weight \[.*\] is whole on every device", text) for text in problems
        )
        assert any(re.match(rf"layers\.0\..*\.{part}\.weight has None for", text) for text in problems)


def test_a_parameter_of_no_pattern_is_noticed(models: dict[str, Path]) -> None:
    found = placed_on(models["llama"], "tensor=4")
    assert found is not None
    model, mesh, placed = found
    for name in ("layers.0.attention.gate.weight", "head.weight", "layers.0.attention.q.weights"):
        new = dataclasses.replace(placed[0], names=(name,))
        assert any("no pattern says" in problem for problem in wrong(new, model, mesh))
    (fused,) = (p for p in placed if p.names[0] == "layers.0.attention.q.weight")
    assert fused.parts[0].names == fused.names[:1] and not fused.stacked
    unstacked = fused.parts[0]
    staged = placed_on(models["llama"], "pipe=2,tensor=2")
    assert staged is not None
    assert any("is not stacked" in problem for problem in wrong(unstacked, model, staged[1]))


# ---- one array


def test_padding_and_refusals() -> None:
    mesh = make_mesh(MeshConfig(tensor=8), [2])
    table = ParameterSpec((99, 64), FLOAT32, ("vocab", "embed"))
    assert padded_shape(table, mesh) == (104, 64)
    assert partition(table, mesh).shard_shape((104, 64)) == (13, 64)
    words = (
        r"axis 'ffn' of size 100 does not divide over tensor0 x tensor1 = 8 devices of mesh tensor=8; sizes that do: "
    )
    with pytest.raises(MeshError, match=words + "1, 2, 4, 5, 10, 20, 25, 50, 100"):
        partition(ParameterSpec((100, 64), FLOAT32, ("ffn", "embed")), mesh)
    heads = ParameterSpec((32, 64), FLOAT32, ("kv_heads/2", "embed"))
    assert partition(heads, mesh).shard_shape((32, 64)) == (16, 64)


def test_a_table_whose_columns_do_not_divide_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    """Gemma 3n's per-layer table is layers x size wide."""
    model = load_config(models["gemma3n"])
    assert model.per_layer_input is not None
    narrow = dataclasses.replace(model, per_layer_input=dataclasses.replace(model.per_layer_input, size=5))
    mesh = mesh_of(model, dataclasses.replace(BASE, mesh="tensor=8"))
    with pytest.raises(ConfigError, match=r"parameter per_layer.embed.weight \[99, 20\]: axis 'columns' of size 20"):
        place_parameters(narrow, FLOAT32, mesh)


# ---- bytes


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma3n", "gemma4_moe", "olmo2"])
@pytest.mark.parametrize("sizes", MESHES)
def test_bytes_of_a_device(models: dict[str, Path], name: str, sizes: str) -> None:
    """What is loaded weighs what the plan says, on each device alike; over all, every part as often as repeated."""
    found = placed_on(models[name], sizes)
    if found is None:
        return
    model, mesh, placed = found
    parameters = load_parameters(models[name], model, FLOAT32, placed=placed)
    held = dict.fromkeys(jax.devices()[: mesh.config.num_devices], 0)
    for leaf in jax.tree.leaves(parameters):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    planned = sum(4 * math.prod(parameter.device_shape) for parameter in placed)
    assert set(held.values()) == {planned}
    assert sum(held.values()) == sum(4 * copies_bytes(parameter, model, mesh) for parameter in placed)
    whole = sum(4 * math.prod(spec.shape) for spec in abstract_parameters(model, FLOAT32).values())
    assert whole / mesh.config.num_devices <= planned < 0.62 * whole


def copies_bytes(parameter: PlacedParameter, model: ModelConfig, mesh: DeviceMesh) -> int:
    """Values of a parameter on all devices together, by SPLITS; only the vocabulary is padded."""
    if parameter.parts:
        return sum(copies_bytes(part, model, mesh) for part in parameter.parts)
    name = parameter.names[0]
    split = SPLITS[pattern_of(name, model) or ""]
    parts = math.prod(count(mesh_axes(word, mesh, kv_heads_of(name, model)), mesh) for word in split)
    values = len(parameter.names) * math.prod(parameter.spec.shape)
    if split[0] == "all":
        rows = -(-model.vocab_size // parts) * parts
        values = rows * parameter.spec.shape[1]
    stages = mesh.config.pipe if parameter.stacked else 1
    return values * mesh.config.num_devices // (parts * stages)


LARGE_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128_256,
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("sizes", "devices"), [("tensor=8", 8), ("pipe=4,tensor=2", 8), ("pipe=2,tensor=4", 8), ("data=2,tensor=4", 4)]
)
def test_a_large_model_is_shared_out(sizes: str, devices: int) -> None:
    """Of Llama 3 70B, 141 GB in bfloat16, a device holds an eighth, and little more."""
    model = llama_config(LARGE_LLAMA)
    config = MeshConfig.parse(sizes)
    mesh = make_mesh(config, [8])
    assert kv_axes(model) == ("kv_heads/8",)
    placed = place_parameters(model, jnp.dtype(jnp.bfloat16), mesh)
    own = sum(2 * math.prod(parameter.device_shape) for parameter in placed)
    whole = sum(2 * math.prod(parameter.shape) for parameter in placed)
    assert 141e9 < whole < 142e9
    assert whole / devices <= own <= 1.0002 * whole / devices


def test_axes_are_those_with_rules_and_those_known_to_be_whole(models: dict[str, Path]) -> None:
    whole = {"embed", "embed_out", "head_dim", "routes", "rows", "one", "streams", "laurel", "per_layer"}
    split = {"vocab", "columns", "heads", "ffn", "experts", "expert_ffn"}
    axes = {
        axis.partition("/")[0]
        for name in MODELS
        for spec in abstract_parameters(load_config(models[name]), FLOAT32).values()
        for axis in spec.axes
    }
    assert axes == whole | split | {"kv_heads"}
