"""Loading onto many devices: each shard is what the whole has there, and nothing is read that no device here holds."""

import functools
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from placed_shards import (
    SPLITS,
    NamedSharding,
    Spec,
    Split,
    assert_shards_equal,
    divided,
    placed_by,
    sharded,
    taken_apart,
)
from quantized_files import AWQ, CONFIG, GPTQ, SCHEMES, awq, gptq, write_mixtral, write_model
from tensor_files import write_tensors

from jaxinfer.config import ConfigError, EngineConfig, ModelConfig
from jaxinfer.models import dense_tensors, load_config, shard_reads, weight_source
from jaxinfer.models.checkpoint import CheckpointError, load_parameters, open_checkpoint
from jaxinfer.models.quantized_checkpoint import abstract_weight
from jaxinfer.models.regions import Target, whole
from jaxinfer.models.transformer import ParameterSpec, abstract_parameters
from jaxinfer.models.weight_matching import stored_shapes
from jaxinfer.placement import PlacedParameter, mesh_of, place_parameters
from jaxinfer.weight_formats import WeightFormat
from pallas_kernels.tensors import QuantizedTensor

GOLDENS = Path(__file__).parent.parent / "goldens"
NAMES = sorted(path.name for path in GOLDENS.iterdir())
F32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


# ---- what the arrays must be, and what may be read


@functools.cache
def golden(name: str) -> tuple[ModelConfig, dict[str, ParameterSpec], dict[str, Any]]:
    """Its config, specs and whole parameters, of NumPy arrays."""
    config = load_config(GOLDENS / name)
    specs = abstract_parameters(config, BF16)
    loaded = load_parameters(GOLDENS / name, config, BF16)
    return config, specs, {key: jax.tree.map(np.asarray, array) for key, array in zip(specs, loaded, strict=True)}


def expected_whole(parameter: PlacedParameter, whole: dict[str, np.ndarray]) -> np.ndarray:
    """Stacked and padded."""
    arrays = [whole[name] for name in parameter.names]
    shape = parameter.shape[1:] if parameter.stacked else parameter.shape
    arrays = [np.pad(a, [(0, size - own) for size, own in zip(shape, a.shape, strict=True)]) for a in arrays]
    return np.stack(arrays) if parameter.stacked else arrays[0]


@contextmanager
def counted_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The bytes of every read of tensors."""
    counts: list[int] = []
    preadv = os.preadv

    def counting(descriptor: int, buffers: Any, position: int) -> int:
        counts.append(preadv(descriptor, buffers, position))
        return counts[-1]

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", counting)
        yield counts


def region_bytes(parameters: list[PlacedParameter], config: ModelConfig, itemsize: int) -> int:
    """Of what the devices of this process hold, each region once; of interleaved parts, those between them as well."""
    total = 0
    for parameter in (part for each in parameters for part in each.parts or (each,)):
        regions = {
            tuple(part.indices(size) for part, size in zip(index, parameter.shape, strict=True))
            for index in parameter.sharding.addressable_devices_indices_map(parameter.shape).values()
        }
        source = weight_source(config, parameter.names[0])
        between = source.of if source.interleaved and (source.transposed or len(parameter.spec.shape) == 2) else 1
        limits = ([10**9] if parameter.stacked else []) + list(parameter.spec.shape)
        total += sum(
            math.prod(max(min(stop, limit) - start, 0) for (start, stop, _), limit in zip(region, limits, strict=True))
            for region in regions
        ) * (itemsize * between)
    return total


# ---- plain weights


@pytest.mark.parametrize("name", NAMES)
def test_every_shard_is_a_part_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, specs, whole = golden(name)
    placed = [parameter for split in SPLITS.values() for parameter in placed_by(specs, split)]
    with counted_reads(monkeypatch) as reads:
        loaded = load_parameters(GOLDENS / name, config, BF16, placed=placed)
    if config.quantization is None:
        assert sum(reads) == region_bytes(placed, config, stored_itemsize(GOLDENS / name / "model.safetensors"))
    for parameter, array in zip(placed, loaded, strict=True):
        leaves = zip(jax.tree.leaves(array), jax.tree.leaves(whole[parameter.names[0]]), strict=True)
        for leaf, expected in leaves:
            assert_shards_equal(leaf, expected, f"{parameter.names[0]} {parameter.sharding}")


def stored_itemsize(path: Path) -> int:
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    sizes = {{"F32": 4, "BF16": 2, "F16": 2}[entry["dtype"]] for key, entry in header.items() if key[0] != "_"}
    (size,) = sizes
    return size


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama", "tensor=2"),
        ("llama", "pipe=3,tensor=2"),
        ("qwen3_moe", "expert=2,tensor=2"),
        ("mixtral", "pipe=2,data=2"),
        ("gpt_oss_awkward", "tensor=2"),
        ("gemma2", "data=2,context=2,tensor=2"),
    ],
)
def test_stages_and_padding(name: str, mesh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the engine places parameters."""
    config, _, whole = golden(name)
    devices = mesh_of(config, EngineConfig(mesh=mesh, max_num_seqs=8))
    placed = place_parameters(config, BF16, devices)
    assert ("pipe" in mesh) == any(parameter.stacked for parameter in placed)
    for limit in (64, 1 << 20):  # shards one by one, and together
        monkeypatch.setattr(shard_reads, "READ_AHEAD_BYTES", limit)
        with counted_reads(monkeypatch) as reads:
            loaded = load_parameters(GOLDENS / name, config, BF16, placed=placed)
        assert sum(reads) == region_bytes(list(placed), config, stored_itemsize(GOLDENS / name / "model.safetensors"))
        for parameter, array in taken_apart(placed, loaded):
            assert_shards_equal(array, expected_whole(parameter, whole), str(parameter.names))


