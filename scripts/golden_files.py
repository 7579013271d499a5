"""Writes a golden model's directory: config.json in either form, MXFP4 experts, and the trip back into transformers.

Hides what transformers 5 renamed in config.json and how GPT-OSS packs 4-bit experts (OCP Microscaling Formats 1.0).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

FULL, SLIDING = "full_attention", "sliding_attention"
FP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # e2m1; bit 3 is the sign
BLOCK = 32  # values that share a scale
SCALE_BIAS = 127
LARGEST_EXPONENT = 2  # of an e2m1 value: 6 = 1.5 * 2**2
MXFP4_CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def write_model(model: nn.Module, out: Path, *, hub_form: bool, mxfp4: bool, wrapped: bool) -> None:
    """config.json, generation_config.json and model.safetensors in bfloat16, in the layouts found on the hub."""
    model.to(torch.bfloat16).save_pretrained(out)
    model.float()
    config = json.loads((out / "config.json").read_text())
    if hub_form:
        config = older_form(config)
    if mxfp4:
        config["quantization_config"] = MXFP4_CONFIG
        replace_tensors(out, pack_experts)
    if wrapped:
        config = wrap_config(config)
        replace_tensors(out, wrap_tensors)
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def replace_tensors(out: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(out / "model.safetensors")), out / "model.safetensors", metadata={"format": "pt"})


def loaded_logits(out: Path, architecture: type[nn.Module], tokens: torch.Tensor) -> torch.Tensor:
    """What transformers computes from the directory: that what was written is the model that was run."""
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    if "quantization_config" in json.loads((out / "config.json").read_text()):
        options["quantization_config"] = hf.Mxfp4Config(dequantize=True)
    loaded, report = architecture.from_pretrained(out, output_loading_info=True, **options)
    unexpected = [name for name in report["unexpected_keys"] if not name.startswith("model.vision_tower.")]
    assert not (unexpected or report["missing_keys"] or report["mismatched_keys"]), report
    with torch.no_grad():
        return loaded.float().eval()(tokens).logits[0]


# ---- config.json as older transformers wrote it


def older_form(config: dict[str, Any]) -> dict[str, Any]:
    config = dict(config)
    config["torch_dtype"] = config.pop("dtype")
    if "text_config" in config:
        config["text_config"] = older_form(config["text_config"] | {"dtype": config["torch_dtype"]})
        return config
    kind = config["model_type"]
    if kind == "gemma4_text":
        return older_gemma4(config)
    rope = config.pop("rope_parameters")
    if FULL in rope:
        config["rope_local_base_freq"] = rope[SLIDING]["rope_theta"]
        rope = rope[FULL]
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": older_rope_scaling(rope, kind)}
    if kind == "phi3":
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return rename_fields(config, kind)


def older_rope_scaling(rope: dict[str, Any], kind: str) -> dict[str, Any] | None:
    if rope["rope_type"] == "default":
        return None
    outside = {"rope_theta", "rope_type"} | ({"original_max_position_embeddings"} if kind == "phi3" else set())
    scaling = {name: value for name, value in rope.items() if name not in outside | {"partial_rotary_factor"}}
    older_name = "type" if kind in ("llama", "mistral", "phi3") else "rope_type"
    return scaling | {older_name: rope["rope_type"]}


def older_gemma4(config: dict[str, Any]) -> dict[str, Any]:
    """Global layers' head size and K/V heads in fields of their own; rope already is per layer type."""
    (overrides,) = {json.dumps(layer, sort_keys=True) for layer in config.pop("per_layer_config").values()}
    special = json.loads(overrides)
    names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    return config | {name: special.get(field) for field, name in names.items()}


def rename_fields(config: dict[str, Any], kind: str) -> dict[str, Any]:
    if kind == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    if kind == "gpt_oss":
        config.pop("swiglu_alpha")
        original = config["rope_scaling"]["original_max_position_embeddings"]
        config |= {"experts_per_token": config["num_experts_per_tok"], "initial_context_length": original}
    if kind == "gemma":  # the first release said gelu and meant its tanh form
        config |= {"hidden_act": "gelu", "hidden_activation": None}
    if kind == "gemma3_text":
        config.pop("_sliding_window_pattern")
    if kind in ("qwen2", "gemma2") or "sliding_window_pattern" in config:
        config.pop("layer_types")
    return config


# ---- a text model inside one that sees and hears (Gemma 3n's own class needs libraries for images)


def wrap_config(text: dict[str, Any]) -> dict[str, Any]:
    kind = text["model_type"].removesuffix("_text")
    name = text["architectures"][0].replace("ForCausalLM", "ForConditionalGeneration")
    inner = {field: value for field, value in text.items() if field not in ("architectures", "transformers_version")}
    return {"architectures": [name], "model_type": kind, "text_config": inner, "vision_config": {"hidden_size": 8}}


def wrap_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under another prefix, with a tensor that is not text's, and K/V projections that no layer uses, as on the hub."""
    inside = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    unused = {}
    for query in [name for name in inside if name.endswith("q_proj.weight")]:
        for part in ("k_proj", "v_proj", "k_norm"):
            name = query.replace("q_proj", part)
            if name not in inside:
                unused[name] = inside[re.sub(r"layers\.\d+", "layers.0", name)].flip(0)
    return inside | unused | {"model.vision_tower.patches.weight": torch.zeros(8, 3, dtype=torch.bfloat16)}


# ---- MXFP4


def quantize_mxfp4(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f32[..., in] -> blocks u8[..., in / 32, 16] and scales u8[..., in / 32]; the even value is in the low half."""
    grouped = weights.reshape(*weights.shape[:-1], -1, BLOCK)
    largest = grouped.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
    exponents = largest.log2().floor() - LARGEST_EXPONENT
    magnitudes = grouped.abs() * 2.0**-exponents
    codes = (magnitudes[..., None] - FP4_VALUES).abs().argmin(-1) + 8 * (grouped < 0)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return blocks, (exponents[..., 0] + SCALE_BIAS).to(torch.uint8)


def dequantize_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The inverse: f32[..., in]."""
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()
    values = FP4_VALUES[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    return (values * 2.0 ** (scales.float() - SCALE_BIAS)[..., None]).flatten(-2)


def round_to_mxfp4(weights: torch.Tensor) -> torch.Tensor:
    """f32[experts, in, out] -> its nearest in MXFP4 with blocks along `in`."""
    return dequantize_mxfp4(*quantize_mxfp4(weights.transpose(1, 2))).transpose(1, 2)


def pack_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`experts.*_proj` [experts, in, out] -> `*_blocks` and `*_scales` [experts, out, in / 32, ...], exactly."""
    packed = {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[name] = tensor
            continue
        rows = tensor.float().transpose(1, 2).contiguous()
        blocks, scales = quantize_mxfp4(rows)
        assert torch.equal(dequantize_mxfp4(blocks, scales), rows), f"{name} is not what MXFP4 can hold"
        packed |= {f"{name}_blocks": blocks.contiguous(), f"{name}_scales": scales.contiguous()}
    return packed
