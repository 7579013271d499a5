"""config.json -> ModelConfig: what is read, what is ignored, and that everything else is refused by name."""

import importlib
import inspect
import json
from collections import Counter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from jaxinfer.config import ConfigError, ModelConfig, page_groups
from jaxinfer.models import ARCHITECTURES, load_config, weight_source
from jaxinfer.models.transformer import abstract_parameters
from jaxinfer.rope import Llama3Scaling

GOLDENS = sorted((Path(__file__).parent.parent / "goldens").iterdir())
SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
WINDOWED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]


def read(tmp_path: Path, architecture: str = "LlamaForCausalLM", generation: Any = None, **fields: Any) -> ModelConfig:
    """load_config of SMALL with `fields` changed; a value of ... removes one."""
    hf = {"architectures": [architecture]} | SMALL | fields
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in hf.items() if v is not ...}))
    if generation is not None:
        text = generation if isinstance(generation, str) else json.dumps(generation)
        (tmp_path / "generation_config.json").write_text(text)
    return load_config(tmp_path)


def read_golden(tmp_path: Path, golden: Path, **fields: Any) -> ModelConfig:
    """load_config of a golden model with `fields` changed."""
    hf = json.loads((golden / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(hf))
    return load_config(tmp_path)


def windows(config: ModelConfig) -> list[int | None]:
    return [layer.window for layer in config.layers]


def test_every_field_lands_where_it_belongs(tmp_path: Path) -> None:
    config = read(tmp_path, head_dim=32, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    assert config.architecture == "LlamaForCausalLM"
    assert (config.vocab_size, config.embed_size, config.ffn_size, config.max_position) == (100, 64, 96, 128)
    assert (config.q_heads, config.kv_heads, config.head_dim, config.norm.eps) == (4, 2, 32, 1e-5)
    assert (config.tie_embeddings, config.bos_token_id, config.eos_token_ids) == (True, 1, (2,))
    assert windows(config) == [None] * 4


def test_defaults(tmp_path: Path) -> None:
    config = read(tmp_path, num_key_value_heads=...)
    assert (config.kv_heads, config.head_dim, config.tie_embeddings) == (4, 16, False)
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())
    assert config.layers[0].rope is not None and config.layers[0].rope.theta == 10000.0
    assert read(tmp_path, head_dim=None, num_key_value_heads=None) == config
    assert isinstance(load_config(str(tmp_path)), ModelConfig)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3"}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3", "rope_type": "llama3"}},
        {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 500000}},
        {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}, "rope_theta": 5e5},
    ],
)
def test_llama3_rope_scaling_of_every_transformers_version(tmp_path: Path, fields: dict[str, Any]) -> None:
    rope = read(tmp_path, **fields).layers[3].rope
    assert rope is not None and rope.theta == 5e5
    assert rope.scaling == Llama3Scaling(8.0, 1.0, 4.0, 32)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 1.0}, "rope_theta": 5e5},
    ],
)
def test_unscaled_rope(tmp_path: Path, fields: dict[str, Any]) -> None:
    rope = read(tmp_path, **fields).layers[0].rope
    assert rope is not None and (rope.theta, rope.scaling) == (5e5, None)


def test_mistral_windows(tmp_path: Path) -> None:
    assert windows(read(tmp_path, "MistralForCausalLM", sliding_window=16)) == [16] * 4
    assert windows(read(tmp_path, "MistralForCausalLM", sliding_window=None)) == [None] * 4
    default = read(tmp_path, "MistralForCausalLM", max_position_embeddings=8192)
    assert windows(default) == [4096] * 4  # transformers' default


@pytest.mark.parametrize(("window", "expected"), [(127, 127), (128, None), (129, None), (2**31, None), (10**12, None)])
def test_a_window_that_no_sequence_outgrows_is_none(tmp_path: Path, window: int, expected: int | None) -> None:
    assert windows(read(tmp_path, "MistralForCausalLM", sliding_window=window)) == [expected] * 4
    mixed = read(tmp_path, "MinistralForCausalLM", sliding_window=window, layer_types=WINDOWED)
    assert windows(mixed) == [expected, None, None, expected]
    assert len(page_groups(mixed)) == (1 if expected is None else 2)


