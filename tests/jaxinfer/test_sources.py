"""Fused, stacked, interleaved and transposed tensors: loaded as what they were made of, and every misfit named."""

import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tensor_files import write_tensors

from jaxinfer import models
from jaxinfer.models import dense_tensors, load_config, weight_source
from jaxinfer.models.checkpoint import CheckpointError, load_parameters
from jaxinfer.models.sources import Source
from jaxinfer.models.transformer import abstract_parameters
from jaxinfer.models.weight_matching import stored_shapes

F32 = jnp.dtype(jnp.float32)
SHAPE = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
}
Tensors = dict[str, np.ndarray]


def read(directory: Path, architecture: str, **fields: Any) -> Any:
    (directory / "config.json").write_text(json.dumps(SHAPE | {"architectures": [architecture]} | fields))
    return load_config(directory)


def random_parameters(config: Any) -> Tensors:
    """By our own names."""
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=s.shape).astype(np.float32) for name, s in abstract_parameters(config, F32).items()}


def phi3(ours: Tensors) -> Tensors:
    fused = {}
    for i in range(2):
        attention, mlp = f"layers.{i}.attention.", f"layers.{i}.mlp."
        theirs = f"model.layers.{i}."
        fused[theirs + "self_attn.qkv_proj.weight"] = np.concatenate([ours[f"{attention}{x}.weight"] for x in "qkv"])
        fused[theirs + "mlp.gate_up_proj.weight"] = np.concatenate([ours[f"{mlp}{x}.weight"] for x in ("gate", "up")])
    return fused


def mixtral(ours: Tensors) -> Tensors:
    names = {"gate": "w1", "down": "w2", "up": "w3"}
    return {
        f"model.layers.{i}.block_sparse_moe.experts.{e}.{theirs}.weight": ours[f"layers.{i}.mlp.experts.{name}"][e]
        for i, e, (name, theirs) in itertools.product(range(2), range(4), names.items())
    }


def gpt_oss(ours: Tensors) -> Tensors:
    """`[expert, in, out]`, gate and up in turns along out."""
    tensors = {}
    for i in range(2):
        experts, theirs = f"layers.{i}.mlp.experts.", f"model.layers.{i}.mlp.experts."
        gate, up = ours[experts + "gate"], ours[experts + "up"]
        both = np.stack([gate, up], axis=2).reshape(gate.shape[0], -1, gate.shape[2])
        tensors[theirs + "gate_up_proj"] = np.ascontiguousarray(both.swapaxes(1, 2))
        tensors[theirs + "down_proj"] = np.ascontiguousarray(ours[experts + "down"].swapaxes(1, 2))
        biases = np.stack([ours[experts + "gate_bias"], ours[experts + "up_bias"]], axis=-1)
        tensors[theirs + "gate_up_proj_bias"] = biases.reshape(biases.shape[0], -1)
        tensors[theirs + "down_proj_bias"] = ours[experts + "down_bias"]
    return tensors


MODELS: dict[str, tuple[dict[str, Any], Callable[[Tensors], Tensors]]] = {
    "Phi3ForCausalLM": ({}, phi3),
    "MixtralForCausalLM": ({"num_local_experts": 4, "num_experts_per_tok": 2}, mixtral),
    "GptOssForCausalLM": (
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default"},
        },
        gpt_oss,
    ),
}


