"""Reading safetensors directories: values, order, placement, memory, and that every defect is named."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import save_file
from tensor_files import write_raw, write_tensors

from jaxinfer.config import ModelConfig
from jaxinfer.models import dense_tensors, load_config, safetensors_files, weight_source
from jaxinfer.models.checkpoint import CheckpointError, load_parameters
from jaxinfer.models.transformer import abstract_parameters

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
}
DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
F32 = jnp.dtype(jnp.float32)
K_PROJ = "model.layers.0.self_attn.k_proj.weight"
Tensors = dict[str, np.ndarray]


def model_config(directory: Path, **fields: Any) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(CONFIG | fields))
    return load_config(directory)


def random_tensors(config: ModelConfig, dtype: Any = np.float32) -> Tensors:
    """Every tensor under its Hugging Face name."""
    rng = np.random.default_rng(0)
    specs = abstract_parameters(config, F32)
    return {weight_source(config, n).name: rng.normal(size=s.shape).astype(dtype) for n, s in specs.items()}


def expected_parameters(config: ModelConfig, tensors: Tensors, dtype: Any) -> list[np.ndarray]:
    return [tensors[weight_source(config, name).name].astype(dtype) for name in abstract_parameters(config, F32)]


def write_shards(directory: Path, tensors: Tensors, num_shards: int = 2) -> dict[str, str]:
    """Shards of interleaved tensors and their index; returns its weight_map."""
    names = list(tensors)
    weight_map = {}
    for number in range(num_shards):
        file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        write_tensors(directory / file, {name: tensors[name] for name in names[number::num_shards]})
        weight_map |= dict.fromkeys(names[number::num_shards], file)
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def assert_equal(ours: tuple[jax.Array, ...], expected: list[np.ndarray]) -> None:
    assert len(ours) == len(expected)
    for array, want in zip(ours, expected, strict=True):
        assert array.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(array), want)


# ---- what is read


@pytest.mark.parametrize("target", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize("chunk_bytes", [40, 4 << 20])
def test_values_of_every_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, target: Any, chunk_bytes: int
) -> None:
    """Rounded once, to nearest even, whatever the chunks."""
    monkeypatch.setattr(dense_tensors, "CHUNK_BYTES", chunk_bytes)
    config = model_config(tmp_path)
    tensors = random_tensors(config, DTYPES[code])
    write_tensors(tmp_path / "model.safetensors", tensors)
    ours = load_parameters(tmp_path, config, jnp.dtype(target))
    assert_equal(ours, expected_parameters(config, tensors, jnp.dtype(target)))


@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_shards_and_the_safetensors_packages_own_files(tmp_path: Path, num_shards: int) -> None:
    config = model_config(tmp_path)
    tensors = random_tensors(config)
    write_shards(tmp_path, tensors, num_shards)
    expected = expected_parameters(config, tensors, np.float32)
    assert_equal(load_parameters(str(tmp_path), config, F32), expected)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "np"})
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_equal(load_parameters(tmp_path, config, F32), expected)


def test_tensors_known_not_to_matter_may_be_there(tmp_path: Path) -> None:
    config = model_config(tmp_path, tie_word_embeddings=True)
    tensors = random_tensors(config)
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
    }
    write_tensors(tmp_path / "model.safetensors", tensors | extra)
    assert_equal(load_parameters(tmp_path, config, F32), expected_parameters(config, tensors, np.float32))


def test_shipped_model_loads(shipped_model: Path) -> None:
    config = load_config(shipped_model)
    parameters = load_parameters(shipped_model, config, jnp.dtype(jnp.bfloat16))
    assert 5e6 <= sum(array.size for array in parameters) <= 10e6
    assert all(bool(jnp.isfinite(array).all()) for array in parameters)


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    config = model_config(tmp_path)
    tensors = random_tensors(config)
    write_tensors(tmp_path / "model.safetensors", tensors)
    calls: list[tuple[str, int, int]] = []
    load_parameters(tmp_path, config, jnp.dtype(jnp.bfloat16), progress=lambda *call: calls.append(call))
    total = sum(array.nbytes for array in tensors.values())
    assert {name for name, _, _ in calls} == set(tensors) and len(calls) == len(tensors)
    assert [done for _, done, _ in calls] == sorted({done for _, done, _ in calls})
    assert calls[-1][1:] == (total, total)


def test_a_file_replaced_while_serving_changes_nothing(tmp_path: Path) -> None:
    config = model_config(tmp_path)
    tensors = random_tensors(config)
    path = tmp_path / "model.safetensors"
    write_tensors(path, tensors)
    ours = load_parameters(tmp_path, config, F32)
    num_bytes = path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes(num_bytes))  # in place: a mapping of the file would see it
    assert_equal(ours, expected_parameters(config, tensors, np.float32))


# ---- what is refused


def edit_header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        header, data = read_header(path)
        change(header)
        write_raw(path, header, data)

    return edit


def edit_tensors(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        write_tensors(path, change(random_tensors(load_config(path.parent))))

    return edit


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: array for key, array in tensors.items() if key != name}


def swap_two(header: dict[str, Any]) -> None:
    """The first tensor's bytes are also claimed by k_proj."""
    begin = header["model.embed_tokens.weight"]["data_offsets"][0]
    size = math.prod(header[K_PROJ]["shape"]) * 4
    header[K_PROJ]["data_offsets"] = [begin, begin + size]


DEFECTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (edit_tensors(without(K_PROJ)), rf"missing tensors: {K_PROJ}$"),
    "unknown": (
        edit_tensors(lambda tensors: tensors | {"model.layers.0.self_attn.k_proj.bias": np.ones(4, np.float32)}),
        r"unknown tensors: model\.layers\.0\.self_attn\.k_proj\.bias \(model\.safetensors\)",
    ),
    "untied but no lm_head": (edit_tensors(without("lm_head.weight")), r"missing tensors: lm_head\.weight"),
    "transposed": (
        edit_tensors(lambda tensors: tensors | {K_PROJ: np.ones((8, 4), np.float32)}),
        rf"'{K_PROJ}' in .*model\.safetensors has shape \[8, 4\]; config\.json makes it \[4, 8\]",
    ),
    "integers": (
        edit_tensors(lambda tensors: tensors | {K_PROJ: np.ones((4, 8), np.int64)}),
        rf"'{K_PROJ}' in .*model\.safetensors is I64; supported: BF16, F16, F32",
    ),
    "wrong size": (
        edit_header(lambda header: header[K_PROJ].update(shape=[4, 7])),
        rf"'{K_PROJ}' in .* spans 128 bytes; F32 \[4, 7\] needs 112",
    ),
    "overlap": (edit_header(swap_two), r"overlaps '"),
    "hole": (edit_header(lambda header: header.pop(K_PROJ)), r"leaves a hole after '"),
    "negative": (
        edit_header(lambda header: header[K_PROJ].update(data_offsets=[-128, 0])),
        rf"'{K_PROJ}' in .* has an impossible header entry",
    ),
    "many dimensions": (
        edit_header(lambda header: header[K_PROJ].update(shape=[2**62] * 100_000)),
        rf"'{K_PROJ}' in .* has an impossible header entry: .{{,300}}; it may have 8 dimensions",
    ),
    "vast offset": (
        edit_header(lambda header: header[K_PROJ].update(data_offsets=[0, 10**4300 - 1], dtype="I64")),
        rf"'{K_PROJ}' in .* has an impossible header entry",
    ),
    "no dtype": (edit_header(lambda header: header[K_PROJ].pop("dtype")), rf"'{K_PROJ}' in .* needs dtype, shape"),
    "no object": (edit_header(lambda header: header.update({K_PROJ: 3})), rf"'{K_PROJ}' in .* needs dtype, shape"),
    "header too long": (
        lambda path: path.write_bytes(b"\xff" * 7 + b"\x00" + path.read_bytes()),
        r"model\.safetensors is truncated: \d+ bytes end before its header",
    ),
    "not JSON": (lambda path: path.write_bytes(b"\x04" + bytes(7) + b"PK\x03\x04"), r"its header is not JSON"),
    "a list": (lambda path: path.write_bytes(b"\x02" + bytes(7) + b"[]"), r"its header is not an object"),
    "twice": (
        lambda path: path.write_bytes(b"\x0d" + bytes(7) + b'{"a":1,"a":2}'),
        r"model\.safetensors .*duplicate key 'a'",
    ),
    "trailing": (lambda path: path.write_bytes(path.read_bytes() + b"xyz"), r"has 3 bytes after its last tensor"),
    "empty": (lambda path: path.write_bytes(b""), r"model\.safetensors is truncated: 0 bytes"),
    "directory": (lambda path: (path.unlink(), path.mkdir()), r"model\.safetensors is not a file"),
    "dead link": (lambda path: (path.unlink(), path.symlink_to("gone")), r"model\.safetensors is not a file"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_of_a_file_are_named(tmp_path: Path, defect: str) -> None:
    edit, message = DEFECTS[defect]
    config = model_config(tmp_path)
    path = tmp_path / "model.safetensors"
    write_tensors(path, random_tensors(config))
    edit(path)
    with pytest.raises(CheckpointError, match=message):
        load_parameters(tmp_path, config, F32)


def test_a_header_over_the_limit_is_not_read(tmp_path: Path) -> None:
    config = model_config(tmp_path)
    num_bytes = safetensors_files.MAX_HEADER_BYTES + 1
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(num_bytes.to_bytes(8, "little"))
        file.truncate(num_bytes + 8)  # sparse
    with pytest.raises(CheckpointError, match="header of 100000001 bytes; the limit is 100000000"):
        load_parameters(tmp_path, config, F32)


def test_truncation_anywhere_names_the_tensor_or_the_file(tmp_path: Path) -> None:
    config = model_config(tmp_path)
    path = tmp_path / "model.safetensors"
    write_tensors(path, random_tensors(config))
    content = path.read_bytes()
    last = max(read_header(path)[0].items(), key=lambda item: item[1]["data_offsets"])[0]
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"tensor '{last}' in .*model\.safetensors is truncated"):
        load_parameters(tmp_path, config, F32)
    for length in np.linspace(0, len(content) - 1, 20).astype(int):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
            load_parameters(tmp_path, config, F32)