def test_ministral_layer_types(tmp_path: Path) -> None:
    mixed = read(tmp_path, "MinistralForCausalLM", sliding_window=16, layer_types=WINDOWED)
    assert windows(mixed) == [16, None, None, 16]
    assert windows(read(tmp_path, "MinistralForCausalLM", sliding_window=16)) == [16] * 4
    full = read(tmp_path, "MinistralForCausalLM", sliding_window=None, layer_types=["full_attention"] * 4)
    assert windows(full) == [None] * 4


@pytest.mark.parametrize(
    ("ours", "generation", "expected"),
    [
        (2, None, (2,)),
        ([2, 3], None, (2, 3)),
        (2, {"eos_token_id": [4, 2, 5]}, (2, 4, 5)),
        ([3] * 20, {"eos_token_id": [*range(15)]}, (3, 0, 1, 2, *range(4, 15))),
        (None, {"eos_token_id": 7, "temperature": 0.6, "do_sample": True}, (7,)),
        (..., {}, ()),
    ],
)
def test_end_tokens_of_both_files(tmp_path: Path, ours: Any, generation: Any, expected: tuple[int, ...]) -> None:
    assert read(tmp_path, generation=generation, eos_token_id=ours).eos_token_ids == expected


def test_fields_that_cannot_matter_are_ignored(tmp_path: Path) -> None:
    harmless = {
        "torch_dtype": "float16",
        "dtype": "bfloat16",
        "transformers_version": "4.55.0",
        "model_type": "llama",
        "use_cache": False,
        "initializer_range": 0.5,
        "attention_dropout": 0.1,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "sliding_window": None,
    }
    assert read(tmp_path, **harmless) == read(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_bias": 1}, r"attention_bias=1 must be true or false"),
        ({"mlp_bias": "no"}, r"mlp_bias='no' must be true or false"),
        ({"hidden_act": "relu"}, r"hidden_act='relu' is not supported; supported: silu, swish, gelu"),
        ({"pretraining_tp": 2}, r"pretraining_tp=2 .*supported: pretraining_tp=1"),
        ({"quantization_config": {"quant_method": "hqq"}}, r"quant_method='hqq'.*supported"),
        ({"sliding_window": 16}, r"sliding_window=16 .*supported: its absence"),
        ({"logit_cap": 30.0}, r"unknown field logit_cap=30\.0"),
        ({"rope_scaling": {"type": "mrope", "factor": 2.0}}, r"rope_scaling\.type='mrope'.*supported: default, linear"),
        ({"rope_scaling": {"type": ["linear"]}}, r"rope_scaling\.type=\['linear'\] is not supported"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, r"rope_scaling\.factor=0\.0 must be positive"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, r"factor=0\.5 must be at least 1"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2, "original_max_position_embeddings": 64}},
            r"original_max_position_embeddings=64 must be max_position_embeddings=128",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}},
            r"original_max_position_embeddings=256 must be from 1 to max_position_embeddings=128",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "betafast": 3}}, r"unknown field rope_scaling\.betafast=3"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, r"short_factor=None must list 8 positive numbers"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7}},
            r"long_factor=.* must list one entry for each of 8",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [0.0] * 8}},
            r"long_factor=\[0\.0, .* must list 8 positive numbers",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [float("nan")] * 8, "long_factor": [1.0] * 8}},
            r"short_factor=\[nan, .* must list 8 positive numbers",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1] * 8, "long_factor": [10**400] * 8}},
            r"long_factor=\[10+.* must list 8 positive numbers",
        ),
        (
            {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 1}},
            r"original_max_position_embeddings=1 must be at least 2",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 1e308}}, r"factor=1e\+308 takes a context of 128 .* 2\*\*63"),
        ({"rope_scaling": {"type": "dynamic", "factor": 1e308}}, r"factor=1e\+308 takes a context"),
        ({"rope_scaling": {"type": "yarn", "factor": 1e308}}, r"factor=1e\+308 takes a context"),
        ({"rope_scaling": {"rope_type": "default", "type": "llama3"}}, r"rope_type='default' .*'llama3' differ"),
        ({"rope_scaling": {"rope_type": "llama3"}}, r": rope_scaling\.factor is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": "8"}}, r"rope_scaling\.factor='8' must be a number"),
        ({"rope_scaling": LLAMA3 | {"rope_type": "llama3", "beta": 1}}, r"unknown field rope_scaling\.beta=1"),
        ({"rope_scaling": LLAMA3 | {"type": "llama3", "high_freq_factor": 1.0}}, r"high_freq_factor=1\.0 must be over"),
        ({"rope_scaling": LLAMA3 | {"type": "llama3", "factor": 0}}, r"factor=0\.0 .*positive"),
        ({"rope_scaling": LLAMA3 | {"type": "llama3", "low_freq_factor": -1}}, r"\.low_freq_factor=-1\.0 .*positive"),
        ({"rope_scaling": LLAMA3 | {"type": "llama3", "low_freq_factor": 0}}, r"\.low_freq_factor=0\.0 .*positive"),
        ({"rope_scaling": LLAMA3 | {"type": "llama3", "high_freq_factor": -4}}, r"\.high_freq_factor=-4\.0 .*positive"),
        (
            {"rope_scaling": LLAMA3 | {"type": "llama3", "original_max_position_embeddings": 10**400}},
            r"rope_scaling\.original_max_position_embeddings=10+\.\.\. must be a whole number below 2\*\*63",
        ),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"rope_type": "default"}}, r"differ"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 5e5}, r"rope_theta=500000\.0 .*differ"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0\.5 .*supported: 1\.0"),
        ({"rope_parameters": []}, r"rope_parameters=\[\] must be an object"),
        ({"rope_theta": float("nan")}, r"rope_theta=nan must be finite"),
        ({"rope_theta": -1.0}, r"rope_theta=-1\.0 must be positive"),
        ({"rope_theta": [10000.0]}, r"rope_theta=\[10000\.0\] must be a number"),
        ({"rope_theta": {"a": 1}}, r"rope_theta=\{'a': 1\} must be a number"),
        ({"rope_scaling": {"rope_theta": [1e4]}, "rope_theta": 1e4}, r"rope_scaling\.rope_theta=\[10000\.0\] must be"),
        ({"rope_parameters": {"rope_theta": {"a": 1}}}, r"rope_parameters\.rope_theta=\{'a': 1\} must be a number"),
        ({"rope_theta": 10**400}, r"rope_theta=10+\.\.\. must be finite"),
        ({"rms_norm_eps": 10**400}, r"rms_norm_eps=10+\.\.\. must be finite"),
        ({"rms_norm_eps": -1.0}, r"rms_norm_eps=-1\.0 must not be negative"),
        ({"vocab_size": ...}, r"vocab_size is missing"),
        ({"hidden_size": "64"}, r"hidden_size='64' must be a whole number"),
        ({"rms_norm_eps": None}, r"rms_norm_eps is missing"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers=0 must be from 1 to 10000"),
        ({"num_hidden_layers": 10**18}, r"num_hidden_layers=10+ must be from 1 to 10000"),
        ({"num_attention_heads": 3}, r"hidden_size=64 is not a multiple of num_attention_heads=3"),
        ({"num_key_value_heads": 3}, r"q_heads=4 must be a multiple of kv_heads=3"),
        ({"tie_word_embeddings": 1}, r"tie_word_embeddings=1 must be true or false"),
        ({"eos_token_id": 100}, r"eos_token_id=100 .*vocab_size=100"),
        ({"eos_token_id": [1, "x"]}, r"eos_token_id=\[1, 'x'\]"),
        ({"eos_token_id": [*range(17)]}, r"eos_token_id makes 17 ids; a request has room for 16 stop ids"),
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"'GPT2LMHeadModel' is not supported; supported: .*MistralForCausalLM",
        ),
        ({"architectures": None}, r"architectures=None must name one architecture; supported: LlamaForCausalLM"),
        ({"architectures": [[]]}, r"architecture \[\] is not supported"),
    ],
)
def test_llama_refusals_name_field_value_and_choices(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path, **fields)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("name", ["gemma", "gemma3n", "gemma4"])
def test_a_width_without_a_root_is_refused(tmp_path: Path, name: str) -> None:
    golden = next(path for path in GOLDENS if path.name == name)
    with pytest.raises(ConfigError, match=r"hidden_size=-1 must be from 1"):
        read_golden(tmp_path, golden, hidden_size=-1)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gpt_oss", {"swiglu_limit": 0.0}, r"limit=0\.0 must be positive"),
        ("gpt_oss", {"swiglu_alpha": -1.0}, r"alpha=-1\.0 and limit=7\.0 must be positive"),
        ("gemma3n", {"intermediate_size": 1e308}, r"intermediate_size=1e\+308 must be a whole number"),
        ("gemma3n", {"activation_sparsity_pattern": 1.0}, r"activation_sparsity_pattern=.* must be from 0 to below 1"),
        ("mixtral", {"num_experts_per_tok": 0}, r"per_token=0 experts must be from 1 to num_experts=4"),
        ("jaxinfer_mini", {"kv_from": [None, None, 1, None, None, None]}, r"kv_from\[2\]=1 must be an earlier full"),
    ],
)
def test_what_one_architecture_refuses(tmp_path: Path, name: str, fields: dict[str, Any], message: str) -> None:
    golden = next(path for path in GOLDENS if path.name == name)
    with pytest.raises(ConfigError, match=message):
        read_golden(tmp_path, golden, **fields)