def test_a_vocabulary_that_does_not_divide_is_filled_up_with_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to devices that hold nothing else, which read nothing."""
    config, specs, whole = golden("llama")
    name = next(key for key, spec in specs.items() if spec.axes[0] == "vocab")
    spec = specs[name]
    sharding = NamedSharding(jax.make_mesh((8,), ("all",)), Spec("all"))
    rows = spec.shape[0]
    padded = PlacedParameter((name,), spec, False, (2 * rows - rows % 8 + 8, *spec.shape[1:]), sharding)
    with counted_reads(monkeypatch) as reads:
        (array,) = load_parameters(GOLDENS / "llama", config, BF16, placed=[padded])
    assert_shards_equal(array, expected_whole(padded, whole), name)
    assert not np.asarray(array)[rows:].any() and np.asarray(array)[rows - 1].any()
    assert sum(reads) == math.prod(spec.shape) * stored_itemsize(GOLDENS / "llama" / "model.safetensors")


@pytest.mark.parametrize("chunk_bytes", [48, 1 << 20])
def test_whole_rows_are_read_at_once_for_all_that_share_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    """Columns over eight devices that are all here: a read for each chunk of rows, not for each row and device."""
    monkeypatch.setattr(dense_tensors, "CHUNK_BYTES", chunk_bytes)
    config, specs, tensors = random_llama(tmp_path)
    name = "layers.0.mlp.down.weight"
    placed = [p for p in placed_by(specs, divided(8)) if p.names == (name,)]
    with counted_reads(monkeypatch) as reads:
        (array,) = load_parameters(tmp_path, config, F32, placed=placed)
    weight = tensors[name]
    assert_shards_equal(array, weight, name)
    rows_per_read = max(1, chunk_bytes // weight[0].nbytes)
    assert len(reads) == -(-weight.shape[0] // rows_per_read)
    with counted_reads(monkeypatch) as reads:
        (array,) = load_parameters(tmp_path, config, F32, placed=[half(placed[0])])
    assert sum(reads) == weight.nbytes


def test_no_whole_weight_is_in_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor more of a weight's shards at once than are read ahead."""
    config, specs, _ = random_llama(tmp_path)
    sizes: list[int] = []
    allocate = shard_reads.aligned_empty

    def recorded(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        sizes.append(math.prod(shape) * dtype.itemsize)
        return allocate(shape, dtype)

    monkeypatch.setattr(shard_reads, "aligned_empty", recorded)
    monkeypatch.setattr(shard_reads, "READ_AHEAD_BYTES", 3000)
    weights = {name: spec for name, spec in specs.items() if len(spec.shape) == 2}
    largest = max(4 * math.prod(spec.shape) for spec in weights.values())
    for parts in ((8, 1), (1, 8), (2, 4)):
        sizes.clear()
        placed = placed_by(weights, divided(*parts))
        load_parameters(tmp_path, config, F32, placed=placed)
        assert max(sizes) == largest // 8 and len(sizes) == 8 * len(weights)
        reads = shard_reads.planned(placed)
        assert max(read.num_bytes for read in reads) <= max(3000, largest // 8)


def half(parameter: PlacedParameter) -> PlacedParameter:
    """Split in two along the inputs."""
    sharding = NamedSharding(jax.make_mesh((2,), ("two",), devices=jax.devices()[:2]), Spec(None, "two"))
    return PlacedParameter(parameter.names, parameter.spec, False, parameter.shape, sharding, 2)


def random_llama(directory: Path) -> tuple[ModelConfig, dict[str, ParameterSpec], dict[str, np.ndarray]]:
    """A float32 model, and its tensors by our names."""
    (directory / "config.json").write_text(json.dumps(CONFIG))
    config = load_config(directory)
    specs = abstract_parameters(config, F32)
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=spec.shape).astype(np.float32) for name, spec in specs.items()}
    write_tensors(
        directory / "model.safetensors", {weight_source(config, name).name: array for name, array in tensors.items()}
    )
    return config, specs, tensors


