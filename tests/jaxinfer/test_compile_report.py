"""Reports on programs for TPUs that are not here: presets, sizes by hand, and small models compiled for real."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxinfer import compile_report, model_presets
from jaxinfer.blueprint import Blueprint, compiler_options
from jaxinfer.compile_report import Request, Sizes, request_of
from jaxinfer.config import ConfigError, EngineConfig, LayerSpec
from jaxinfer.models.transformer import abstract_parameters, merger
from jaxinfer.placement import place_parameters
from jaxinfer.program_shapes import Shape
from pallas_kernels import devices
from serving import compile_cli
from sharding import topology, traffic
from sharding.tpu_slice import Slice

GIB = 1 << 30


# ---- presets


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3.1-8b", 8.03),
        ("llama-3.1-70b", 70.55),
        ("llama-3.1-405b", 405.85),
        ("mixtral-8x7b", 46.70),
        ("qwen3-235b-a22b", 235.09),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    found, model = model_presets.model_of(name)
    specs = abstract_parameters(model, jnp.dtype("bfloat16")).values()
    assert found == name
    assert sum(math.prod(spec.shape) for spec in specs) == pytest.approx(billions * 1e9, rel=1e-3)
    assert name in model_presets.presets()


@pytest.mark.parametrize(
    ("weights", "dtype", "group_size", "activation"),
    [
        ("int8", "int8", None, None),
        ("int4", "int4", 128, None),
        ("fp8", "float8_e4m3fn", None, None),
        ("w8a8-int8", "int8", None, "int8"),
        ("w8a8-fp8", "float8_e4m3fn", None, "float8_e4m3fn"),
    ],
)
@pytest.mark.parametrize("name", ["llama-3.1-8b", "mixtral-8x7b", "qwen3-235b-a22b"])
def test_weights_as_if_stored_otherwise(
    name: str, weights: str, dtype: str, group_size: int | None, activation: str | None
) -> None:
    _, model = model_presets.model_of(name, weights)
    specs = abstract_parameters(model, jnp.dtype("bfloat16"))
    kept = {each: spec.format for each, spec in specs.items() if spec.format is None and len(spec.shape) > 1}
    assert all("embed" in each or "router" in each for each in kept), kept
    for spec in specs.values():
        if spec.format is not None:
            held = spec.format
            assert (held.dtype, held.group_size, held.activation) == (dtype, group_size, activation)


def test_a_directory_with_a_config_and_no_weights_will_do(tmp_path: Path) -> None:
    source = Path(compile_report.__file__).parent / "assets" / "configs" / "llama-3.1-8b.json"
    (tmp_path / "config.json").write_text(source.read_text())
    assert model_presets.model_of(str(tmp_path)) == (tmp_path.name, model_presets.model_of("llama-3.1-8b")[1])
    _, model = model_presets.model_of(str(tmp_path), "int8")
    assert model.quantization is not None
    quantized = {**json.loads(source.read_text()), "quantization_config": model_presets.quantization("int4")}
    (tmp_path / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(ConfigError, match="is stored as compressed-tensors already"):
        model_presets.model_of(str(tmp_path), "int8")


def test_what_is_no_model_and_no_format_says_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"model 'llama-9' is neither a directory nor one of llama-3.1-405b, "):
        model_presets.model_of("llama-9")
    with pytest.raises(ConfigError, match=r"weights='int2' is not one of int8, int4, fp8"):
        model_presets.model_of("llama-3.1-8b", "int2")


def test_a_quantized_model_has_the_same_arrays_where_a_mesh_is_in_context() -> None:
    _, model = model_presets.model_of("llama-3.1-8b", "int8")
    model = dataclasses.replace(model, layers=model.layers[:1])
    leaves = [
        leaf
        for each in place_parameters(model, jnp.dtype("bfloat16"), None)
        for leaf in jax.tree.leaves(each.abstract())
    ]
    assert len(leaves) == 1 + 2 + 4 * 2 + 2  # embedding, norms, values and scales, last norm, logits
    with topology.targeting(devices.named("v6e")):
        merge = merger(model, jnp.dtype("bfloat16"), "auto", fused=True)
        decoder = jax.eval_shape(lambda *arrays: nnx.split(merge(arrays))[1], *leaves)
    assert len(jax.tree.leaves(decoder)) == len(leaves)


# ---- what to compile


def test_a_mesh_that_is_not_given_is_a_tensor_axis() -> None:
    request = request_of("llama-3.1-8b", "tpu7x:2x2x1", EngineConfig())
    assert (request.config.mesh, request.piece.name) == ("tensor=8", "tpu7x:2x2x1")
    assert request_of("llama-3.1-8b", "v6e:1x1", EngineConfig()).config.mesh == ""
    assert request_of("llama-3.1-8b", "v6e", EngineConfig(mesh="data=2,tensor=8")).piece.name == "v6e:4x4"


@pytest.mark.parametrize(
    ("device", "words"),
    [("v6e:3x3", "is no topology of v6e"), ("v6e", "no topology has 3 devices"), ("x", "not one of")],
)
def test_a_slice_that_is_none_is_a_config_error(device: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        request_of("llama-3.1-8b", device, EngineConfig(mesh="tensor=3"))


# ---- sizes


def request(batch: int = 64, context: int = 8192, **options: Any) -> Request:
    name, model = model_presets.model_of("llama-3.1-8b")
    options = {"max_num_seqs": batch, "max_model_len": context, "mesh": "tensor=4", **options}
    return Request(name, model, EngineConfig(**options), Slice.parse("v6e:2x2"), 0)


def program(**fields: Any) -> dict[str, Any]:
    return {
        "temporary_bytes": 100,
        "result_bytes": 10,
        "other_argument_bytes": 1,
        "refused": "",
        "kv_bytes": GIB,
        **fields,
    }


def test_bytes_of_pages_and_what_fits_by_hand() -> None:
    with topology.targeting(devices.named("v6e")):
        asked = request()
        pages = compile_report._pages(asked, 8192, 64)
        assert pages == (64 * 64 + 2,)
        page_bytes = 128 * 32 * 2 * 2 * 128 * 2  # tokens, layers, K and V, heads, head_dim, bfloat16
        assert compile_report._kv_bytes(asked, pages) == pages[0] * page_bytes
        left = 10 * GIB
        sizes = Sizes(limit=16 * GIB, weights=2 * GIB, kv=8 * GIB, page_counts=(pages,))
        sizes = dataclasses.replace(sizes, limit=left + sizes.weights + 111)
        found = compile_report._memory(asked, sizes, {"decode": program(), "prefill": program(temporary_bytes=50)})
    assert (found["temporary_bytes"], found["slot_bytes"]) == (110, 1)
    assert (found["headroom_bytes"], found["fits"]) == (2 * GIB, True)
    fit = {entry["length"]: entry["sequences"] for entry in found["capacity"]}
    assert fit == {n: (left - 2 * page_bytes) // (n // 128 * page_bytes) for n in (2048, 8192, 32768, 131072)}


def test_what_does_not_fit_or_does_not_compile() -> None:
    with topology.targeting(devices.named("v6e")):
        sizes = Sizes(limit=10 * GIB, weights=8 * GIB, kv=4 * GIB, page_counts=((4,),))
        found = compile_report._memory(request(), sizes, {"decode": program()})
        assert (found["fits"], found["headroom_bytes"]) == (False, -2 * GIB - 111)
        refused = {"decode": {"error": "RESOURCE_EXHAUSTED"}}
        large = dataclasses.replace(sizes, limit=20 * GIB)
        found = compile_report._memory(request(), large, refused)
        assert (found["fits"], found["capacity"], found["compiled_with_kv_bytes"]) == (False, [], None)
        # with fewer pages it was compiled, and by the sum there should be room for all
        found = compile_report._memory(request(), large, {"decode": program(refused="RESOURCE_EXHAUSTED")})
        most = dict(compile_report._capacity(request(), GIB))
        small = compile_report._memory(request(), sizes, {"decode": program(refused="RESOURCE_EXHAUSTED")})
    assert (found["fits"], found["headroom_bytes"] > 0, found["compiled_with_kv_bytes"]) == (False, True, GIB)
    for each in (found, small):
        assert {entry["length"]: entry["sequences"] for entry in each["capacity"]} == most


def test_pages_are_cut_for_more_and_more_beside_them() -> None:
    with topology.targeting(devices.named("v6e")):
        asked = request(mesh="", batch=512, context=2048)
        blueprint = Blueprint(asked.model, asked.config, None, num_pages=compile_report._pages(asked))
        enough = compile_report._sized(asked, blueprint, 400 * GIB)
        assert enough.page_counts == (compile_report._pages(asked),)
        tight = compile_report._sized(asked, blueprint, 32 * GIB)
        assert len(tight.page_counts) == len(compile_report.SPARE_SHARES)
        for counts, share in zip(tight.page_counts, compile_report.SPARE_SHARES, strict=True):
            beside = 32 * GIB - tight.weights - compile_report._kv_bytes(asked, counts)
            assert share * 32 * GIB <= beside < (share + 0.01) * 32 * GIB
        half = compile_report._sized(asked, blueprint, 20 * GIB)  # beside the weights, 32 % are not there
        assert len(half.page_counts) == 2 and sorted(half.page_counts, reverse=True) == list(half.page_counts)
        hopeless = compile_report._sized(asked, blueprint, 8 * GIB)  # the weights are too much
        assert hopeless.page_counts == (compile_report._pages(asked),)


def test_collectives_that_are_alike_are_one_line() -> None:
    def one(name: str, kind: str = "all-reduce", payload: int = 1000, **fields: Any) -> traffic.Collective:
        return traffic.Collective(name, kind, "", payload, 4, "step", 1, False, **fields)

    found = compile_report._grouped((one("a"), one("b"), one("c", "all-gather", 4000), one("d", beside=("dot",))))
    assert [(line["kind"], line["count"], line["overlapped"]) for line in found] == [
        ("all-reduce", 2, False),
        ("all-gather", 1, False),
        ("all-reduce", 1, True),
    ]


# ---- the command


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true")
    compile_cli.add_compile_parser(parser.add_subparsers(), [common])
    args = parser.parse_args(["compile", *words])
    args.progress = Silence()
    return args


class Silence:
    def say(self, text: str) -> None: ...

    def clear(self) -> None: ...


def test_flags_that_shape_no_program_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments("llama-3.1-8b", "--device", "v6e:2x2", "--max-queue", "3")
    assert "--max-queue" in capsys.readouterr().err


def test_a_negative_chunk_is_refused() -> None:
    with pytest.raises(ConfigError, match="--prefill-chunk -1 must be at least 0"):
        compile_cli.run(arguments("llama-3.1-8b", "--device", "v6e:2x2", "--prefill-chunk", "-1"))


def test_a_place_for_programs_is_tried_before_anything_is_compiled(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ("llama-3.1-8b", "--device", "v6e:2x2", "--save-hlo", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"--save-hlo '.*file' is no directory to write to: File exists"):
        compile_cli.run(arguments(*words))


def test_programs_that_differ_lie_in_files_that_differ() -> None:
    asked, shape = request(), Shape(64)
    options = {"context": 2048, "mesh": "data=4", "kv_dtype": "int8", "page_size": 64, "dtype": "float32"}
    others = [request(**{name: value}) for name, value in options.items()]
    names = {compile_report._text_name(each, shape) for each in (asked, *others)}
    assert len(names) == 1 + len(others)
    assert all(re.fullmatch(r"llama-3.1-8b_v6e-2x2_[a-z]+-4_decode_loop-64-slots-_[0-9a-f]{8}\.hlo", n) for n in names)


def test_windows_hold_as_many_pages_without_a_prefill_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server needs does not depend on which of its programs are reported on."""
    asked: list[Request] = []
    monkeypatch.setattr(compile_report, "report", lambda request, *_: asked.append(request) or {"memory": {"fits": 1}})
    for words in (("--prefill-chunk", "0"), ()):
        compile_cli.run(arguments("llama-3.1-8b", "--device", "v6e:2x2", "--json", *words))
    assert [each.prefill_chunk for each in asked] == [0, 512]
    windowed = [
        dataclasses.replace(
            each, model=dataclasses.replace(each.model, layers=(LayerSpec(window=1024),) * len(each.model.layers))
        )
        for each in asked
    ]
    assert compile_report._pages(windowed[0]) == compile_report._pages(windowed[1])


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (3 << 29, "1.50 GiB"), (-GIB, "-1.00 GiB")],
)
def test_sizes_as_people_read_them(num_bytes: int, text: str) -> None:
    assert compile_cli.size(num_bytes) == text