@pytest.mark.parametrize("partial", [-1, 1.5, 1e308])
def test_gemma4_turns_no_more_than_a_head(tmp_path: Path, partial: float) -> None:
    golden = next(path for path in GOLDENS if path.name == "gemma4")
    ropes = json.loads((golden / "config.json").read_text())["rope_parameters"]
    ropes["full_attention"]["partial_rotary_factor"] = partial
    with pytest.raises(ConfigError, match=r"full_attention\.partial_rotary_factor=.* must be from 0 to 1"):
        read_golden(tmp_path, golden, rope_parameters=ropes)


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("MistralForCausalLM", {"layer_types": WINDOWED}, r"unknown field layer_types"),
        ("MistralForCausalLM", {"sliding_window": 0}, r"window=0 must be at least 1"),
        ("MistralForCausalLM", {"sliding_window": "all"}, r"sliding_window='all' must be a whole number"),
        ("MinistralForCausalLM", {"layer_types": WINDOWED[:3]}, r"must list num_hidden_layers=4 layers"),
        ("MinistralForCausalLM", {"layer_types": ["linear"] * 4}, r"'linear'; supported: full_attention, sliding"),
        ("MinistralForCausalLM", {"layer_types": WINDOWED, "sliding_window": None}, r"sliding_window is null"),
    ],
)
def test_mistral_refusals(tmp_path: Path, architecture: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, architecture, **fields)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere does not exist; give a Hugging Face directory"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        load_config(tmp_path)
    for text in ("{", "[" * 100_000, "\xff"):
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ConfigError, match=r"config\.json cannot be read as JSON"):
            load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json must hold a JSON object, not list"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="is not a directory"):
        load_config(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id=100"):
        read(tmp_path, generation={"eos_token_id": 100})
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id makes 17 ids; .* 16 stop ids"):
        read(tmp_path, generation={"eos_token_id": [*range(17)]})
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id makes 18 ids; .* 16 stop ids"):
        read(tmp_path, generation={"eos_token_id": [*range(9)]}, eos_token_id=[*range(50, 59)])
    with pytest.raises(ConfigError, match=r"generation_config\.json cannot be read as JSON: duplicate key 'a'"):
        read(tmp_path, generation='{"a": 1, "a": 1}')
    for text in ('{"vocab_size": 1, "vocab_size": 2}', '{"rope_scaling": {"vocab_size": 1, "vocab_size": 1}}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"config\.json cannot be read as JSON: duplicate key 'vocab_size'"):
            load_config(tmp_path)


@pytest.mark.parametrize("directory", GOLDENS, ids=lambda path: path.name)
def test_every_parameter_has_a_place_of_its_own(directory: Path) -> None:
    config = load_config(directory)
    sources = [weight_source(config, name) for name in abstract_parameters(config, jnp.dtype(jnp.float32))]
    assert len({(source.name, source.part) for source in sources}) == len(sources)
    assert not any("{i}" in source.name for source in sources)


def test_every_architecture_has_two_golden_models() -> None:
    counts = Counter(load_config(directory).architecture for directory in GOLDENS)
    assert counts.keys() <= ARCHITECTURES.keys()
    for architecture in ARCHITECTURES:
        alone = architecture.replace("ForConditionalGeneration", "ForCausalLM")  # the language model inside is the same
        assert counts[alone] >= 2, architecture


def test_a_llama_like_architecture_is_at_most_60_lines() -> None:
    special = {"gemma", "gemma3", "gemma3n", "gemma4"}
    for registered in ARCHITECTURES.values():
        module = registered.partition(":")[0]
        file = Path(inspect.getfile(importlib.import_module(module)))
        if file.stem not in special:
            assert len(file.read_text().splitlines()) <= 60, file.name


def test_shipped_model_loads(shipped_model: Path) -> None:
    config = load_config(shipped_model)
    assert len({layer.window for layer in config.layers}) > 1  # full and sliding layers
    assert config.kv_heads < config.q_heads
