"""Orbax checkpoints: what convert writes is what was read, on any mesh; defects are named; nothing half done loads."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as orbax
import pytest
import tensorstore
from orbax.checkpoint.experimental import v1 as orbax_v1
from placed_shards import SPLITS, assert_shards_equal, divided, placed_by
from quantized_files import SCHEMES, write_mixtral, write_model
from tensor_files import write_raw, write_tensors

from jaxinfer.config import ConfigError, EngineConfig
from jaxinfer.models import conversion, load_config, orbax_files, weight_source
from jaxinfer.models.checkpoint import CheckpointError, load_parameters
from jaxinfer.models.conversion import Converted, convert
from jaxinfer.models.transformer import abstract_parameters
from jaxinfer.placement import mesh_of, place_parameters

GOLDENS = Path(__file__).parent.parent / "goldens"
F32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
}


def assert_same(ours: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    """Bit for bit, and of the same kind."""
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def load(directory: Path, dtype: Any = BF16, **options: Any) -> tuple[Any, ...]:
    return load_parameters(directory, load_config(directory), dtype, **options)


def random_llama(directory: Path, **fields: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(LLAMA | fields))
    config, rng = load_config(directory), np.random.default_rng(0)
    tensors = {
        weight_source(config, name).name: rng.normal(size=spec.shape).astype(np.float32)
        for name, spec in abstract_parameters(config, F32).items()
    }
    tensors["model.layers.0.mlp.up_proj.weight"][:200] = 0  # chunks of nothing but zeros are stored, too
    write_tensors(directory / "model.safetensors", tensors)
    return directory


# ---- what was read is what is loaded


@pytest.mark.parametrize("name", ["llama", "gemma3n", "gemma4_awkward", "gpt_oss", "gpt_oss_awkward", "qwen3_moe"])
def test_goldens(tmp_path: Path, name: str) -> None:
    converted = convert(GOLDENS / name, tmp_path / "out", BF16)
    direct, ours = load(GOLDENS / name), load(tmp_path / "out")
    assert_same(ours, direct)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(direct))
    assert converted == Converted(len(direct), num_bytes)
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (GOLDENS / name / file).read_bytes()
    assert_shards(tmp_path / "out", direct)


def assert_shards(directory: Path, whole: tuple[Any, ...]) -> None:
    """Under every split at once."""
    config = load_config(directory)
    specs = abstract_parameters(config, BF16)
    by_name = dict(zip(specs, whole, strict=True))
    placed = [parameter for split in SPLITS.values() for parameter in placed_by(specs, split)]
    for parameter, array in zip(placed, load_parameters(directory, config, BF16, placed=placed), strict=True):
        what = f"{parameter.names[0]} {parameter.sharding}"
        expected = by_name[parameter.names[0]]
        if getattr(array, "pack_block", None) != getattr(expected, "pack_block", None):
            continue  # packed for its shards: compared below
        for leaf, own in zip(jax.tree.leaves(array), jax.tree.leaves(expected), strict=True):
            assert_shards_equal(leaf, np.asarray(own), what)


@pytest.mark.parametrize("scheme", ["gptq zero points", "gptq one group", "w8a8 int8", "w8a8 fp8", "fp8 blocks"])
def test_quantized_weights(tmp_path: Path, scheme: str) -> None:
    """On one device, and split in ways for which nibbles are packed anew: as directly from the Hugging Face files."""
    source = tmp_path / "source"
    source.mkdir()
    write_model(source, SCHEMES[scheme].config, SCHEMES[scheme].write)
    convert(source, tmp_path / "out", BF16)
    assert_same(load(tmp_path / "out"), load(source))
    specs = abstract_parameters(load_config(source), BF16)
    repacked = 0
    for parts in ((4, 1), (1, 2), (2, 3), (1, 4)):
        placed = placed_by(specs, divided(*parts))
        direct, ours = load(source, placed=placed), load(tmp_path / "out", placed=placed)
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(direct), strict=True):
            assert_shards_equal(one, np.asarray(other), scheme)
        blocks = [getattr(weight, "pack_block", None) for weight in ours]
        assert blocks == [getattr(weight, "pack_block", None) for weight in direct]
        repacked += blocks != [getattr(weight, "pack_block", None) for weight in load(source)]
    assert bool(repacked) == scheme.startswith("gptq")


def test_quantized_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orbax_files, "READ_BYTES", 600)  # a few rows of nibbles
    source = tmp_path / "source"
    source.mkdir()
    write_mixtral(source, "packed int4")
    convert(source, tmp_path / "out", BF16)
    assert_same(load(tmp_path / "out"), load(source))
    placed = placed_by(abstract_parameters(load_config(source), BF16), divided(2, 1, 2))
    for one, other in zip(load(tmp_path / "out", placed=placed), load(source, placed=placed), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(("saved", "wanted"), [(F32, BF16), (BF16, F32), (F32, F32)])
def test_dtypes_are_converted(tmp_path: Path, saved: Any, wanted: Any) -> None:
    """As from safetensors: rounded once, or widened; what was rounded stays so."""
    source = random_llama(tmp_path / "source")
    convert(source, tmp_path / "out", saved)
    expected = load(source, BF16 if BF16 in (saved, wanted) else F32)
    assert_same(load(tmp_path / "out", wanted), tuple(array.astype(wanted) for array in expected))
    convert(tmp_path / "out", tmp_path / "again", wanted)
    assert_same(load(tmp_path / "again", wanted), load(tmp_path / "out", wanted))


@pytest.mark.parametrize("mesh", ["pipe=2,tensor=2", "data=2,context=2,tensor=2", "tensor=4"])
def test_the_engines_placements(tmp_path: Path, mesh: str) -> None:
    source = random_llama(tmp_path / "source", vocab_size=1021)  # padded
    convert(source, tmp_path / "out", BF16)
    config = load_config(source)
    placed = place_parameters(config, BF16, mesh_of(config, EngineConfig(mesh=mesh, max_num_seqs=8)))
    assert_same(load(tmp_path / "out", placed=placed), load(source, placed=placed))


@pytest.mark.parametrize("settings", [{}, {"use_zarr3": True}, {"use_ocdbt": False}], ids=str)
def test_checkpoints_that_orbax_saved_from_a_mesh(tmp_path: Path, settings: dict[str, Any]) -> None:
    """By its older interface, in any of its storage formats, nested by the dots of our names."""
    source = random_llama(tmp_path / "source")
    config = load_config(source)
    specs = abstract_parameters(config, F32)
    split = load(source, F32, placed=placed_by(specs, divided(2, 4)))
    tree: dict[str, Any] = {}
    for name, array in zip(specs, split, strict=True):
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = array
    (tmp_path / "out").mkdir()
    shutil.copy(source / "config.json", tmp_path / "out")
    handler = orbax.PyTreeCheckpointHandler(**settings)
    orbax.Checkpointer(handler).save(tmp_path / "out" / "orbax", args=orbax.args.PyTreeSave(tree))
    assert_same(load(tmp_path / "out", F32), load(source, F32))
    placed = placed_by(specs, divided(8, 1))
    assert_same(load(tmp_path / "out", F32, placed=placed), load(source, F32, placed=placed))


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_orbax_itself_reads_what_was_written(tmp_path: Path) -> None:
    """A tree of logical names; a quantized weight is a dict of its arrays."""
    source = tmp_path / "source"
    source.mkdir()
    write_model(source, SCHEMES["awq"].config, SCHEMES["awq"].write)
    convert(source, tmp_path / "out", BF16)
    tree = orbax_v1.load(tmp_path / "out" / "orbax")
    for name, expected in zip(abstract_parameters(load_config(source), BF16), load(source), strict=True):
        found = tree.pop(name)
        if isinstance(found, dict):
            assert set(found) == {"values", "scales", "zeros"}
            found = tuple(found[field] for field in ("values", "scales", "zeros"))
        assert_same(tuple(jax.tree.leaves(found)), tuple(jax.tree.leaves(expected)))
    assert not tree


def test_a_model_is_written_in_batches_and_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a region is not read by reading the array."""
    monkeypatch.setattr(conversion, "BATCH_BYTES", 3_000_000)
    source = random_llama(tmp_path / "source", vocab_size=8192)
    calls: list[tuple[str, int, int]] = []
    convert(source, tmp_path / "out", F32, progress=lambda *call: calls.append(call))
    assert [done for _, done, _ in calls] == sorted({done for _, done, _ in calls}) and calls[-1][1] == calls[-1][2]
    batches = list((tmp_path / "out" / "orbax" / "state").glob("ocdbt.process_*"))
    assert len(batches) >= 3
    specs = abstract_parameters(load_config(source), F32)
    spec = specs["embed.weight"]
    (parameter,) = [p for p in placed_by(specs, divided(8, 1)) if p.names == ("embed.weight",)]
    whole_bytes = 4 * spec.shape[0] * spec.shape[1]
    before = bytes_read()
    (array,) = load(tmp_path / "out", F32, placed=[parameter])
    assert bytes_read() - before < 1.1 * whole_bytes + 100_000  # all devices are here: each chunk once
    one = orbax_files.open_orbax(tmp_path / "out" / "orbax", specs)["embed.weight"]
    into, region = np.empty((1024, 256), np.float32), (slice(2048, 3072), slice(0, 256))
    before = bytes_read()
    for job in one.jobs([orbax_files.Target(region, into)]):
        job()
    assert bytes_read() - before < 0.2 * whole_bytes
    np.testing.assert_array_equal(into, np.asarray(array)[region])