def write_model(directory: Path, architecture: str, dtype: Any = np.float32) -> tuple[Any, Tensors]:
    fields, fuse = MODELS[architecture]
    config = read(directory, architecture, **fields)
    ours = {name: array.astype(dtype) for name, array in random_parameters(config).items()}
    stored = fuse(ours)
    plain = {weight_source(config, name).name: array for name, array in ours.items()}
    stored |= {name: array for name, array in plain.items() if name in stored_shapes(config) and name not in stored}
    assert {name: array.shape for name, array in stored.items()} == stored_shapes(config)
    write_tensors(directory / "model.safetensors", stored)
    return config, ours


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("chunk_bytes", [80, 4 << 20])
@pytest.mark.parametrize("dtypes", [(np.float32, jnp.bfloat16), (ml_dtypes.bfloat16, jnp.bfloat16)])
def test_parameters_are_what_was_fused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, chunk_bytes: int, dtypes: tuple[Any, Any]
) -> None:
    """Whatever the pieces that are read at once."""
    monkeypatch.setattr(dense_tensors, "CHUNK_BYTES", chunk_bytes)
    stored_dtype, dtype = dtypes
    config, ours = write_model(tmp_path, architecture, stored_dtype)
    calls: list[tuple[str, int, int]] = []
    loaded = load_parameters(tmp_path, config, jnp.dtype(dtype), progress=lambda *call: calls.append(call))
    for (name, expected), array in zip(ours.items(), loaded, strict=True):
        np.testing.assert_array_equal(np.asarray(array), expected.astype(dtype), err_msg=name)
    assert calls[-1][1] == calls[-1][2] == sum(array.nbytes for array in ours.values())  # shares add up to the file


@pytest.mark.parametrize("per_expert", [False, True])
def test_fused_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_expert: bool) -> None:
    """Gate and up one after the other: in `[expert, 2 * ffn, in]`, or in a tensor for each expert."""
    monkeypatch.setattr(dense_tensors, "CHUNK_BYTES", 200)
    config, ours = write_model(tmp_path, "MixtralForCausalLM")
    fused = "layers.{i}.{e}.gate_up" if per_expert else "layers.{i}.gate_up"
    table = dict(models._module(config.architecture).WEIGHTS)
    for part, name in enumerate(("gate", "up")):
        table[f"layers.{{i}}.mlp.experts.{name}"] = Source(fused, part=part, of=2, axis=1)
    use_table(monkeypatch, config, WEIGHTS=table)
    stored = {weight_source(config, name).name: array for name, array in ours.items()}
    stored |= mixtral(ours)
    for i in range(2):
        both = np.concatenate([ours[f"layers.{i}.mlp.experts.{name}"] for name in ("gate", "up")], axis=1)
        stored |= {f"layers.{i}.{e}.gate_up": both[e] for e in range(4)} | {f"layers.{i}.gate_up": both}
    write_tensors(tmp_path / "model.safetensors", {name: stored[name] for name in stored_shapes(config)})
    for (name, expected), array in zip(ours.items(), load_parameters(tmp_path, config, F32), strict=True):
        np.testing.assert_array_equal(np.asarray(array), expected, err_msg=name)


def test_consecutive_parts_read_only_their_own_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, ours = write_model(tmp_path, "Phi3ForCausalLM")
    num_bytes = 0
    read_into = dense_tensors.StoredTensor.read_into

    def counting(self: Any, out: np.ndarray, first: int = 0) -> None:
        nonlocal num_bytes
        num_bytes += out.nbytes
        read_into(self, out, first)

    monkeypatch.setattr(dense_tensors.StoredTensor, "read_into", counting)
    load_parameters(tmp_path, config, F32)
    assert num_bytes == sum(array.nbytes for array in ours.values())


# ---- what does not fit


def use_table(monkeypatch: pytest.MonkeyPatch, config: Any, **module: Any) -> None:
    """Another module in the place of the architecture's."""
    original = models._module(config.architecture)
    fields = {"WEIGHTS": original.WEIGHTS} | module
    monkeypatch.setattr(models, "_module", lambda architecture: SimpleNamespace(**fields))


