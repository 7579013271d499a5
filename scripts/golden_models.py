"""The tiny models of tests/goldens/: two shapes per architecture, the second one awkward.

Awkward means: a head size that is not hidden_size / heads, an odd number of layers, one K/V head, the other choice of
tied embeddings, where the architecture allows it. `make_goldens.py` gives them weights and writes them down.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf
from golden_gemmas import ALL_GEMMAS
from golden_mini import MiniConfig, MiniForCausalLM
from golden_shapes import (
    AWKWARD,
    HEAD,
    ORIGINAL,
    PLAIN,
    QUIET,
    TIED,
    UNTIED,
    WINDOW,
    Spec,
    layers,
    scaled,
)
from torch import nn

LLAMA3 = scaled(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=ORIGINAL
)
YARN = scaled("yarn", factor=8.0, original_max_position_embeddings=ORIGINAL, beta_fast=4.0, beta_slow=0.25)
# The shape other tests count on: kept as it was first made.
LLAMA_SHAPE = PLAIN | {"vocab_size": 192, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}


def factors(number: int, first: float, step: float) -> list[float]:
    return [first + step * index for index in range(number)]


def longrope(num_rotary_dims: int, **fields: Any) -> dict[str, Any]:
    """Frequencies slowed one by one; `factor` is left to be max_position / original."""
    half = num_rotary_dims // 2
    lists: dict[str, Any] = {"short_factor": factors(half, 1.0, 0.05), "long_factor": factors(half, 1.2, 0.7)}
    return scaled("longrope", original_max_position_embeddings=ORIGINAL, **lists, **fields)


def llama(shape: dict[str, Any], **fields: Any) -> Callable[[], nn.Module]:
    return lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**(shape | fields)))


LLAMAS = {
    "llama": Spec(llama(LLAMA_SHAPE, **HEAD, **TIED, **LLAMA3, rms_norm_eps=1e-5), "llama3 rope, tied, GQA"),
    "llama_awkward": Spec(
        llama(AWKWARD, **HEAD, **UNTIED, attention_bias=True, mlp_bias=True),
        "biases of attention and MLP, MQA, untied",
        hub_form=True,
    ),
    "llama_linear": Spec(llama(PLAIN, **UNTIED, **scaled("linear", factor=4.0)), "linear rope", hub_form=True),
    "llama_dynamic": Spec(
        llama(PLAIN | {"max_position_embeddings": ORIGINAL}, **UNTIED, **scaled("dynamic", factor=4.0)),
        "dynamic NTK rope, prompt and continuation past the original context",
        cached_differs="a token in the cache keeps the frequencies of the length at which it was written",
    ),
    "llama_yarn": Spec(llama(PLAIN, **TIED, **YARN), "yarn rope with its attention factor", hub_form=True),
    "llama_longrope": Spec(llama(PLAIN, **UNTIED, **longrope(8)), "longrope, past the original context"),
}


def mistral(shape: dict[str, Any], **fields: Any) -> Callable[[], nn.Module]:
    return lambda: hf.MistralForCausalLM(hf.MistralConfig(**(shape | fields)))


def ministral(shape: dict[str, Any], **fields: Any) -> Callable[[], nn.Module]:
    return lambda: hf.MinistralForCausalLM(hf.MinistralConfig(**(shape | fields)))


def mixtral(shape: dict[str, Any], **fields: Any) -> Callable[[], nn.Module]:
    return lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**(shape | {"intermediate_size": 24} | fields)))


MISTRALS = {
    "mistral": Spec(mistral(PLAIN, **UNTIED, sliding_window=WINDOW), "a window in every layer", hub_form=True),
    "mistral_awkward": Spec(mistral(AWKWARD, **HEAD, **TIED, sliding_window=None), "NeMo's: no window, wide heads"),
    "ministral": Spec(ministral(PLAIN, **HEAD, **UNTIED, **layers("sfsf"), sliding_window=24), "mixed layers"),
    "ministral_awkward": Spec(ministral(AWKWARD, **HEAD, **TIED, **layers("ffs"), sliding_window=WINDOW), "MQA, mixed"),
    "mixtral": Spec(mixtral(PLAIN, **UNTIED, num_local_experts=4, num_experts_per_tok=2), "experts", hub_form=True),
    "mixtral_awkward": Spec(
        mixtral(AWKWARD, **HEAD, **TIED, num_local_experts=5, num_experts_per_tok=3, sliding_window=WINDOW),
        "3 of 5 experts, window, MQA",
    ),
}


def qwen2(shape: dict[str, Any], **fields: Any) -> Callable[[], nn.Module]:
    return lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**(shape | fields)))


def qwen3(shape: dict[str, Any], **fields: Any) -> Callable[[], nn.Module]:
    return lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**(shape | HEAD | fields)))


def qwen3_moe(shape: dict[str, Any], **fields: Any) -> Callable[[], nn.Module]:
    return lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**(shape | HEAD | {"moe_intermediate_size": 16} | fields)))


SLIDING_QWEN = {"use_sliding_window": True, "sliding_window": WINDOW}
QWENS = {
    "qwen2": Spec(
        qwen2(PLAIN, **TIED, sliding_window=WINDOW), "biases of q, k, v; a window that is off", hub_form=True
    ),
    "qwen2_awkward": Spec(
        qwen2(AWKWARD, **UNTIED, **SLIDING_QWEN, max_window_layers=2), "windows from layer 2 on, MQA", hub_form=True
    ),
    "qwen3": Spec(qwen3(PLAIN, **UNTIED), "norms of q and k"),
    "qwen3_awkward": Spec(
        qwen3(AWKWARD, **TIED, **SLIDING_QWEN, **layers("sfs"), attention_bias=True),
        "norms, biases, mixed layers",
        embedding_std=QUIET,
        query_gain=2.0,
    ),
    "qwen3_moe": Spec(
        qwen3_moe(PLAIN, **UNTIED, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True),
        "experts in every layer, weights that sum to one",
        hub_form=True,
    ),
    "qwen3_moe_awkward": Spec(
        qwen3_moe(
            AWKWARD | {"num_hidden_layers": 5},
            **TIED,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            decoder_sparse_step=2,
            mlp_only_layers=[1],
        ),
        "experts in layer 3 only, weights as they are",
    ),
}


def phi3(shape: dict[str, Any], **fields: Any) -> Callable[[], nn.Module]:
    return lambda: hf.Phi3ForCausalLM(
        hf.Phi3Config(**(shape | {"original_max_position_embeddings": ORIGINAL} | fields))
    )


def starcoder2(shape: dict[str, Any], **fields: Any) -> Callable[[], nn.Module]:
    return lambda: hf.Starcoder2ForCausalLM(hf.Starcoder2Config(**(shape | fields)))


def olmo2(shape: dict[str, Any], **fields: Any) -> Callable[[], nn.Module]:
    return lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**(shape | fields)))


def gpt_oss(shape: dict[str, Any], **fields: Any) -> Callable[[], nn.Module]:
    shape = shape | HEAD | {"num_experts_per_tok": 2, "sliding_window": WINDOW}
    return lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**(shape | UNTIED | fields)))


def mini(**fields: Any) -> Callable[[], nn.Module]:
    return lambda: MiniForCausalLM(MiniConfig(**fields))


UNTRUNCATED_YARN = scaled(
    "yarn", 1000.0, factor=8.0, beta_fast=4.0, beta_slow=0.25, truncate=False, original_max_position_embeddings=ORIGINAL
)
OTHERS = {
    "phi3": Spec(phi3(PLAIN, **UNTIED, **longrope(8), sliding_window=WINDOW), "fused, longrope, window", hub_form=True),
    "phi3_awkward": Spec(
        phi3(AWKWARD | {"hidden_size": 64}, **TIED, **longrope(12, partial_rotary_factor=0.75)),
        "Phi-4-mini's: three quarters of a head rotate, tied, MQA",
        hub_form=True,
    ),
    "starcoder2": Spec(
        starcoder2(PLAIN, **TIED, sliding_window=WINDOW),
        "LayerNorm, biases, plain MLP, window",
        embedding_std=0.2,
        query_gain=2.0,
    ),
    "starcoder2_awkward": Spec(starcoder2(AWKWARD, **UNTIED, use_bias=False), "no biases, MQA", hub_form=True),
    "olmo2": Spec(olmo2(PLAIN, **UNTIED), "norms after, norms of whole q and k", hub_form=True),
    "olmo2_awkward": Spec(
        olmo2(AWKWARD, **TIED, attention_bias=True), "MQA, biases", embedding_std=0.4, query_gain=4.0
    ),
    "gpt_oss": Spec(
        gpt_oss(PLAIN | {"hidden_size": 64, "intermediate_size": 32}, **UNTRUNCATED_YARN, num_local_experts=4),
        "sinks, mixed layers, yarn, clamped experts in MXFP4",
        hub_form=True,
        mxfp4=True,
    ),
    "gpt_oss_awkward": Spec(
        gpt_oss(AWKWARD | {"intermediate_size": 16}, **UNTRUNCATED_YARN, num_local_experts=5, swiglu_limit=1.5),
        "sinks, plain experts, MQA",
    ),
    "jaxinfer_mini": Spec(
        mini(
            hidden_size=32,
            intermediate_size=40,
            num_key_value_heads=2,
            head_dim=8,
            layer_types="ssfssf",
            kv_from=(None, None, None, 1, 0, 2),
        ),
        "K/V shared across layers, GQA",
    ),
    "jaxinfer_mini_awkward": Spec(
        mini(
            hidden_size=40,
            intermediate_size=48,
            num_key_value_heads=1,
            head_dim=16,
            layer_types="fsfss",
            kv_from=(None, None, 0, None, 3),
            tie_word_embeddings=True,
        ),
        "K/V shared across layers, MQA, tied",
    ),
}

MODELS: dict[str, Spec] = LLAMAS | MISTRALS | QWENS | ALL_GEMMAS | OTHERS