@settings(max_examples=100)
@given(st.data())
def test_a_damaged_header_is_a_checkpoint_error_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.getbasetemp() / "damaged"
    directory.mkdir(exist_ok=True)
    config = model_config(directory)
    tensors = random_tensors(config)
    path = directory / "model.safetensors"
    write_tensors(path, tensors)
    content = bytearray(path.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    for position in data.draw(st.lists(st.integers(0, header_end - 1), min_size=1, max_size=3)):
        content[position] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'"[]{},:0-9e.')))
    path.write_bytes(content)
    try:
        ours = load_parameters(directory, config, F32)
    except CheckpointError as error:
        assert str(directory) in str(error)
    else:
        assert [array.shape for array in ours] == [s.shape for s in abstract_parameters(config, F32).values()]


INDEX_DEFECTS: dict[str, tuple[Callable[[Path, dict[str, str]], None], str]] = {
    "absent shard": (
        lambda directory, weights: (directory / weights[K_PROJ]).unlink(),
        r"index\.json names shards that are not there: model-0000\d-of-00002\.safetensors",
    ),
    "other directory": (
        lambda directory, weights: write_index(directory, weights | {K_PROJ: "../other/model.safetensors"}),
        rf"index\.json puts tensor '{K_PROJ}' in '\.\./other/model\.safetensors'; it must be a \*\.safetensors file",
    ),
    "absolute path": (
        lambda directory, weights: write_index(directory, weights | {K_PROJ: "/etc/model.safetensors"}),
        r"in '/etc/model\.safetensors'; it must be",
    ),
    "pickle shard": (
        lambda directory, weights: write_index(directory, weights | {K_PROJ: "pytorch_model.bin"}),
        r"in 'pytorch_model\.bin'; it must be a \*\.safetensors file",
    ),
    "long name": (
        lambda directory, weights: write_index(directory, weights | {K_PROJ: "a" * 5000 + ".safetensors"}),
        r"index\.json names shards that are not there: a+\.safetensors",
    ),
    "number": (lambda directory, weights: write_index(directory, weights | {K_PROJ: 3}), r"in 3; it must be"),
    "wrong shard": (
        lambda directory, weights: write_index(
            directory, weights | {K_PROJ: next(name for name in weights.values() if name != weights[K_PROJ])}
        ),
        rf"tensor '{K_PROJ}' is missing from .*, where model\.safetensors\.index\.json puts it",
    ),
    "unlisted": (
        lambda directory, weights: write_index(directory, {k: v for k, v in weights.items() if k != K_PROJ}),
        rf"tensor '{K_PROJ}' in .* is not listed in model\.safetensors\.index\.json",
    ),
    "no weight_map": (lambda directory, weights: write_index(directory, None), r"has no weight_map"),
    "not JSON": (
        lambda directory, weights: (directory / "model.safetensors.index.json").write_text("{"),
        r"index\.json cannot be read as JSON",
    ),
    "two shards": (
        lambda directory, weights: [
            write_tensors(directory / file, random_tensors(load_config(directory))) for file in set(weights.values())
        ],
        r"tensor '.*' is in two shards: .*00001-of-00002\.safetensors, .*00002-of-00002\.safetensors",
    ),
}


@pytest.mark.parametrize("defect", INDEX_DEFECTS)
def test_defects_of_an_index_are_named(tmp_path: Path, defect: str) -> None:
    edit, message = INDEX_DEFECTS[defect]
    config = model_config(tmp_path)
    edit(tmp_path, write_shards(tmp_path, random_tensors(config)))
    with pytest.raises(CheckpointError, match=message):
        load_parameters(tmp_path, config, F32)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin", "training_args.bin"], r"only pytorch_model\.bin, .*never read.*save_pretrained"),
        (["model.gguf"], r"only model\.gguf: pickled and foreign formats are never read"),
        (["consolidated.safetensors"], r"holds neither .*; it holds consolidated\.safetensors: rename"),
        ([f"model-{i}.safetensors" for i in range(7)], r"model-4\.safetensors and 2 more: .* add the index"),
        ([], r"holds neither model\.safetensors nor model\.safetensors\.index\.json; give"),
    ],
)
def test_directories_without_safetensors_weights(tmp_path: Path, files: list[str], message: str) -> None:
    config = model_config(tmp_path)
    for name in files:
        (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=message):
        load_parameters(tmp_path, config, F32)


def test_absent_directory(tmp_path: Path) -> None:
    config = model_config(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        load_parameters(tmp_path / "nowhere", config, F32)