def bytes_read() -> int:
    """By tensorstore, from files."""
    found = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in found for value in metric["values"])


def test_other_files_are_copied(tmp_path: Path, shipped_model: Path) -> None:
    source = random_llama(tmp_path / "source")
    files = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
        "special_tokens_map.json": "{}",
        "LICENSE.txt": "as you like",
    }
    for name, text in (files | {"pytorch_model.bin": "x", "model.safetensors.bak": "x"}).items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    convert(source, tmp_path / "out", BF16)
    there = {
        path.relative_to(tmp_path / "out").as_posix(): path
        for path in (tmp_path / "out").rglob("*")
        if path.is_file() and "orbax" not in path.parts
    }
    assert set(there) == {*files, "config.json"}
    assert all(there[name].read_text() == text for name, text in files.items())


# ---- what does not load


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("orbax")
    convert(random_llama(directory / "source"), directory / "out", F32)
    return directory / "out"


def state(directory: Path) -> Path:
    return directory / "orbax" / "state"


def data_files(directory: Path) -> Iterator[Path]:
    """Those with the arrays' bytes, largest first."""
    return iter(sorted(state(directory).glob("ocdbt.process_*/d/*"), key=lambda path: -path.stat().st_size))


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_config(**fields: Any) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / "config.json", lambda config: config.update(fields))