def test_progress_is_of_the_bytes_that_are_read(tmp_path: Path) -> None:
    config, specs, tensors = random_llama(tmp_path)
    calls: list[tuple[str, int, int]] = []
    placed = placed_by(specs, divided(2, 4))
    load_parameters(tmp_path, config, F32, placed=placed, progress=lambda *call: calls.append(call))
    assert len(calls) == len(specs)
    assert calls[-1][1] == calls[-1][2] == sum(array.nbytes for array in tensors.values())
    assert [done for _, done, _ in calls] == sorted({done for _, done, _ in calls})


def test_one_device_that_is_not_the_first(tmp_path: Path) -> None:
    config, specs, tensors = random_llama(tmp_path)
    device = jax.devices()[5]
    alone = jax.sharding.SingleDeviceSharding(device)
    placed = [PlacedParameter((name,), spec, False, spec.shape, alone) for name, spec in specs.items()]
    for array, expected in zip(load_parameters(tmp_path, config, F32, placed=placed), tensors.values(), strict=True):
        assert array.devices() == {device}
        np.testing.assert_array_equal(np.asarray(array), expected)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    """The file ends while it is read, after its header was found right."""
    config, specs, _ = random_llama(tmp_path)
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    find = os.fstat

    class Longer:
        st_size = size

    path.write_bytes(path.read_bytes()[:-100])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fstat", lambda descriptor: Longer)
        with pytest.raises(CheckpointError, match=r"tensor '.*' in .*model\.safetensors is truncated: the file ended"):
            load_parameters(tmp_path, config, F32, placed=placed_by(specs, divided(2, 4)))
    assert os.fstat is find


# ---- quantized weights


