"""Quantized checkpoints: every layout against a dequantizer written from the format's definition, bit for bit."""

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from quantized_files import (
    AWQ,
    CONFIG,
    FP8,
    GPTQ,
    PER_TOKEN,
    SCHEMES,
    Tensors,
    compressed,
    gptq,
    weights,
    write_mixtral,
    write_model,
)
from tensor_files import read_tensors, write_tensors

from jaxinfer.config import ConfigError, ModelConfig
from jaxinfer.models import load_config, weight_format, weight_source
from jaxinfer.models.checkpoint import CheckpointError, load_parameters
from jaxinfer.models.quantization_config import read_quantization
from jaxinfer.models.quantized_checkpoint import abstract_weight, pieces_of, quantized_jobs
from jaxinfer.models.regions import Target, whole
from jaxinfer.models.safetensors_files import find_tensors
from jaxinfer.models.transformer import abstract_parameters, merger, run_decoder
from jaxinfer.models.weight_matching import stored_shapes
from jaxinfer.weight_formats import WeightFormat
from pallas_kernels.tensors import QuantizedTensor, dequantize

BF16 = jnp.dtype(jnp.bfloat16)
Q_PROJ = "model.layers.0.self_attn.q_proj"


def load(directory: Path, **options: Any) -> tuple[ModelConfig, dict[str, Any]]:
    """Parameters by Hugging Face name."""
    config = load_config(directory)
    names = [weight_source(config, name).name for name in abstract_parameters(config, BF16)]
    return config, dict(zip(names, load_parameters(directory, config, BF16, **options), strict=True))


@pytest.mark.parametrize("name", SCHEMES)
def test_values_are_those_that_are_stored(tmp_path: Path, name: str) -> None:
    scheme = SCHEMES[name]
    expected = write_model(tmp_path, scheme.config, scheme.write)
    config, parameters = load(tmp_path)
    quantized = {key: value for key, value in parameters.items() if isinstance(value, QuantizedTensor)}
    assert {key for key in parameters if "_proj" in key} == set(quantized)
    assert {tensor.format for tensor in quantized.values()} == {scheme.format}
    for key, weight in expected.items():
        ours = parameters[key]
        np.testing.assert_array_equal(
            np.asarray(dequantize(ours) if key in quantized else ours.astype(jnp.float32)), weight, err_msg=key
        )
    for spec, ours in zip(abstract_parameters(config, BF16).values(), parameters.values(), strict=True):
        assert ours.shape == spec.shape
        if spec.format is not None:
            wanted = abstract_weight(spec.format, spec.shape)
            assert jax.tree.structure(wanted) == jax.tree.structure(ours)
            assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), wanted) == jax.tree.map(
                lambda leaf: (leaf.shape, leaf.dtype), ours
            )


def test_biases_of_zeros_are_none(tmp_path: Path) -> None:
    """AutoGPTQ wrote one for every linear map."""
    expected = write_model(tmp_path, GPTQ, gptq())
    tensors = read_tensors(tmp_path / "model.safetensors")
    write_tensors(tmp_path / "model.safetensors", tensors | {f"{Q_PROJ}.bias": np.zeros(64, np.float16)})
    _, parameters = load(tmp_path)
    weight = parameters[f"{Q_PROJ}.weight"]
    np.testing.assert_array_equal(np.asarray(dequantize(weight)), expected[f"{Q_PROJ}.weight"])


# ---- fused tensors and experts


@pytest.mark.parametrize(
    "name", ["gptq zero points", "awq", "w8a8 int8", "int8 per tensor", "packed int4 zero points", "fp8 blocks"]
)
def test_parts_of_fused_weights(tmp_path: Path, name: str) -> None:
    """Phi-3 stores q, k, v and gate, up as one weight each; blocks of 48 outputs do not end where parts do."""
    scheme = SCHEMES[name]
    fields = {"architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": 32}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | fields))
    rng = np.random.default_rng(0)
    tensors, expected = {}, {}
    for stored, shape in stored_shapes(load_config(tmp_path)).items():
        if "_proj" in stored:
            made, expected[stored] = scheme.write(rng, stored.removesuffix(".weight"), *shape)
            tensors |= made
        else:
            tensors[stored] = rng.normal(size=shape).astype(np.float32)
    write_tensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | fields | {"quantization_config": scheme.config}))
    config = load_config(tmp_path)
    names = list(abstract_parameters(config, BF16))
    ours = dict(zip(names, load_parameters(tmp_path, config, BF16), strict=True))
    for i in range(2):
        for stored, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            module = "attention" if len(parts) == 3 else "mlp"
            weights = [np.asarray(dequantize(ours[f"layers.{i}.{module}.{part}.weight"])) for part in parts]
            np.testing.assert_array_equal(np.concatenate(weights), expected[f"model.layers.{i}.{stored}.weight"])