def edit_names(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    return lambda directory: edit_json(
        state(directory) / "_METADATA", lambda metadata: change(metadata["tree_metadata"])
    )


def add_name(names: dict[str, Any]) -> None:
    names["('extra',)"] = {"key_metadata": [{"key": "extra", "key_type": 2}]}


def drop_chunk(directory: Path) -> None:
    """One that an array has by its own metadata, from the index."""
    base = {"driver": "file", "path": f"{state(directory)}/"}
    index = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    names = [key for key in index.list().result() if key.startswith(b"embed.weight/c/")]
    index.write(names[-1], None).result()


DEFECTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another width": (
        edit_config(intermediate_size=256),
        r"array 'layers\.0\.mlp\..*' in .*orbax/state has shape \[.*512.*\]; config\.json makes it \[.*256.*\]",
    ),
    "more layers": (edit_config(num_hidden_layers=3), r"missing arrays: layers\.2\..* and 4 more$"),
    "fewer layers": (edit_config(num_hidden_layers=1), r"unknown arrays: layers\.1\..* and 4 more$"),
    "tied": (edit_config(tie_word_embeddings=True), r"unknown arrays: unembedding\.weight$"),
    "an array too many": (edit_names(add_name), r"does not hold the model of config\.json; unknown arrays: extra$"),
    "a name that is not there": (
        edit_names(lambda names: names.pop("('norm.weight',)")),
        r"missing arrays: norm\.weight$",
    ),
    "other metadata": (edit_names(lambda names: names.update(x=3)), r"has a tree_metadata that is not Orbax's"),
    "no metadata": (
        lambda d: (state(d) / "_METADATA").unlink(),
        r"is no finished Orbax checkpoint: it has no _METADATA",
    ),
    "broken metadata": (lambda d: (state(d) / "_METADATA").write_text("{"), r"_METADATA cannot be read as JSON"),
    "a list": (lambda d: (state(d) / "_METADATA").write_text("[]"), r"_METADATA has no tree_metadata"),
    "no index": (lambda d: (state(d) / "manifest.ocdbt").unlink(), r"array '.*' in .* cannot be opened: "),
    "truncated index": (
        lambda d: (state(d) / "manifest.ocdbt").write_bytes((state(d) / "manifest.ocdbt").read_bytes()[:-9]),
        r"array '.*' in .* cannot be opened: ",
    ),
    "no data": (lambda d: next(data_files(d)).unlink(), r"array '.*' in .* cannot be (opened|read): "),
    "truncated data": (
        lambda d: os.truncate(next(data_files(d)), next(data_files(d)).stat().st_size // 2),
        r"array '.*' in .* cannot be (opened|read): ",
    ),
    "a chunk that is not there": (drop_chunk, r"array 'embed\.weight' in .* cannot be read: "),
    "empty": (lambda d: (shutil.rmtree(d / "orbax"), (d / "orbax").mkdir()), r"is no finished Orbax checkpoint"),
    "both formats": (
        lambda d: (d / "model.safetensors").write_bytes(b""),
        r"holds both an Orbax checkpoint, orbax, and model\.safetensors: remove one",
    ),
    "quantized": (
        edit_config(quantization_config=SCHEMES["w8a8 int8"].config),
        r"missing arrays: layers\.0\.attention\.\w\.weight\.values, .*; unknown arrays: layers\.0\.attention",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_named(tmp_path: Path, converted: Path, defect: str) -> None:
    edit, message = DEFECTS[defect]
    shutil.copytree(converted, tmp_path / "model")
    edit(tmp_path / "model")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "model")


def test_another_dtype_of_a_quantized_weight_is_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_model(source, SCHEMES["packed int8"].config, SCHEMES["packed int8"].write)
    convert(source, tmp_path / "out", BF16)
    edit_json(tmp_path / "out" / "config.json", lambda c: c.update(quantization_config=SCHEMES["w8a8 fp8"].config))
    with pytest.raises(CheckpointError, match=r"array '.*\.values' in .* is int8; supported: float8_e4m3fn$"):
        load(tmp_path / "out")


def test_truncation_anywhere_is_an_error(tmp_path: Path, converted: Path) -> None:
    """Of the files that are needed: Orbax leaves some that no array lies in."""
    expected = load(converted)
    files = [path.relative_to(converted) for path in state(converted).rglob("*") if path.is_file()]
    failed = 0
    for file in files:
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(converted, tmp_path / "model")
        path = tmp_path / "model" / file
        os.truncate(path, path.stat().st_size * 3 // 4)
        try:
            assert_same(load(tmp_path / "model"), expected)
        except CheckpointError:
            failed += 1
    assert failed >= 3


# ---- converting


def test_places_that_will_not_do(tmp_path: Path) -> None:
    source = random_llama(tmp_path / "source")
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for out, message in (
        (tmp_path / "there", "there exists; name a directory that does not"),
        (tmp_path / "link", "link exists"),
        (tmp_path / "no" / "out", r"no, in which out would be, is not a directory"),
        (source / "out", "would lie inside the model directory"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert(source, out, BF16)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "there", "link"}
    assert {path.name for path in source.iterdir()} == {"config.json", "model.safetensors"}


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    source = random_llama(tmp_path / "source")
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        convert(source, tmp_path / "out", BF16)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


PEAK = """
import sys
import jax, jax.numpy as jnp
from jaxinfer.models import conversion, shard_reads
conversion.BATCH_BYTES = shard_reads.READ_AHEAD_BYTES = 16_000_000
def status_bytes(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) * 1024
source, out, first = sys.argv[1:]
conversion.convert(first, out + "-first", jnp.dtype("float32"))  # imports, and what Orbax keeps
before = status_bytes("VmRSS")
converted = conversion.convert(source, out, jnp.dtype("float32"))
print(status_bytes("VmHWM") - before, converted.num_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_a_batch_and_what_is_read_ahead(tmp_path: Path, repository: Path) -> None:
    source, small = tmp_path / "source", random_llama(tmp_path / "small")
    source.mkdir()
    fields = {"vocab_size": 4000, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 8}
    (source / "config.json").write_text(json.dumps(LLAMA | fields))
    write_zeros(source)
    run = subprocess.run(
        [sys.executable, "-c", PEAK, source, tmp_path / "out", small],
        check=True,
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=240,
    )
    peak_bytes, model_bytes = map(int, run.stdout.split())
    print(f"peak {peak_bytes / 1e6:.0f} MB of a model of {model_bytes / 1e6:.0f} MB")
    assert model_bytes > 300e6
    assert peak_bytes < 130e6
    shutil.rmtree(tmp_path / "out")


def write_zeros(directory: Path) -> None:
    """A model.safetensors of the directory's config.json, as a sparse file."""
    config, header, end = load_config(directory), {}, 0
    for name, spec in abstract_parameters(config, F32).items():
        begin, end = end, end + 4 * math.prod(spec.shape)
        header[weight_source(config, name).name] = {"dtype": "F32", "shape": spec.shape, "data_offsets": [begin, end]}
    path = directory / "model.safetensors"
    write_raw(path, header, b"")
    os.truncate(path, path.stat().st_size + end)


KILLED = """
import signal, sys, time
import jax.numpy as jnp
from jaxinfer.models import conversion
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is born ignoring it
conversion.BATCH_BYTES = 100_000
def wait(name, done, total):
    if done > total / 2:
        print("half", flush=True)
        time.sleep(600)
conversion.convert(sys.argv[1], sys.argv[2], jnp.dtype("bfloat16"), progress=wait)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_leaves_nothing_that_loads(tmp_path: Path, repository: Path, how: signal.Signals) -> None:
    source, out = random_llama(tmp_path / "source"), tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", KILLED, str(source), str(out)],
        cwd=repository,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "half\n"
    child.send_signal(how)
    try:
        assert child.wait(timeout=60) != 0
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGABRT)  # says where every thread is
        raise
    child.stdout.close()
    left = [path for path in tmp_path.iterdir() if path != source]
    assert out not in left and len(left) == (how == signal.SIGKILL)
    for directory in left:
        assert directory.name.startswith("out.unfinished-")
        with pytest.raises(ConfigError, match=r"config\.json does not exist"):
            load(directory)
        shutil.copy(source / "config.json", directory)  # even so
        with pytest.raises(CheckpointError):
            load(directory)
    convert(source, out, BF16)
    assert_same(load(out), load(source))