def values_of(weight: QuantizedTensor) -> np.ndarray:
    """f32[..., out, in]: the weight that it stands for, without jax: compiling for each shape would take minutes."""
    values = np.asarray(weight.values)
    if weight.pack_block is not None:
        blocks = values.reshape(*values.shape[:-1], -1, weight.pack_block // 2)
        signed = np.stack([blocks & 15, blocks >> 4], axis=-2).astype(np.int8)
        values = (((signed + 8) & 15) - 8).reshape(*values.shape[:-1], -1)
    scales, zeros = (
        0.0 if leaf is None else np.repeat(np.asarray(leaf, np.float32).swapaxes(-1, -2), weight.group_size, axis=-1)
        for leaf in (weight.scales, weight.zeros)
    )
    return (values.astype(np.float32) - zeros) * scales


def load_both(
    directory: Path, split: Split
) -> Iterator[tuple[PlacedParameter, QuantizedTensor, QuantizedTensor, np.ndarray]]:
    """Every quantized weight: its placement, split and whole, and f32[..., out, in] of the whole."""
    config = load_config(directory)
    specs = {name: spec for name, spec in abstract_parameters(config, BF16).items() if spec.format is not None}
    placed = placed_by(specs, split)
    everything = dict(zip(abstract_parameters(config, BF16), load_parameters(directory, config, BF16), strict=True))
    for parameter, weight in zip(placed, load_parameters(directory, config, BF16, placed=placed), strict=True):
        unsplit = everything[parameter.names[0]]
        yield parameter, weight, unsplit, values_of(unsplit)


def local_parts(weight: QuantizedTensor) -> Iterator[tuple[tuple[slice, ...], QuantizedTensor]]:
    """What each device holds, as a tensor of its own, and where its values lie in the whole's."""
    leaves, structure = jax.tree.flatten(weight)
    for shards in zip(*(sorted(leaf.addressable_shards, key=lambda s: s.device.id) for leaf in leaves), strict=True):
        part = jax.tree.unflatten(structure, [np.asarray(shard.data) for shard in shards])
        part.check()
        yield shards[0].index, part


def assert_parts_equal(parameter: PlacedParameter, weight: QuantizedTensor, values: np.ndarray) -> None:
    assert weight.shape == parameter.shape and weight.format.split("/")[0] != "bfloat16"
    np.testing.assert_array_equal(values_of(weight), values, err_msg=parameter.names[0])
    for index, part in local_parts(weight):
        per_value = 2 if weight.dtype == "int4" else 1
        *others, inputs = (part.indices(size)[:2] for part, size in zip(index, weight.values.shape, strict=True))
        region = (*(slice(*bounds) for bounds in others), slice(*(per_value * bound for bound in inputs)))
        np.testing.assert_array_equal(values_of(part), values[region], err_msg=parameter.names[0])


@pytest.mark.parametrize("parts", [(4, 1), (1, 4), (2, 2)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_device_has_a_quantized_weight_of_its_own(tmp_path: Path, scheme: str, parts: tuple[int, int]) -> None:
    """Valid by itself, and the same values as that part of the whole; also where groups allow fewer shards."""
    write_model(tmp_path, SCHEMES[scheme].config, SCHEMES[scheme].write)
    num_split = 0
    for parameter, weight, unsplit, values in load_both(tmp_path, divided(*parts)):
        assert_parts_equal(parameter, weight, values)
        assert weight.format == unsplit.format
        num_split += parameter.in_shards > 1
    assert num_split >= 8 or parts[1] == 1


@pytest.mark.parametrize("mesh", ["pipe=2", "tensor=2", "tensor=4"])
@pytest.mark.parametrize("scheme", ["awq", "packed int4 zero points", "w8a8 int8"])
def test_quantized_layers_as_the_engine_places_them(tmp_path: Path, scheme: str, mesh: str) -> None:
    """On four devices each of the two K/V heads is on two. Where inputs are split, nibbles lie otherwise: see above."""
    write_model(
        tmp_path,
        SCHEMES[scheme].config,
        SCHEMES[scheme].write,
        hidden_size=128,
        intermediate_size=128,
        num_attention_heads=8,
    )
    config = load_config(tmp_path)
    placed = place_parameters(config, BF16, mesh_of(config, EngineConfig(mesh=mesh, max_num_seqs=8)))
    assert any(len(parameter.parts) == 3 and parameter.spec.format is not None for parameter in placed)
    everything = dict(zip(abstract_parameters(config, BF16), load_parameters(tmp_path, config, BF16), strict=True))
    for parameter, array in taken_apart(placed, load_parameters(tmp_path, config, BF16, placed=placed)):
        if parameter.in_shards > 1 and parameter.spec.format is not None and parameter.spec.format.dtype == "int4":
            continue
        parts = [jax.tree.leaves(everything[name]) for name in parameter.names]
        for leaf, *own in zip(jax.tree.leaves(array), *parts, strict=True):
            expected = np.stack(own) if parameter.stacked else np.asarray(own[0])
            assert_shards_equal(leaf, expected, str(parameter.names))


@pytest.mark.parametrize("parts", [(2, 1, 2), (2, 2, 1), (4, 1, 1)], ids=str)
@pytest.mark.parametrize("scheme", ["gptq", "w8a8 int8", "packed int4", "fp8 blocks"])
def test_experts_are_split(tmp_path: Path, scheme: str, parts: tuple[int, ...]) -> None:
    write_mixtral(tmp_path, scheme)
    for parameter, weight, _, values in load_both(tmp_path, divided(*parts)):
        assert_parts_equal(parameter, weight, values)


@pytest.mark.parametrize(("scheme", "inputs_first"), [("w8a8 int8", False), ("packed int4", False), ("gptq", True)])
def test_what_a_device_does_not_hold_of_a_quantized_weight_is_not_read_where_it_is_stored_by_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, inputs_first: bool
) -> None:
    """Half the outputs: half the bytes; a layout that runs along inputs is read whole."""
    write_model(tmp_path, SCHEMES[scheme].config, SCHEMES[scheme].write)
    config = load_config(tmp_path)
    name = "layers.0.mlp.up.weight"
    spec = abstract_parameters(config, BF16)[name]
    counts = []
    for rows in (spec.shape[0], spec.shape[0] // 2):
        shape = (rows, spec.shape[1])
        with ExitStack() as files, counted_reads(monkeypatch) as reads:
            stored = open_checkpoint(tmp_path, config, abstract_parameters(config, BF16), files)
            (job,) = stored[name].jobs([Target(whole(shape), empty(spec.format, shape))])
            job()
        counts.append(sum(reads))
    assert counts[1] == counts[0] if inputs_first else counts[1] <= 0.5 * counts[0] + 16  # weight_shape's


@pytest.mark.parametrize(
    "scheme", ["packed int4 zero points", "packed int8", "fp8 blocks", "int8 per tensor", "int8 zero points", "awq"]
)
def test_any_outputs_of_a_quantized_weight(tmp_path: Path, scheme: str) -> None:
    """Also where they begin inside of a block of outputs that share a scale, or of a word of zero points."""
    write_model(tmp_path, SCHEMES[scheme].config, SCHEMES[scheme].write)
    config, name = load_config(tmp_path), "layers.1.mlp.gate.weight"
    specs = abstract_parameters(config, BF16)
    values = values_of(dict(zip(specs, load_parameters(tmp_path, config, BF16), strict=True))[name])
    size = specs[name].shape[1]
    with ExitStack() as files:
        stored = open_checkpoint(tmp_path, config, specs, files)[name]
        for start, stop in ((8, 24), (24, 72), (56, 96)) if scheme == "awq" else ((1, 2), (13, 71), (50, 96)):
            target = Target((slice(start, stop), slice(0, size)), empty(specs[name].format, (stop - start, size)))
            (job,) = stored.jobs([target])
            job()
            np.testing.assert_array_equal(values_of(target.into), values[start:stop])


def empty(held: WeightFormat | None, shape: tuple[int, ...]) -> QuantizedTensor:
    """Of NumPy arrays to be filled."""
    assert held is not None
    return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract_weight(held, shape))


def test_groups_that_do_not_divide_over_the_shards_are_named(tmp_path: Path) -> None:
    write_model(tmp_path, GPTQ, gptq())
    config = load_config(tmp_path)
    name = "layers.0.mlp.down.weight"
    spec = abstract_parameters(config, BF16)[name]
    placed = PlacedParameter((name,), spec, False, spec.shape, sharded((1, 2)), 2)
    with pytest.raises(
        ConfigError, match=r"weight \[64, 96\] cannot be split over 2 devices .* its 3 groups of 32 do not .* do: 1, 3$"
    ):
        load_parameters(tmp_path, config, BF16, placed=[placed])


@pytest.mark.parametrize(
    ("held", "shape", "in_shards", "block"),
    [
        (WeightFormat("int4"), (8, 96), 1, 32),
        (WeightFormat("int4"), (8, 96), 4, 8),
        (WeightFormat("int4", 32), (8, 1024), 2, 256),
        (WeightFormat("int8"), (8, 96), 3, None),
    ],
)
def test_nibbles_are_packed_for_the_shards(
    held: WeightFormat, shape: tuple[int, int], in_shards: int, block: int | None
) -> None:
    assert abstract_weight(held, shape, in_shards=in_shards).pack_block == block


@pytest.mark.parametrize(
    ("held", "shape", "in_shards", "message"),
    [
        (
            WeightFormat("int4"),
            (8, 90),
            6,
            r"\[8, 90\] cannot be split over 6 .* inputs, by whole bytes, do not .* 1, 3, 5, 9, 15, 45$",
        ),
        (WeightFormat("int8"), (8, 90), 4, r"over 4 devices along its inputs: its inputs.* counts that do: 1, 2, 3, 5"),
        (WeightFormat("int8", 32), (8, 96), 2, r"its 3 groups of 32 do not divide; counts that do: 1, 3$"),
    ],
)
def test_inputs_that_cannot_be_split_are_named(
    held: WeightFormat, shape: tuple[int, int], in_shards: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        abstract_weight(held, shape, in_shards=in_shards)


def test_packed_words_are_not_cut(tmp_path: Path) -> None:
    """GPTQ packs eight inputs in a word; AWQ eight outputs."""
    for quantization, write, parts, message in (
        (
            GPTQ | {"group_size": -1},
            gptq(group_size=-1),
            (1, 16),
            r"'.*q_proj\.qweight' in .* is split: inputs 0 to 4 ",
        ),
        (AWQ, awq, (16, 1), r"'.*q_proj\.qweight' in .* is fused or split: outputs 0 to 4 by 1 are not whole words"),
    ):
        write_model(tmp_path, quantization, write)
        config = load_config(tmp_path)
        specs = abstract_parameters(config, BF16)
        name = "layers.0.attention.q.weight"
        spec = specs[name]
        shape = tuple(size // count for size, count in zip(spec.shape, parts, strict=True))
        with ExitStack() as files, pytest.raises(CheckpointError, match=message):
            stored = open_checkpoint(tmp_path, config, specs, files)
            (job,) = stored[name].jobs([Target(whole(shape), empty(spec.format, shape))])
            job()


# ---- several processes


TWO_PROCESSES = """
import json, os, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
directory, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, index)
import numpy as np
from jaxinfer.config import EngineConfig
from jaxinfer.models import load_config
from jaxinfer.models.checkpoint import load_parameters
from jaxinfer.placement import mesh_of, place_parameters
sys.path.insert(0, "tests")
from placed_shards import taken_apart
preadv, reads = os.preadv, []
os.preadv = lambda *args: reads.append(preadv(*args)) or reads[-1]
config = load_config(directory)
placed = place_parameters(config, np.dtype("float32"), mesh_of(config, EngineConfig(mesh="tensor=8", max_num_seqs=8)))
loaded = load_parameters(directory, config, np.dtype("float32"), placed=placed)
held = {
    (parameter.names[0], str(shard.index)): float(np.asarray(shard.data, np.float64).sum())
    for parameter, array in taken_apart(placed, loaded) for shard in array.addressable_shards
}
sizes = {
    (parameter.names[0], str(shard.index)): shard.data.nbytes
    for parameter, array in taken_apart(placed, loaded) for shard in array.addressable_shards
}
print(json.dumps({"read": sum(reads), "held": sum(sizes.values()), "sums": sorted((*k, v) for k, v in held.items())}))
"""


def test_two_processes_read_their_own_halves(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_attention_heads": 8, "num_key_value_heads": 8}))
    config = load_config(tmp_path)
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in stored_shapes(config).items()}
    write_tensors(tmp_path / "model.safetensors", tensors)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(tmp_path), port, str(index)],
            cwd=repository,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    results = [json.loads(child.communicate(timeout=240)[0].splitlines()[-1]) for child in children]
    total = sum(array.nbytes for array in tensors.values())
    for result in results:
        assert result["read"] == result["held"] < 0.6 * total
    ours = {weight_source(config, name).name: name for name in abstract_parameters(config, F32)}
    whole = {ours[name]: array for name, array in tensors.items()}
    assert {tuple(entry[:2]) for entry in results[0]["sums"]} != {tuple(entry[:2]) for entry in results[1]["sums"]}
    for result in results:
        for name, index, total_of_shard in result["sums"]:
            part = whole[name][eval(index, {"slice": slice})]  # an index that the child printed
            np.testing.assert_allclose(part.sum(dtype=np.float64), total_of_shard, rtol=1e-6, atol=1e-6)