@pytest.mark.parametrize(
    ("name", "experts"), [("gptq", 4), ("w8a8 int8", 4), ("packed int4", 4), ("fp8 blocks", 4), ("packed int4", 1)]
)
def test_experts_are_stacked(tmp_path: Path, name: str, experts: int) -> None:
    """One weight per expert in the file; the router is not quantized."""
    expected = write_mixtral(tmp_path, name, num_local_experts=experts, num_experts_per_tok=1)
    config = load_config(tmp_path)
    for parameter, ours in zip(abstract_parameters(config, BF16), load_parameters(tmp_path, config, BF16), strict=True):
        assert isinstance(ours, QuantizedTensor) == (".experts." in parameter or ".attention." in parameter)
        if ".experts." in parameter:
            source = weight_source(config, parameter)
            wanted = np.stack([expected[stored] for stored in source.names(experts)])
            np.testing.assert_array_equal(np.asarray(dequantize(ours)), wanted, err_msg=parameter)


@pytest.mark.parametrize("name", ["gptq zero points", "awq", "packed int4 zero points"])
def test_experts_with_zero_points_are_refused(tmp_path: Path, name: str) -> None:
    write_mixtral(tmp_path, name)
    config = load_config(tmp_path)
    with pytest.raises(ConfigError, match=r"experts' weight \[4, \d+, \d+\] has zero points, .* symmetrically"):
        load_parameters(tmp_path, config, BF16)


FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1, then the same with the sign