@pytest.fixture
def small_model(tmp_path: Path) -> str:
    """A directory with the config of an 8B Llama of two layers."""
    source = Path(compile_report.__file__).parent / "assets" / "configs" / "llama-3.1-8b.json"
    small = {**json.loads(source.read_text()), "num_hidden_layers": 2, "vocab_size": 8192, "eos_token_id": 2}
    small["bos_token_id"] = 1
    (tmp_path / "config.json").write_text(json.dumps(small))
    return str(tmp_path)


@pytest.mark.accelerators
@pytest.mark.timeout(900)
def test_the_command_on_a_small_model(small_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (small_model, "--device", "v6e:2x2", "--batch", "16", "--context", "1024", "--prefill-chunk", "256")
    assert compile_cli.run(arguments(*words, "--save-hlo", str(tmp_path / "hlo"), "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["mesh"], found["memory"]["fits"]) == ("tensor=4", True)
    decode, prefill = found["programs"]["decode"], found["programs"]["prefill"]
    sums = [line for line in decode["collectives"] if (line["place"], line["kind"]) == ("step", "all-reduce")]
    assert [(line["count"], line["payload_bytes"], line["group_size"]) for line in sums] == [(2 * 2, 16 * 4096 * 2, 4)]
    assert decode["copies"] == prefill["copies"] == []
    assert decode["kernels"] == 2 and prefill["kernels"] == 4
    assert decode["roofline"]["sent_bytes"] <= decode["sent_bytes"] <= 1.01 * decode["roofline"]["sent_bytes"]
    assert prefill["overlap"] > 0
    assert len(list((tmp_path / "hlo").glob("*.hlo"))) == 2
    compile_cli._print(found)
    text = capsys.readouterr().out
    assert "fits" in text and "decode_loop[16 slots]" in text and "4 x all-reduce of 128.00 KiB" in text
    decode["copies"] = [{"argument": f"weight {i}"} for i in range(10)]
    compile_cli._print(found)
    assert "weight 7 and 2 more" in " ".join(capsys.readouterr().out.split())


def test_options_of_the_compiler_are_for_what_is_compiled_for() -> None:
    tiles, roundings = "xla_tpu_control_large_2nd_minor_layout_for_x16", "xla_allow_excess_precision"
    assert compiler_options(EngineConfig()) == {}
    with topology.targeting(devices.named("v6e")):
        assert compiler_options(EngineConfig()) == {}
    with topology.targeting(devices.named("tpu7x")):
        assert compiler_options(EngineConfig()) == {tiles: False}
        assert compiler_options(EngineConfig(invariant=True)) == {tiles: False, roundings: False}


@pytest.mark.accelerators
@pytest.mark.timeout(900)
def test_a_batch_too_large_is_compiled_with_fewer_pages_and_does_not_fit(
    small_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (small_model, "--device", "v5e:1x1", "--batch", "128", "--context", "16384", "--prefill-chunk", "0")
    assert compile_cli.run(arguments(*words, "--json")) == 1
    found = json.loads(capsys.readouterr().out)["memory"]
    assert not found["fits"] and found["headroom_bytes"] < 0
    assert found["compiled_with_kv_bytes"] < found["limit_bytes"] < found["kv_bytes"]
    [fit] = [entry["sequences"] for entry in found["capacity"] if entry["length"] == 8192]
    assert 0 < fit < 2 * 128
    assert compile_cli.run(arguments(*words, "--json", "--kv-dtype", "int8")) == 0


@pytest.mark.accelerators
@pytest.mark.timeout(900)
def test_a_program_that_needs_more_beside_its_pages_is_compiled_with_fewer(
    small_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 8,192 tokens a step has more temporaries than the share of memory that is left for them at first."""
    words = (small_model, "--device", "v5e:1x1", "--batch", "128", "--context", "16384", "--prefill-chunk", "8192")
    assert compile_cli.run(arguments(*words, "--json")) == 1
    found = json.loads(capsys.readouterr().out)
    memory, prefill = found["memory"], found["programs"]["prefill"]
    assert "hbm" in prefill["refused"].lower() and "error" not in prefill
    assert memory["temporary_bytes"] > compile_report.SPARE_SHARES[0] * memory["limit_bytes"]
    assert memory["needed_bytes"] == sum(memory[f"{part}_bytes"] for part in ("weight", "kv", "slot", "temporary"))
    assert prefill["kv_bytes"] == memory["compiled_with_kv_bytes"] < memory["kv_bytes"]
    assert memory["headroom_bytes"] < 0 and memory["capacity"]
