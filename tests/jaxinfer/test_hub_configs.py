"""config.json files as the hub has them, with every field that they have: each is read, and says what it should.

Long lists are written as what makes them; sizes are the real ones, for only the config is read.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jaxinfer.config import ConfigError, KVShape, ModelConfig
from jaxinfer.models import load_config
from jaxinfer.rope import Llama3Scaling, LongScaling, YarnScaling

SAVED = {"torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "initializer_range": 0.02}
LLAMA: dict[str, Any] = SAVED | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
}
LLAMA_3 = LLAMA | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
LLAMA_31_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
MISTRAL: dict[str, Any] = SAVED | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN2: dict[str, Any] = SAVED | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
}
QWEN3: dict[str, Any] = QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "num_attention_heads": 32,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
QWEN3_MOE: dict[str, Any] = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
GEMMA: dict[str, Any] = SAVED | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
GEMMA_2 = GEMMA | {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
GEMMA_3_MULTIMODAL: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "vision_use_head": False},
}
FIVE_TO_ONE = [*["sliding_attention"] * 5, "full_attention"]
FOUR_TO_ONE = [*["sliding_attention"] * 4, "full_attention"]
PHI_3: dict[str, Any] = SAVED | {
    "_name_or_path": "Phi-3",
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
STARCODER_2: dict[str, Any] = SAVED | {
    "architectures": ["Starcoder2ForCausalLM"],
    "attention_dropout": 0.1,
    "residual_dropout": 0.1,
    "embedding_dropout": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 16384,
    "mlp_type": "default",
    "model_type": "starcoder2",
    "norm_epsilon": 1e-05,
    "norm_type": "layer_norm",
    "sliding_window": 4096,
    "use_bias": True,
    "vocab_size": 49152,
}
GEMMA_4_ROPE = {
    "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
}
GEMMA_4_TEXT: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": False,
    "bos_token_id": 2,
    "dtype": "bfloat16",
    "enable_moe_block": False,
    "eos_token_id": 1,
    "expert_intermediate_size": None,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "model_type": "gemma4_text",
    "moe_intermediate_size": None,
    "num_experts": None,
    "num_global_key_value_heads": None,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_parameters": GEMMA_4_ROPE,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "top_k_experts": None,
    "use_bidirectional_attention": None,
    "use_cache": True,
    "use_double_wide_mlp": False,
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
}
GEMMA_4: dict[str, Any] = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "audio_config": None,
    "audio_token_id": 258881,
    "boa_token_id": 256000,
    "boi_token_id": 255999,
    "dtype": "bfloat16",
    "eoa_token_id": 258883,
    "eoa_token_index": 258883,
    "eoi_token_id": 258882,
    "eos_token_id": [1, 106],
    "image_token_id": 258880,
    "initializer_range": 0.02,
    "model_type": "gemma4",
    "tie_word_embeddings": True,
    "transformers_version": "5.5.0.dev0",
    "video_token_id": 258884,
    "vision_config": {"model_type": "gemma4_vision"},
    "vision_soft_tokens_per_image": 280,
}


def sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


def long_rope(kind: str, num_pairs: int = 48) -> dict[str, Any]:
    return {"type": kind, "short_factor": [1.0] * num_pairs, "long_factor": [1, *[32.1] * (num_pairs - 1)]}


def read(tmp_path: Path, *parts: dict[str, Any]) -> ModelConfig:
    whole = {name: value for part in parts for name, value in part.items()}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    return load_config(tmp_path)


def windows(config: ModelConfig) -> list[int | None]:
    return [layer.window for layer in config.layers]


def rope(config: ModelConfig, index: int = 0) -> Any:
    found = config.layers[index].rope
    assert found is not None
    return found


def test_llama_2_7b(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        LLAMA | sizes(4096, 11008, 32, 32, 32),
        {"_name_or_path": "meta-llama/Llama-2-7b-hf", "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-05},
        {"max_position_embeddings": 4096, "rope_scaling": None, "vocab_size": 32000},
    )
    assert (config.head_dim, config.max_position, config.eos_token_ids) == (128, 4096, (2,))
    assert (rope(config).theta, rope(config).scaling, config.norm.eps) == (10000.0, None, 1e-05)


def test_llama_3_8b(tmp_path: Path) -> None:
    own = {"eos_token_id": 128001, "max_position_embeddings": 8192, "rope_scaling": None}
    config = read(tmp_path, LLAMA_3, sizes(4096, 14336, 32, 32, 8), own)
    assert (rope(config).theta, rope(config).scaling, config.max_position) == (500000.0, None, 8192)


@pytest.mark.parametrize("rehosted", [{}, {"unsloth_fixed": True, "unsloth_version": "2024.9", "pad_token_id": 128004}])
def test_llama_3_1_8b_instruct(tmp_path: Path, rehosted: dict[str, Any]) -> None:
    own = {"max_position_embeddings": 131072, "rope_scaling": LLAMA_31_ROPE}
    config = read(tmp_path, LLAMA_3, sizes(4096, 14336, 32, 32, 8), own, rehosted)
    assert (config.max_position, config.eos_token_ids) == (131072, (128001, 128008, 128009))
    assert rope(config).scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)


def test_llama_3_2_1b(tmp_path: Path) -> None:
    own = {"head_dim": 64, "max_position_embeddings": 131072, "tie_word_embeddings": True}
    scaling = {"rope_scaling": LLAMA_31_ROPE | {"factor": 32.0}}
    config = read(tmp_path, LLAMA_3, sizes(2048, 8192, 16, 32, 8), own, scaling)
    assert (config.head_dim, config.tie_embeddings, rope(config).scaling.factor) == (64, True, 32.0)


@pytest.mark.parametrize(
    ("version", "own", "window", "theta"),
    [
        ("v0.1", {"sliding_window": 4096, "rope_theta": 10000.0}, 4096, 1e4),
        ("v0.2", {"sliding_window": None, "rope_theta": 1000000.0, "attention_dropout": 0.0}, None, 1e6),
        ("v0.3", {"sliding_window": None, "rope_theta": 1000000.0, "vocab_size": 32768}, None, 1e6),
        ("Ministral-8B-2410", {"sliding_window": 32768, "rope_theta": 1e8, "head_dim": 128}, None, 1e8),
    ],
)
def test_mistral_7b(tmp_path: Path, version: str, own: dict[str, Any], window: int | None, theta: float) -> None:
    config = read(tmp_path, MISTRAL, {"_name_or_path": version}, own)
    assert windows(config) == [window] * 32
    assert (rope(config).theta, config.max_position, config.kv_heads, config.head_dim) == (theta, 32768, 8, 128)


def test_mistral_nemo_has_smaller_heads_than_its_width(tmp_path: Path) -> None:
    own = {"head_dim": 128, "max_position_embeddings": 1024000, "rope_theta": 1000000.0, "sliding_window": None}
    config = read(tmp_path, MISTRAL, sizes(5120, 14336, 40, 32, 8), own, {"vocab_size": 131072})
    assert (config.head_dim, config.max_position, config.vocab_size) == (128, 1024000, 131072)
    assert windows(config) == [None] * 40


def test_mixtral_8x7b(tmp_path: Path) -> None:
    own = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "rope_theta": 1000000.0}
    experts = {"num_experts_per_tok": 2, "num_local_experts": 8, "router_aux_loss_coef": 0.02}
    rest = {"output_router_logits": False, "attention_dropout": 0.0, "sliding_window": None}
    config = read(tmp_path, MISTRAL, own, experts, rest)
    spec = config.layers[31].experts
    assert spec is not None and (spec.num_experts, spec.per_token, spec.ffn_size) == (8, 2, 14336)
    assert (spec.renormalize, rope(config).theta) == (True, 1e6)


def test_mixtral_without_a_theta_has_its_own_default(tmp_path: Path) -> None:
    config = read(tmp_path, MISTRAL, {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"})
    assert rope(config).theta == 1e6


@pytest.mark.parametrize(
    ("own", "tied"),
    [
        (sizes(896, 4864, 24, 14, 2) | {"sliding_window": 32768, "max_window_layers": 24}, True),
        (
            sizes(3584, 18944, 28, 28, 4) | {"sliding_window": 131072, "max_window_layers": 28, "use_mrope": False},
            False,
        ),
    ],
)
def test_qwen_2_5(tmp_path: Path, own: dict[str, Any], tied: bool) -> None:
    size = {"max_position_embeddings": 32768, "tie_word_embeddings": tied, "vocab_size": 151936}
    config = read(tmp_path, QWEN2, size, own)
    assert (config.qkv_bias, config.o_bias, config.qk_norm, config.tie_embeddings) == (True, False, None, tied)
    assert windows(config) == [None] * own["num_hidden_layers"]


def test_qwen_2_5_with_the_yarn_of_its_model_card(tmp_path: Path) -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    own = {"max_position_embeddings": 32768, "max_window_layers": 28, "sliding_window": 131072, "rope_scaling": scaling}
    config = read(tmp_path, QWEN2, sizes(3584, 18944, 28, 28, 4), own, {"vocab_size": 152064})
    assert config.max_position == 131072
    assert isinstance(rope(config).scaling, YarnScaling)


def test_qwen3_8b(tmp_path: Path) -> None:
    config = read(tmp_path, QWEN3, sizes(4096, 12288, 36, 32, 8), {"max_window_layers": 36})
    assert (config.qk_norm, config.qkv_bias, config.head_dim, config.max_position) == ("head", False, 128, 40960)


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"max_position_embeddings": 262144, "rope_theta": 10000000},
        {  # Qwen3-Coder-30B-A3B-Instruct
            "intermediate_size": 5472,
            "max_window_layers": 28,
            "qkv_bias": False,
            "router_aux_loss_coef": 0.0,
            "shared_expert_intermediate_size": 0,
            "use_qk_norm": True,
        },
    ],
)
def test_qwen3_30b_a3b(tmp_path: Path, own: dict[str, Any]) -> None:
    config = read(tmp_path, QWEN3_MOE, own)
    assert all(layer.experts is not None and layer.experts.num_experts == 128 for layer in config.layers)
    spec = config.layers[0].experts
    assert spec is not None and (spec.per_token, spec.ffn_size, spec.renormalize) == (8, 768, True)
    assert windows(config) == [None] * 48 and not config.qkv_bias


def test_gemma_names_one_activation(tmp_path: Path) -> None:
    own = {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", "max_position_embeddings": 8192}
    shape = sizes(2048, 16384, 18, 8, 1)
    assert read(tmp_path, GEMMA, shape, own).activation.name == "gelu_tanh"
    assert read(tmp_path, GEMMA, shape, own, {"hidden_act": "silu"}).activation.name == "silu"
    with pytest.raises(ConfigError, match="hidden_act='relu' is not supported"):
        read(tmp_path, GEMMA, shape, own, {"hidden_act": "relu"})


@pytest.mark.parametrize("activation", [None, "gelu_pytorch_tanh"])
def test_gemma_2b(tmp_path: Path, activation: str | None) -> None:
    own = {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", "max_position_embeddings": 8192}
    act = {"hidden_act": "gelu", "hidden_activation": activation, "rope_scaling": None}
    config = read(tmp_path, GEMMA, sizes(2048, 16384, 18, 8, 1), own, act)
    assert (config.activation.name, config.norm.offset, config.embed_scale) == ("gelu_tanh", 1.0, 2048**0.5)
    assert (config.tie_embeddings, config.norm_place, config.kv_heads) == (True, "before", 1)


@pytest.mark.parametrize(
    ("own", "scale"),
    [
        (sizes(2304, 9216, 26, 8, 4), 256**-0.5),
        (sizes(3584, 14336, 42, 16, 8) | {"sliding_window_size": 4096}, 256**-0.5),
        (
            sizes(4608, 36864, 46, 32, 16)
            | {
                "head_dim": 128,
                "query_pre_attn_scalar": 144,
                "sliding_window_size": 4096,
                "_attn_implementation": "eager",
            },
            1 / 12,
        ),
    ],
)
def test_gemma_2(tmp_path: Path, own: dict[str, Any], scale: float) -> None:
    config = read(tmp_path, GEMMA_2, own)
    assert windows(config)[:3] == [4096, None, 4096]
    assert (config.attention_softcap, config.logit_softcap, config.norm_place) == (50.0, 30.0, "around")
    assert config.attention_scale == pytest.approx(scale)


@pytest.mark.parametrize(
    "own",
    [
        {"cache_implementation": "hybrid", "sliding_window_pattern": 6, "num_hidden_layers": 26, "sliding_window": 512},
        {
            "_sliding_window_pattern": 6,
            "layer_types": FIVE_TO_ONE * 3,
            "num_hidden_layers": 18,
            "sliding_window": 512,
            "use_bidirectional_attention": False,
        },
    ],
)
def test_gemma_3_text(tmp_path: Path, own: dict[str, Any]) -> None:
    shared = sizes(1152, 6912, 0, 4, 1) | {"max_position_embeddings": 32768, "vocab_size": 262144}
    kind = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "eos_token_id": [1, 106]}
    caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 256}
    ropes = {"rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000}
    act = {"hidden_activation": "gelu_pytorch_tanh"}
    config = read(tmp_path, GEMMA, shared, kind, caps, ropes, act, own)
    assert windows(config)[:6] == [512] * 5 + [None]
    assert (rope(config, 0).theta, rope(config, 5).theta, config.qk_norm) == (1e4, 1e6, "head")


def test_gemma_3_4b_leaves_out_what_is_default(tmp_path: Path) -> None:
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = read(tmp_path, GEMMA_3_MULTIMODAL, {"text_config": text})
    assert (config.vocab_size, config.q_heads, config.kv_heads, config.head_dim) == (262208, 8, 4, 256)
    assert (config.tie_embeddings, config.max_position, config.eos_token_ids) == (True, 131072, (1, 106))
    assert (windows(config)[5], windows(config)[33], rope(config, 5).scaling.factor) == (None, 1024, 8.0)
    assert rope(config, 0).scaling is None


def test_gemma_3_27b(tmp_path: Path) -> None:
    text = sizes(5376, 21504, 62, 32, 16) | {"head_dim": 128, "model_type": "gemma3_text", "query_pre_attn_scalar": 168}
    own = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    config = read(tmp_path, GEMMA_3_MULTIMODAL, {"text_config": text | own})
    assert (config.head_dim, config.attention_scale) == (128, 168**-0.5)


def test_gemma_3n_e2b(tmp_path: Path) -> None:
    text = sizes(2048, 0, 30, 8, 2) | {
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 20,
        "altup_active_idx": 0,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_lr_multiplier": 1.0,
        "altup_num_inputs": 4,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 256,
        "initializer_range": 0.02,
        "intermediate_size": [8192] * 30,
        "laurel_rank": 64,
        "layer_types": FOUR_TO_ONE * 6,
        "max_position_embeddings": 32768,
        "model_type": "gemma3n_text",
        "num_kv_shared_layers": 10,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": 512,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 262400,
        "vocab_size_per_layer_input": 262144,
    }
    outer = {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "audio_config": {"model_type": "gemma3n_audio"},
        "audio_soft_tokens_per_image": 188,
        "audio_token_id": 262273,
        "boa_token_id": 256000,
        "boi_token_id": 255999,
        "eoa_token_id": 262272,
        "eoi_token_id": 262144,
        "eos_token_id": [1, 106],
        "image_token_id": 262145,
        "initializer_range": 0.02,
        "model_type": "gemma3n",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.53.0.dev0",
        "vision_config": {"model_type": "gemma3n_vision"},
        "vision_soft_tokens_per_image": 256,
    }
    config = read(tmp_path, outer, {"text_config": text})
    assert [layer.kv_from for layer in config.layers[18:25]] == [None, None, 18, 18, 18, 18, 19]
    assert [layer.activation_sparsity for layer in config.layers[8:12]] == [0.95, 0.95, 0.0, 0.0]
    assert config.per_layer_input is not None and config.per_layer_input.vocab_size == 262144
    assert (config.attention_scale, config.logit_softcap, config.eos_token_ids) == (1.0, 30.0, (1, 106))


def test_gemma_4_e2b_and_e4b(tmp_path: Path) -> None:
    e2b = sizes(1536, 6144, 35, 8, 1) | {"num_kv_shared_layers": 20, "use_double_wide_mlp": True}
    own = {"hidden_size_per_layer_input": 256, "layer_types": FOUR_TO_ONE * 7}
    audio = {"audio_config": {"model_type": "gemma4_audio"}}
    config = read(tmp_path, GEMMA_4, audio, {"text_config": GEMMA_4_TEXT | e2b | own})
    assert [layer.ffn_size for layer in config.layers[14:16]] == [None, 12288]
    assert (config.kv_shape(0), config.kv_shape(4)) == (KVShape(1, 256), KVShape(1, 512))
    assert (config.layers[15].kv_from, config.layers[34].kv_from) == (13, 14)
    e4b = sizes(2560, 10240, 42, 8, 2) | {"num_kv_shared_layers": 18}
    own = {"hidden_size_per_layer_input": 256, "layer_types": FIVE_TO_ONE * 7}
    rehosted = {"model_name": "unsloth/gemma-4-E4B-it", "unsloth_fixed": True, "unsloth_version": "2026.4.4"}
    tokens = {"bos_token_id": 2, "eos_token_id": 106, "pad_token_id": 0}
    config = read(tmp_path, GEMMA_4, audio, tokens, rehosted, {"text_config": GEMMA_4_TEXT | e4b | own})
    assert [config.layers[index].kv_from for index in (23, 24, 29)] == [None, 22, 23]
    assert config.eos_token_ids == (106, 1)


def test_gemma_4_31b_and_26b_a4b(tmp_path: Path) -> None:
    shared = {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "max_position_embeddings": 262144}
    rest = {"num_kv_shared_layers": 0, "sliding_window": 1024, "use_bidirectional_attention": "vision"}
    dense = sizes(5376, 21504, 60, 32, 16) | {"num_global_key_value_heads": 4, "layer_types": FIVE_TO_ONE * 10}
    config = read(tmp_path, GEMMA_4, {"text_config": GEMMA_4_TEXT | shared | rest | dense})
    assert (config.kv_shape(0), config.kv_shape(5)) == (KVShape(16, 256), KVShape(4, 512))
    assert (config.layers[0].k_eq_v, config.layers[5].k_eq_v, config.per_layer_input) == (False, True, None)
    assert (rope(config, 5).num_turning, config.eos_token_ids) == (64, (1, 106))
    sparse = sizes(2816, 2112, 30, 16, 8) | {"num_global_key_value_heads": 2, "layer_types": FIVE_TO_ONE * 5}
    experts = {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
    config = read(tmp_path, GEMMA_4, {"text_config": GEMMA_4_TEXT | shared | rest | sparse | experts})
    spec = config.layers[0].experts
    assert spec is not None and (spec.num_experts, spec.per_token, spec.ffn_size) == (128, 8, 704)


@pytest.mark.parametrize(
    ("own", "window"),
    [
        ({"max_position_embeddings": 4096, "rope_scaling": None, "sliding_window": 2047}, 2047),
        ({"rope_scaling": long_rope("longrope"), "sliding_window": 262144}, None),
        ({"rope_scaling": long_rope("su"), "sliding_window": 262144}, None),
    ],
)
def test_phi_3_mini_and_3_5(tmp_path: Path, own: dict[str, Any], window: int | None) -> None:
    config = read(tmp_path, PHI_3, own)
    assert windows(config) == [window] * 32 and config.head_dim == 96
    if window is None:
        scaling = rope(config).scaling
        assert isinstance(scaling, LongScaling)
        assert (scaling.original_max_position, config.max_position) == (4096, 131072)
        assert scaling.attention_factor == pytest.approx(1.1902380714238083)


def test_phi_4(tmp_path: Path) -> None:
    own = {"max_position_embeddings": 16384, "original_max_position_embeddings": 16384, "rope_theta": 250000}
    rest = {"auto_map": {}, "rope_scaling": None, "sliding_window": None, "bos_token_id": 100257, "vocab_size": 100352}
    config = read(tmp_path, PHI_3, sizes(5120, 17920, 40, 40, 10), own, rest)
    assert (rope(config).theta, rope(config).scaling, windows(config)[0]) == (250000, None, None)


def test_phi_4_as_llama(tmp_path: Path) -> None:
    own = {"max_position_embeddings": 16384, "original_max_position_embeddings": 16384, "rope_theta": 250000}
    rest = {"_attn_implementation_autoset": True, "unsloth_fixed": True, "rope_scaling": None}
    config = read(tmp_path, LLAMA_3, sizes(5120, 17920, 40, 40, 10), own, rest)
    assert (rope(config).theta, rope(config).scaling, config.max_position) == (250000, None, 16384)


def test_phi_4_mini(tmp_path: Path) -> None:
    own = {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False}
    rest = {"partial_rotary_factor": 0.75, "rope_scaling": long_rope("longrope"), "sliding_window": 262144}
    tied = {"tie_word_embeddings": True, "vocab_size": 200064}
    config = read(tmp_path, PHI_3, sizes(3072, 8192, 32, 24, 8), own, rest, tied)
    assert (config.head_dim, rope(config).rotary_dim, config.tie_embeddings) == (128, 96, True)


@pytest.mark.parametrize(
    ("own", "tied"),
    [
        (sizes(3072, 12288, 30, 24, 2) | {"rope_theta": 999999.4420358813}, True),
        (sizes(4608, 18432, 32, 36, 4) | {"rope_theta": 1000000}, True),
        (
            sizes(6144, 24576, 40, 48, 4) | {"rope_theta": 100000, "rms_norm_eps": 1e-05, "tie_word_embeddings": False},
            False,
        ),
    ],
)
def test_starcoder2(tmp_path: Path, own: dict[str, Any], tied: bool) -> None:
    config = read(tmp_path, STARCODER_2, own)
    assert (config.norm.kind, config.gated_mlp, config.mlp_bias, config.tie_embeddings) == ("layer", False, True, tied)
    assert windows(config) == [4096] * len(config.layers) and config.activation.name == "gelu_tanh"


def test_olmo_2_7b(tmp_path: Path) -> None:
    own = {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False, "hidden_act": "silu"}
    rest = {"attention_dropout": 0.0, "eos_token_id": 100257, "pad_token_id": 100277, "rms_norm_eps": 1e-06}
    ropes = {"rope_scaling": None, "rope_theta": 500000, "max_position_embeddings": 4096}
    last = {"tie_word_embeddings": False, "vocab_size": 100352}
    config = read(tmp_path, SAVED, sizes(4096, 11008, 32, 32, 32), own, rest, ropes, last)
    assert (config.qk_norm, config.norm_place, rope(config).theta) == ("projection", "after", 500000)


GPT_OSS: dict[str, Any] = sizes(2880, 2880, 24, 64, 8) | {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_experts_per_tok": 4,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}


def test_gpt_oss_20b(tmp_path: Path) -> None:
    config = read(tmp_path, GPT_OSS)
    spec, scaling = config.layers[0].experts, rope(config).scaling
    assert spec is not None and (spec.num_experts, spec.per_token, spec.routing) == (32, 4, "top_k_then_softmax")
    assert (windows(config)[:2], config.sinks, config.max_position) == ([128, None], True, 131072)
    assert (scaling.factor, scaling.truncate, config.quantization is not None) == (32.0, False, True)
    without = {name: value for name, value in GPT_OSS.items() if name not in ("rope_scaling", "rope_theta")}
    assert read(tmp_path, without).layers == config.layers  # transformers' defaults are the model's own rope
    assert dataclasses.replace(config, quantization=None) == read(tmp_path, GPT_OSS, {"quantization_config": None})


@pytest.mark.parametrize(
    ("parts", "refused"),
    [
        ([QWEN3_MOE, {"qkv_bias": True}], "qkv_bias=True"),
        ([QWEN3_MOE, {"shared_expert_intermediate_size": 512}], "shared_expert_intermediate_size=512"),
        ([QWEN3_MOE, {"use_qk_norm": False}], "use_qk_norm=False"),
        ([GEMMA_2, sizes(2304, 9216, 26, 8, 4), {"sliding_window_size": 512}], "sliding_window_size=512"),
        ([QWEN2, sizes(896, 4864, 24, 14, 2), {"dual_chunk_attention_config": {"chunk_size": 262144}}], "dual_chunk"),
    ],
)
def test_what_would_change_the_model_stays_refused(tmp_path: Path, parts: list[dict[str, Any]], refused: str) -> None:
    with pytest.raises(ConfigError, match=refused):
        read(tmp_path, {"max_position_embeddings": 32768, "vocab_size": 151936}, *parts)


@pytest.mark.parametrize("pattern", [0, -1])
def test_a_pattern_of_no_layers_is_named(tmp_path: Path, pattern: int) -> None:
    text = sizes(2560, 10240, 34, 8, 4) | {"model_type": "gemma3_text", "sliding_window_pattern": pattern}
    with pytest.raises(ConfigError, match=f"sliding_window_pattern={pattern} must be at least 1"):
        read(tmp_path, GEMMA_3_MULTIMODAL, {"text_config": text})