def test_mxfp4_experts(tmp_path: Path) -> None:
    """GPT-OSS: blocks `[expert, out, in / 32, 16]`, the even input in the low half; gate and up in turns."""
    fields = {"architectures": ["GptOssForCausalLM"], "num_local_experts": 3, "num_experts_per_tok": 2}
    fields |= {"sliding_window": 8, "rope_parameters": {"rope_type": "default"}}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | fields))
    rng = np.random.default_rng(0)
    tensors, expected = {}, {}
    for stored, shape in stored_shapes(load_config(tmp_path)).items():
        if not stored.endswith(("gate_up_proj", "down_proj")):
            tensors[stored] = rng.normal(size=shape).astype(ml_dtypes.bfloat16)
            continue
        experts, in_size, out_size = shape
        blocks = rng.integers(0, 256, (experts, out_size, in_size // 32, 16)).astype(np.uint8)
        scales = rng.integers(110, 140, (experts, out_size, in_size // 32)).astype(np.uint8)
        scales[0, 0, :2] = 0, 254
        weight = np.empty((experts, out_size, in_size), np.float64)
        for e, o, i in np.ndindex(weight.shape):
            byte = int(blocks[e, o, i // 32, i % 32 // 2])
            nibble = byte >> 4 if i % 2 else byte & 15
            sign = -1.0 if nibble & 8 else 1.0
            weight[e, o, i] = sign * FP4[nibble & 7] * 2.0 ** (int(scales[e, o, i // 32]) - 127)
        tensors |= {f"{stored}_blocks": blocks, f"{stored}_scales": scales}
        expected[stored] = weight
    write_tensors(tmp_path / "model.safetensors", tensors)
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | fields | {"quantization_config": quantization}))
    config = load_config(tmp_path)
    ours = dict(zip(abstract_parameters(config, BF16), load_parameters(tmp_path, config, BF16), strict=True))
    for i in range(2):
        gate_up = expected[f"model.layers.{i}.mlp.experts.gate_up_proj"]
        parts = {"gate": gate_up[:, 0::2], "up": gate_up[:, 1::2]}
        parts["down"] = expected[f"model.layers.{i}.mlp.experts.down_proj"]
        for part, weight in parts.items():
            tensor = ours[f"layers.{i}.mlp.experts.{part}"]
            assert (tensor.format, tensor.scales.dtype) == ("int8/g32", jnp.bfloat16)
            scales = np.repeat(np.asarray(tensor.scales).astype(np.float64).swapaxes(-1, -2), 32, axis=-1)
            np.testing.assert_array_equal(np.asarray(tensor.values) * scales, weight)
    stored = next(name for name in tensors if name.endswith("down_proj_scales"))
    tensors[stored][1, 3] = 255
    write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"down_proj_blocks' in .* has scales that are not a number \(E8M0 255\)"):
        load_parameters(tmp_path, config, BF16)


# ---- tensors that are refused


def change(name: str, edit: Callable[[np.ndarray], np.ndarray | None]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        edited = edit(tensors.pop(f"{Q_PROJ}.{name}"))
        if edited is not None:
            tensors[f"{Q_PROJ}.{name}"] = edited

    return apply


def one_in(place: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def edit(words: np.ndarray) -> np.ndarray:
        edited = words.copy().view(np.uint32)
        edited[0, 0] = (int(edited[0, 0]) & ~(15 << 4 * place)) | (value << 4 * place)
        return edited.view(np.int32)

    return edit


def plain_instead(tensors: Tensors) -> None:
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{Q_PROJ}.{name}"]
    tensors[f"{Q_PROJ}.weight"] = np.ones((64, 64), np.float16)


REFUSED: dict[str, tuple[str, Callable[[Tensors], None], str]] = {
    "act order": (
        "gptq",
        change("g_idx", lambda order: order[::-1].copy()),
        rf"'{Q_PROJ}\.qweight' in .* has inputs in an order of their own \(act order, desc_act=true\)",
    ),
    "asymmetric": ("gptq", change("qzeros", one_in(3, 6)), r"has zero points, though quantization_config says .*symm"),
    "wrapped zero": (
        "gptq zero points",
        change("qzeros", one_in(0, 15)),
        r"has zero points stored as 15, .* 0 or for 16; convert it to 'gptq_v2'",
    ),
    "no scales": ("gptq", change("scales", lambda scales: None), rf"quantized by gptq; missing tensors: {Q_PROJ}\.sc"),
    "other groups": (
        "gptq",
        change("scales", lambda scales: np.ones((1, 64), np.float16)),
        r"q_proj\.scales' in .* has shape \[1, 64\]; config\.json makes it \[2, 64\]",
    ),
    "other words": (
        "gptq",
        change("qweight", lambda words: words.astype(np.int64)),
        r"q_proj\.qweight' in .* is I64; supported: I32",
    ),
    "not quantized": (
        "gptq",
        plain_instead,
        rf"missing tensors: {Q_PROJ}\.qweight.*; unknown tensors: {Q_PROJ}\.weight",
    ),
    "a bias it does not have": (
        "gptq",
        lambda tensors: tensors.update({f"{Q_PROJ}.bias": np.eye(1, 64, 63, np.float16)[0]}),
        rf"unknown tensors: {Q_PROJ}\.bias",
    ),
    "another weight_shape": (
        "packed int4",
        change("weight_shape", lambda shape: shape + 1),
        r"says its weight_shape is \[65, 65\], and is \[64, 64\]",
    ),
    "static activations": (
        "w8a8 fp8",
        lambda tensors: tensors.update({f"{Q_PROJ}.input_scale": np.ones(1, np.float32)}),
        rf"unknown tensors: {Q_PROJ}\.input_scale",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_that_cannot_be_held_are_named(tmp_path: Path, case: str) -> None:
    scheme, edit, message = REFUSED[case]
    write_model(tmp_path, SCHEMES[scheme].config, SCHEMES[scheme].write)
    tensors = read_tensors(tmp_path / "model.safetensors")
    edit(tensors)
    write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


# ---- config.json


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
INT4 = compressed(weights(4, "group", group_size=32), "pack-quantized")
REFUSED_CONFIGS: dict[str, tuple[Any, str]] = {
    "not an object": (3, r"quantization_config=3 must be an object"),
    "bitsandbytes": (
        BNB,
        r"quant_method='bitsandbytes' is not supported; supported: gptq, awq, compressed-tensors, fp8, mx",
    ),
    "no method": ({"bits": 4}, r"quant_method=None is not supported"),
    "unknown field": (GPTQ | {"rotation": "hadamard"}, r"unknown field quantization_config\.rotation='hadamard'"),
    "3 bits": (GPTQ | {"bits": 3}, r"quantization_config\.bits=3 is not supported; supported: 4, 8"),
    "marlin": (GPTQ | {"checkpoint_format": "marlin"}, r"checkpoint_format='marlin' is not supported; supported: gptq"),
    "dynamic": (GPTQ | {"dynamic": {"-:.*down": {}}}, r"dynamic changes the format of some modules"),
    "quantized head": (GPTQ | {"lm_head": True}, r"lm_head=True is not supported"),
    "group size": (GPTQ | {"group_size": 0}, r"group_size=0 must be at least 1, or -1"),
    "awq gemv": (AWQ | {"version": "gemv"}, r"version='gemv' is not supported; supported: gemm"),
    "awq symmetric": (AWQ | {"zero_point": False}, r"zero_point=False is not supported; supported: .*zero_point=True"),
    "fp8 per tensor": (FP8 | {"weight_block_size": None}, r"weight_block_size=None must be .* FP8 with other scales"),
    "fp8 static": (FP8 | {"activation_scheme": "static"}, r"activation_scheme='static' is not supported"),
    "fp8 skips": (FP8 | {"modules_to_not_convert": "lm_head"}, r"modules_to_not_convert='lm_head' must be a list"),
    "no groups": ({"quant_method": "compressed-tensors"}, r"config_groups=None must name groups"),
    "static activations": (
        compressed(weights(8, "channel"), "int-quantized", PER_TOKEN | {"dynamic": False}),
        r"input_activations must be dynamic and symmetric, not dynamic=False",
    ),
    "asymmetric activations": (
        compressed(weights(8, "channel"), "int-quantized", PER_TOKEN | {"symmetric": False}),
        r"input_activations must be dynamic and symmetric, not dynamic=True, symmetric=False",
    ),
    "activations per tensor": (
        compressed(weights(8, "channel"), "int-quantized", PER_TOKEN | {"strategy": "tensor"}),
        r"strategy 'tensor' is not supported with these weights; supported: 8 bits per token",
    ),
    "W4A8": (
        compressed(weights(4, "group", group_size=32), "pack-quantized", PER_TOKEN),
        r"input_activations of type 'int', 8 bits and strategy 'token' is not supported with these weights",
    ),
    "2:4": (
        INT4 | {"format": "marlin-24"},
        r"format='marlin-24' with weights of type 'int' and 4 bits is not supported",
    ),
    "sparsity": (INT4 | {"sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparsity_config=.* is not supported"),
    "K/V": (INT4 | {"kv_cache_scheme": {"num_bits": 8}}, r"kv_cache_scheme=.* is not supported"),
    "rotation": (INT4 | {"transform_config": {"config_groups": {}}}, r"transform_config=.* is not supported"),
    "act order": (
        compressed(weights(4, "group", group_size=32, actorder="group"), "pack-quantized"),
        r"actorder='group' is not supported; supported: weight, static",
    ),
    "fp4": (
        compressed(weights(4, "tensor_group", "float", group_size=16), "nvfp4-pack-quantized"),
        r"strategy='tensor_group' is not supported",
    ),
    "no block": (compressed(weights(8, "block", "float"), "float-quantized"), r"block_structure=None must be the \["),
    "class": (
        INT4 | {"config_groups": {"g": {"targets": ["Conv2d"], "weights": weights(4, "group", group_size=32)}}},
        r"names the class 'Conv2d'; supported: Linear, names, re:",
    ),
    "expression": (INT4 | {"ignore": ["re:("]}, r"is not a regular expression: '\(\?:\(\)\.\*'"),
}


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_configs_that_cannot_be_served_are_named(tmp_path: Path, case: str) -> None:
    quantization, message = REFUSED_CONFIGS[case]
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization}))
    with pytest.raises(ConfigError, match=rf"config\.json: .*{message}"):
        load_config(tmp_path)


@pytest.mark.parametrize("group_size", [48, 128])
def test_groups_that_do_not_divide_the_inputs_are_named(tmp_path: Path, group_size: int) -> None:
    write_model(tmp_path, GPTQ, gptq())
    (tmp_path / "config.json").write_text(
        json.dumps(CONFIG | {"quantization_config": GPTQ | {"group_size": group_size}})
    )
    with pytest.raises(ConfigError, match=rf"cannot be int4 in groups of {group_size}: .* its 64 inputs evenly"):
        load(tmp_path)


def formats(directory: Path, quantization: dict[str, Any]) -> dict[str, str]:
    """Module of layer 1 -> dtype of its weight, where it is quantized."""
    (directory / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization}))
    config = load_config(directory)
    found = {}
    for name, spec in abstract_parameters(config, BF16).items():
        assert spec.format == (weight_format(config, name) if re.search(r"attention\.|mlp\.", name) else None)
        if name.startswith("layers.1.") and spec.format is not None:
            found[name.removeprefix("layers.1.").removesuffix(".weight")] = spec.format.dtype
    return found


def test_which_modules_are_quantized(tmp_path: Path) -> None:
    every = {"attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down"}
    assert set(formats(tmp_path, GPTQ)) == every
    inside = [["self_attn.k_proj", "self_attn.q_proj"], ["mlp.down_proj"]]
    only = formats(tmp_path, GPTQ | {"modules_in_block_to_quantize": inside})
    assert set(only) == {"attention.k", "attention.q", "mlp.down"}
    for names, kept in (
        (["model.layers.1.mlp"], {"mlp.gate", "mlp.up", "mlp.down"}),
        (["down_proj", "lm_head"], {"mlp.down"}),
        (["model.layers.*.self_attn"], {"attention.q", "attention.k", "attention.v", "attention.o"}),
        (["model.layers.1.mlp.gate"], set()),  # not gate_proj
        (["model.layers.0"], set()),
    ):
        assert set(formats(tmp_path, FP8 | {"modules_to_not_convert": names})) == every - kept, names
        assert set(formats(tmp_path, AWQ | {"modules_to_not_convert": names})) == every - kept, names
    ignored = formats(tmp_path, INT4 | {"ignore": ["re:.*self_attn.*", "model.layers.1.mlp.up_proj", "lm_head"]})
    assert set(ignored) == {"mlp.gate", "mlp.down"}


def test_maps_of_the_same_inputs_are_one_array_where_they_are_stored_alike(tmp_path: Path) -> None:
    """Layer 1 has a plain k and up beside quantized maps."""
    write_model(tmp_path, INT4, SCHEMES["packed int4"].write)
    hf = json.loads((tmp_path / "config.json").read_text())
    hf["quantization_config"]["ignore"] = [r"re:.*layers\.1\..*(k|up)_proj", "lm_head"]
    (tmp_path / "config.json").write_text(json.dumps(hf))
    config = load_config(tmp_path)
    own, fused = (abstract_parameters(config, BF16, fused=fused) for fused in (False, True))
    assert {name: spec.parts for name, spec in fused.items() if spec.parts} == {
        "layers.0.attention.fused.weight": tuple(f"layers.0.attention.{name}.weight" for name in "qkv"),
        "layers.0.mlp.fused.weight": ("layers.0.mlp.gate.weight", "layers.0.mlp.up.weight"),
    }
    assert own["layers.1.mlp.up.weight"].format is None and own["layers.1.mlp.gate.weight"].format is not None
    names = [part for name, spec in fused.items() for part in spec.parts or (name,)]
    assert sorted(names) == sorted(own)


def test_the_narrowest_target_decides(tmp_path: Path) -> None:
    groups = {
        "all": {"targets": ["Linear"], "weights": weights(4, "group", group_size=32)},
        "some": {"targets": ["re:.*mlp"], "weights": weights(8, "channel")},
        "one": {"targets": ["model.layers.1.mlp.up_proj"], "weights": weights(4, "group", group_size=32)},
    }
    found = formats(tmp_path, INT4 | {"config_groups": groups})
    assert {name for name, dtype in found.items() if dtype == "int8"} == {"mlp.gate", "mlp.down"}
    assert found["mlp.up"] == found["attention.q"] == "int4"


def test_experts_quantized_in_different_ways_are_refused(tmp_path: Path) -> None:
    write_mixtral(tmp_path, "packed int4")
    hf = json.loads((tmp_path / "config.json").read_text())
    hf["quantization_config"]["ignore"].append(r"re:.*layers\.1\..*experts\.2\.w1")
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(
        CheckpointError, match=r"layers\.1\..*experts\.\{e\}\.w1\.weight.* quantizes its experts in diff"
    ):
        load_parameters(tmp_path, load_config(tmp_path), BF16)


def test_text_config_may_hold_it(tmp_path: Path) -> None:
    assert read_quantization({}) is read_quantization({"text_config": {}}) is None
    inner, outer = {"text_config": {"quantization_config": AWQ}}, {"quantization_config": AWQ, "text_config": {}}
    quantization = read_quantization(inner)
    assert quantization == read_quantization(outer)
    assert quantization is not None
    assert quantization.format_of("model.language_model.layers.0.mlp.up_proj.weight") == WeightFormat("int4", 32, True)
    assert quantization.format_of("lm_head.weight") is None


# ---- files that other packages wrote (scripts/make_quantized_goldens.py)

GOLDENS = Path(__file__).parent.parent / "goldens_quantized"


def goldens() -> dict[str, tuple[Path, str, dict[str, Any]]]:
    """Weight -> its file, its name there and its quantization_config."""
    found = {}
    for path in sorted(GOLDENS.glob("*.safetensors")):
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        for name, config in json.loads(header["__metadata__"]["quantization_configs"]).items():
            found[f"{path.stem}: {name}"] = (path, name, config)
    return found


def test_goldens_cover_what_they_claim() -> None:
    assert {path.stem for path in GOLDENS.glob("*.safetensors")} == {"compressed_tensors", "transformers"}
    assert all(path.stat().st_size <= 60_000 for path in GOLDENS.iterdir())
    assert len(goldens()) == 10


@pytest.mark.parametrize("golden", goldens())
def test_other_packages_weights(tmp_path: Path, golden: str) -> None:
    """What the package reads back, to the last bit, from the config and tensors that it wrote."""
    path, name, hf = goldens()[golden]
    tensors = {key: array for key, array in read_tensors(path).items() if key.startswith(f"{name}.")}
    expected = tensors.pop(f"{name}.expected")
    write_tensors(tmp_path / "model.safetensors", tensors)
    source = f"{name}.down_proj" if expected.ndim == 3 else f"{name}.weight"
    quantization = read_quantization({"quantization_config": hf})
    assert quantization is not None
    stored_as = quantization.stored_as(source)
    assert stored_as is not None
    pieces = pieces_of(stored_as, source, expected.shape)
    with ExitStack() as files:
        stored = find_tensors(tmp_path, files)
        assert set(stored) == {piece.name for piece in pieces.values() if piece.required or piece.name in stored}
        own = {role: stored[piece.name] for role, piece in pieces.items() if piece.name in stored}
        for role, tensor in own.items():
            assert tensor.shape in pieces[role].shapes and tensor.dtype_code in pieces[role].codes
        host = jax.tree.map(
            lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract_weight(stored_as.held, expected.shape)
        )
        outputs = slice(0, expected.shape[-2], 1)
        for job in quantized_jobs(stored_as, expected.shape, outputs, (own,), [Target(whole(expected.shape), host)]):
            job()
    host.check()
    np.testing.assert_array_equal(np.asarray(dequantize(jax.tree.map(jnp.asarray, host))), expected)


# ---- what the model computes with them


def logits(config: ModelConfig, parameters: tuple[Any, ...], tokens: jax.Array) -> np.ndarray:
    """f32[tokens, vocab] of one sequence, whose attention takes the mean of what it sees."""

    def attend(index: int, q: jax.Array, k: Any, v: Any, sinks: Any = None) -> jax.Array:
        seen = jnp.cumsum(v, axis=0) / jnp.arange(1, v.shape[0] + 1)[:, None, None]
        return q + jnp.repeat(k + seen, q.shape[1] // v.shape[1], axis=1)

    def forward(flat: tuple[jax.Array, ...]) -> jax.Array:
        model = merger(config, jnp.dtype(jnp.float32), "auto")(flat)
        return model.unembed(run_decoder(model, tokens, jnp.arange(tokens.size), attend))

    return np.asarray(jax.jit(forward)(tuple(jax.tree.leaves(parameters))))


@pytest.mark.parametrize(
    ("name", "bar"),
    [
        ("gptq zero points", 1e-5),
        ("awq", 1e-5),
        ("packed int4", 1e-5),
        ("fp8 blocks", 1e-5),
        ("int8 zero points", 1e-5),
        ("w8a8 int8", 0.2),  # activations are rounded to int8 too, and weights as large as these amplify that
    ],
)
def test_logits_are_those_of_the_values_that_are_stored(tmp_path: Path, name: str, bar: float) -> None:
    """The same model with every weight widened before it multiplies."""
    write_model(tmp_path, SCHEMES[name].config, SCHEMES[name].write)
    config = load_config(tmp_path)
    parameters = load_parameters(tmp_path, config, jnp.dtype(jnp.float32))
    wide = tuple(dequantize(p) if isinstance(p, QuantizedTensor) else p for p in parameters)
    tokens = jnp.arange(12) % CONFIG["vocab_size"]
    ours, expected = logits(config, parameters, tokens), logits(replace(config, quantization=None), wide, tokens)
    assert np.abs(expected).max() > 0
    assert np.abs(ours - expected).max() <= bar * np.abs(expected).max()
