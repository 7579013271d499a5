"""Golden models of the Gemma family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf
from golden_shapes import (
    AWKWARD,
    HEAD,
    PLAIN,
    QUIET,
    TIED,
    UNTIED,
    VOCAB_SIZE,
    WINDOW,
    Spec,
    layers,
    per_type,
)
from torch import nn

QUERY_SCALAR = {"query_pre_attn_scalar": 24}  # neither head size
CAPS = {"attn_logit_softcapping": 6.0, "final_logit_softcapping": 3.0}


def gemma(shape: dict[str, Any], **fields: Any) -> Callable[[], nn.Module]:
    return lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**(shape | HEAD | fields)))


def gemma2(shape: dict[str, Any], **fields: Any) -> Callable[[], nn.Module]:
    shape = shape | HEAD | QUERY_SCALAR | {"sliding_window": WINDOW}
    return lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**(shape | fields)))


def gemma3(shape: dict[str, Any], **fields: Any) -> Callable[[], nn.Module]:
    shape = shape | HEAD | QUERY_SCALAR | {"sliding_window": WINDOW}
    return lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**(shape | fields)))


def gemma3_with_vision() -> nn.Module:
    text = PLAIN | HEAD | QUERY_SCALAR | {"sliding_window": WINDOW, "model_type": "gemma3_text"} | layers("sf")
    tower = {"model_type": "siglip_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision = tower | {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    text.pop("attn_implementation")
    ids = {"boi_token_index": 101, "eoi_token_index": 102, "image_token_index": 103, "mm_tokens_per_image": 4}
    config = hf.Gemma3Config(text_config=text, vision_config=vision, attn_implementation="eager", **ids)
    return hf.Gemma3ForConditionalGeneration(config)


LINEAR_FULL = {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 4.0}
DEFAULT_FULL = {"rope_type": "default", "rope_theta": 1_000_000.0}
GEMMAS = {
    "gemma": Spec(
        gemma(PLAIN | {"num_key_value_heads": 1}, **TIED), "MQA, 1 + w norms, scaled embeddings", embedding_std=QUIET
    ),
    "gemma_awkward": Spec(
        gemma(AWKWARD | {"num_key_value_heads": 4}, **TIED), "MHA", hub_form=True, embedding_std=QUIET
    ),
    "gemma2": Spec(
        gemma2(PLAIN, **TIED, **CAPS, **layers("sf")), "soft caps, four norms", embedding_std=0.07, query_gain=2.0
    ),
    "gemma2_awkward": Spec(gemma2(AWKWARD, **UNTIED, **CAPS, **layers("sfs")), "soft caps, MQA", hub_form=True),
    "gemma3": Spec(
        gemma3(PLAIN | {"intermediate_size": 32}, **TIED, **layers("sssssf"), **per_type(DEFAULT_FULL)),
        "five local layers to a global one, two bases, norms of q and k",
        embedding_std=0.07,
    ),
    "gemma3_awkward": Spec(
        gemma3(AWKWARD, **UNTIED, **layers("sfs"), **per_type(LINEAR_FULL), sliding_window_pattern=2),
        "pattern of two, linear rope in the global layer, MQA",
        hub_form=True,
    ),
    "gemma3_vision": Spec(
        gemma3_with_vision,
        "text_config inside, other names, a vision tower unused",
        hub_form=True,
        embedding_std=0.06,
        query_gain=2.0,
    ),
}


def gemma3n(shape: dict[str, Any], **fields: Any) -> Callable[[], nn.Module]:
    shape = shape | HEAD | {"sliding_window": WINDOW, "vocab_size_per_layer_input": VOCAB_SIZE}
    return lambda: hf.Gemma3nForCausalLM(hf.Gemma3nTextConfig(**(shape | TIED | fields)))


def gemma4(shape: dict[str, Any], **fields: Any) -> Callable[[], nn.Module]:
    shape = shape | HEAD | {"sliding_window": WINDOW, "vocab_size_per_layer_input": VOCAB_SIZE}
    return lambda: hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**(shape | TIED | fields)))


def gemma4_with_vision() -> nn.Module:
    shape = PLAIN | HEAD | TIED | {"sliding_window": WINDOW, "vocab_size_per_layer_input": VOCAB_SIZE}
    text = shape | {"model_type": "gemma4_text", "global_head_dim": 24, "hidden_size_per_layer_input": 6} | layers("sf")
    text.pop("attn_implementation")
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4}
    vision = tower | {"num_key_value_heads": 2, "patch_size": 2, "position_embedding_size": 4, "pooling_kernel_size": 1}
    ids = {"boi_token_id": 101, "eoi_token_id": 102, "image_token_id": 103, "video_token_id": 104}
    config = hf.Gemma4Config(text_config=text, vision_config=vision, attn_implementation="eager", **ids)
    return hf.Gemma4ForConditionalGeneration(config)


PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000.0}
GEMMAS_WITH_LAYER_INPUTS = {
    "gemma3n": Spec(
        gemma3n(
            PLAIN | {"intermediate_size": 24},
            **layers("sfsf"),
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=6,
            laurel_rank=4,
            altup_num_inputs=3,
            activation_sparsity_pattern=[0.5, 0.5, 0.0, 0.0],
            **per_type(DEFAULT_FULL),
        ),
        "AltUp, Laurel, per-layer inputs, sparse activations, shared K/V",
        embedding_std=0.2,
    ),
    "gemma3n_awkward": Spec(
        gemma3n(
            AWKWARD | {"hidden_size": 24, "intermediate_size": [16, 24, 32, 24, 16]},
            **layers("ssfsf"),
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=80,
            laurel_rank=8,
            altup_num_inputs=2,
            altup_active_idx=1,
            altup_correct_scale=False,
            final_logit_softcapping=4.0,
            activation_sparsity_pattern=[0.0, 0.8, 0.0, 0.0, 0.0],
            **per_type(LINEAR_FULL),
        ),
        "MQA, another active stream, tokens without per-layer embedding",
        embedding_std=0.2,
        hub_form=True,
    ),
    "gemma3n_vision": Spec(
        gemma3n(
            PLAIN | {"intermediate_size": 24},
            **layers("sfsf"),
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=4,
            laurel_rank=4,
            altup_num_inputs=2,
            activation_sparsity_pattern=[0.0, 0.0, 0.0, 0.0],
        ),
        "text_config inside, other names, tensors of towers and of unused projections",
        wrapped=True,
        embedding_std=0.13,
        query_gain=1.5,
    ),
    "gemma4": Spec(
        gemma4(
            PLAIN | {"intermediate_size": 32},
            **layers("sfsf"),
            global_head_dim=32,
            num_kv_shared_layers=2,
            use_double_wide_mlp=True,
            hidden_size_per_layer_input=6,
            final_logit_softcapping=6.0,
            **per_type(PROPORTIONAL),
        ),
        "shared K/V, per-layer inputs, wider global heads, partial rope, double MLPs",
        hub_form=True,
        embedding_std=QUIET,
    ),
    "gemma4_awkward": Spec(
        gemma4(
            AWKWARD | {"num_key_value_heads": 2, "intermediate_size": 24},
            **layers("ssf"),
            global_head_dim=24,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            hidden_size_per_layer_input=0,
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=12,
            **per_type(PROPORTIONAL),
        ),
        "experts beside the MLP, K as V, one global K/V head",
        embedding_std=QUIET,
    ),
    "gemma4_vision": Spec(
        gemma4_with_vision,
        "text_config inside, a vision tower unused",
        hub_form=True,
        embedding_std=0.1,
        query_gain=1.5,
    ),
}

ALL_GEMMAS: dict[str, Spec] = GEMMAS | GEMMAS_WITH_LAYER_INPUTS