QKV = "model.layers.{i}.self_attn.qkv_proj.weight"
MISFITS: dict[str, tuple[dict[str, Source], str]] = {
    "a part twice": (
        {"layers.{i}.attention.k.weight": Source(QKV, part=0, of=3)},
        r"layers\.0\.attention\.\w\.weight, .* do not take 'model\.layers\.0\.self_attn\.qkv_proj\.weight' apart",
    ),
    "a part missing": ({"layers.{i}.attention.k.weight": Source("model.{i}.k")}, r"do not take .* apart into 3 parts"),
    "two ways": (
        {"layers.{i}.attention.k.weight": Source(QKV, part=1, of=3, interleaved=True)},
        r"do not take .* apart into 3 parts",
    ),
    "interleaved and unequal": (
        {
            f"layers.{{i}}.attention.{x}.weight": Source(QKV, part=n, of=3, interleaved=True)
            for n, x in enumerate("qkv")
        },
        r"are interleaved in '.*' and differ in size: \[32, 16, 16\]",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_tables_that_do_not_tile_a_tensor_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, misfit: str
) -> None:
    changes, message = MISFITS[misfit]
    config, _ = write_model(tmp_path, "Phi3ForCausalLM")
    use_table(monkeypatch, config, WEIGHTS=dict(models._module(config.architecture).WEIGHTS) | changes)
    with pytest.raises(CheckpointError, match=message):
        load_parameters(tmp_path, config, F32)


def test_a_fused_tensor_of_another_size_is_named(tmp_path: Path) -> None:
    config, _ = write_model(tmp_path, "Phi3ForCausalLM")
    stored = {name: np.zeros(shape, np.float32) for name, shape in stored_shapes(config).items()}
    stored["model.layers.1.self_attn.qkv_proj.weight"] = np.zeros((60, 16), np.float32)
    write_tensors(tmp_path / "model.safetensors", stored)
    with pytest.raises(CheckpointError, match=r"layers\.1\..*qkv_proj.* has shape \[60, 16\]; .* makes it \[64, 16\]"):
        load_parameters(tmp_path, config, F32)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    config, _ = write_model(tmp_path, "MixtralForCausalLM")
    stored = {name: np.zeros(shape, np.float32) for name, shape in stored_shapes(config).items()}
    del stored["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    stored["model.layers.1.block_sparse_moe.experts.4.w2.weight"] = np.zeros((16, 24), np.float32)
    write_tensors(tmp_path / "model.safetensors", stored)
    with pytest.raises(
        CheckpointError, match=r"missing tensors: .*experts\.3\.w2\.weight; unknown tensors: .*experts\.4\.w2\.weight"
    ):
        load_parameters(tmp_path, config, F32)


def test_tables_may_depend_on_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = write_model(tmp_path, "MixtralForCausalLM")
    table = dict(models._module(config.architecture).WEIGHTS)
    use_table(
        monkeypatch,
        config,
        weights=lambda config: table | {"layers.1.attention.q.weight": f"of {config.q_heads} heads"},
    )
    assert weight_source(config, "layers.1.attention.q.weight") == Source("of 4 heads")
    assert weight_source(config, "layers.0.attention.q.weight").name == "model.layers.0.self_attn.q_proj.weight"


def test_tensors_of_other_parts_are_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, ours = write_model(tmp_path, "MixtralForCausalLM")
    stored = {name: np.zeros(shape, np.float32) for name, shape in stored_shapes(config).items()}
    tower = {f"model.vision_tower.{n}.weight": np.zeros((2, 4), np.int64) for n in range(3)}
    write_tensors(tmp_path / "model.safetensors", stored | tower)
    with pytest.raises(CheckpointError, match=r"unknown tensors: model\.vision_tower\.0\.weight"):
        load_parameters(tmp_path, config, F32)
    use_table(monkeypatch, config, IGNORED=r"model\.vision_tower\..*")
    with caplog.at_level(logging.INFO, logger="jaxinfer.models.weight_matching"):
        assert len(load_parameters(tmp_path, config, F32)) == len(ours)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: 3 tensors of 192 bytes are not of the text model and are not read"
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"part": 2, "of": 2}, "part 2 is not from 0 to 1"),
        ({"part": -1}, "part -1 is not from 0 to 0"),
        ({"name": "a.{e}.b", "of": 2}, "axis 0 is negative, or the experts' own"),
        ({"axis": -1}, "axis -1 is negative, or the experts' own"),
    ],
)
def test_impossible_sources(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source(**({"name": "a"} | fields))
