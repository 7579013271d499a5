"""Quantized checkpoints in plainest words: each format's tensors, and the weights f32[out, in] that they mean."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from tensor_files import write_tensors

from jaxinfer.models import load_config, weight_source
from jaxinfer.models.transformer import abstract_parameters
from jaxinfer.models.weight_matching import stored_shapes

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
}
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
BF16 = jnp.dtype(jnp.bfloat16)
Tensors = dict[str, np.ndarray]
Writer = Callable[[np.random.Generator, str, int, int], tuple[Tensors, np.ndarray]]


def packed(values: np.ndarray, axis: int, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Unsigned integers into int32 words along an axis; place p of a word holds its value order[p]."""
    per_word = 32 // bits
    rows = np.moveaxis(values, axis, -1)
    rows = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % per_word)])
    words = np.zeros((*rows.shape[:-1], rows.shape[-1] // per_word), np.uint32)
    for place in range(per_word):
        value = order[place] if order else place
        words |= rows[..., value::per_word].astype(np.uint32) << np.uint32(bits * place)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)


def random_scales(rng: np.random.Generator, *shape: int, dtype: Any = np.float16) -> np.ndarray:
    return rng.uniform(0.01, 0.05, shape).astype(dtype)


def spread(per_group: np.ndarray, group_size: int) -> np.ndarray:
    """`[out, groups]` -> `[out, in]`"""
    return np.repeat(per_group.astype(np.float32), group_size, axis=1)


def gptq(bits: int = 4, group_size: int = 32, sym: bool = True, stored_less: int = 1, order: bool = True) -> Writer:
    def write(rng: np.random.Generator, name: str, out_size: int, in_size: int) -> tuple[Tensors, np.ndarray]:
        size = in_size if group_size == -1 else group_size
        values = rng.integers(0, 2**bits, (out_size, in_size))
        zeros = rng.integers(1, 2**bits, (out_size, in_size // size))
        if sym:
            zeros[:] = 2 ** (bits - 1)
        scales = random_scales(rng, out_size, in_size // size)
        tensors = {
            f"{name}.qweight": packed(values.T, 0, bits),
            f"{name}.qzeros": packed(zeros.T - stored_less, 1, bits),
            f"{name}.scales": np.ascontiguousarray(scales.T),
        }
        if order:
            tensors[f"{name}.g_idx"] = (np.arange(in_size) // size).astype(np.int32)
        return tensors, (values - spread(zeros, size)) * spread(scales, size)

    return write


def awq(rng: np.random.Generator, name: str, out_size: int, in_size: int) -> tuple[Tensors, np.ndarray]:
    values = rng.integers(0, 16, (out_size, in_size))
    zeros = rng.integers(0, 16, (out_size, in_size // 32))
    scales = random_scales(rng, out_size, in_size // 32)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        f"{name}.qweight": packed(values.T, 1, 4, order),
        f"{name}.qzeros": packed(zeros.T, 1, 4, order),
        f"{name}.scales": np.ascontiguousarray(scales.T),
    }
    return tensors, (values - spread(zeros, 32)) * spread(scales, 32)


def int8(shape: Callable[[int], tuple[int, ...]], zero_points: bool = False) -> Writer:
    """`shape(outputs)` is that of the scales."""

    def write(rng: np.random.Generator, name: str, out_size: int, in_size: int) -> tuple[Tensors, np.ndarray]:
        values = rng.integers(-128, 128, (out_size, in_size)).astype(np.int8)
        scales = random_scales(rng, *shape(out_size), dtype=ml_dtypes.bfloat16)
        tensors = {f"{name}.weight": values, f"{name}.weight_scale": scales}
        zeros = np.zeros((1, 1), np.float32)
        if zero_points:
            stored = rng.integers(-128, 128, shape(out_size)).astype(np.int8)
            tensors[f"{name}.weight_zero_point"] = stored
            zeros = stored.astype(np.float32).reshape(-1, 1)
        return tensors, (values - zeros) * scales.astype(np.float32).reshape(-1, 1)

    return write


def fp8(rng: np.random.Generator, name: str, out_size: int, in_size: int) -> tuple[Tensors, np.ndarray]:
    values = rng.uniform(-448, 448, (out_size, in_size)).astype(ml_dtypes.float8_e4m3fn)
    scales = random_scales(rng, out_size, 1, dtype=np.float32)
    return {f"{name}.weight": values, f"{name}.weight_scale": scales}, values.astype(np.float32) * scales


def fp8_blocks(outputs: int, inputs: int, suffix: str, dtype: Any = np.float32) -> Writer:
    def write(rng: np.random.Generator, name: str, out_size: int, in_size: int) -> tuple[Tensors, np.ndarray]:
        values = rng.uniform(-448, 448, (out_size, in_size)).astype(ml_dtypes.float8_e4m3fn)
        scales = random_scales(rng, -(-out_size // outputs), in_size // inputs).astype(dtype)
        expected = np.empty((out_size, in_size), np.float32)
        for i in range(out_size):
            for j in range(in_size):
                expected[i, j] = np.float32(values[i, j]) * np.float32(scales[i // outputs, j // inputs])
        return {f"{name}.weight": values, f"{name}.weight{suffix}": scales}, expected

    return write


def pack_quantized(bits: int, group_size: int | None, zero_points: bool = False) -> Writer:
    def write(rng: np.random.Generator, name: str, out_size: int, in_size: int) -> tuple[Tensors, np.ndarray]:
        size, half = group_size or in_size, 2 ** (bits - 1)
        values = rng.integers(-half, half, (out_size, in_size))
        scales = random_scales(rng, out_size, in_size // size, dtype=ml_dtypes.bfloat16)
        tensors = {
            f"{name}.weight_packed": packed(values + half, 1, bits),
            f"{name}.weight_scale": scales,
            f"{name}.weight_shape": np.array([out_size, in_size], np.int64),
        }
        zeros = np.zeros((out_size, in_size // size), np.int64)
        if zero_points:
            zeros = rng.integers(-half, half, zeros.shape)
            tensors[f"{name}.weight_zero_point"] = packed(zeros + half, 0, bits)
        return tensors, (values - spread(zeros, size)) * spread(scales, size)

    return write


def compressed(weights: dict[str, Any], format_name: str, activations: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format_name,
        "quantization_status": "compressed",
        "global_compression_ratio": 1.5,
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def weights(bits: int, strategy: str, kind: str = "int", symmetric: bool = True, **more: Any) -> dict[str, Any]:
    plain = {"dynamic": False, "observer": "minmax", "observer_kwargs": {}, "actorder": None}
    return plain | {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": symmetric} | more


PER_TOKEN = {"dynamic": True, "num_bits": 8, "strategy": "token", "symmetric": True, "observer": None, "type": "int"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "damp_percent": 0.1}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [48, 32]}


@dataclass(frozen=True)
class Scheme:
    config: dict[str, Any]
    write: Writer
    format: str  # QuantizedTensor's


SCHEMES = {
    "gptq": Scheme(GPTQ, gptq(), "int4/g32"),
    "gptq without g_idx": Scheme(GPTQ, gptq(order=False), "int4/g32"),
    "gptq zero points": Scheme(GPTQ | {"sym": False}, gptq(sym=False), "int4/g32/zp"),
    "gptq_v2 zero points": Scheme(
        GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}, gptq(sym=False, stored_less=0), "int4/g32/zp"
    ),
    "gptq 8 bits": Scheme(GPTQ | {"bits": 8}, gptq(bits=8), "int8/g32"),
    "gptq one group": Scheme(GPTQ | {"group_size": -1, "desc_act": True}, gptq(group_size=-1), "int4"),
    "awq": Scheme(AWQ, awq, "int4/g32/zp"),
    "w8a8 int8": Scheme(
        compressed(weights(8, "channel"), "int-quantized", PER_TOKEN), int8(lambda n: (n, 1)), "w8a8-int8"
    ),
    "int8 per tensor": Scheme(compressed(weights(8, "tensor"), "int-quantized"), int8(lambda n: (1,)), "int8"),
    "int8 zero points": Scheme(
        compressed(weights(8, "channel", symmetric=False), "int-quantized"), int8(lambda n: (n, 1), True), "int8/zp"
    ),
    "w8a8 fp8": Scheme(
        compressed(weights(8, "channel", "float"), "float-quantized", PER_TOKEN | {"type": "float"}), fp8, "w8a8-fp8"
    ),
    "fp8 blocks of compressed-tensors": Scheme(
        compressed(
            weights(8, "block", "float", block_structure=[16, 32]),
            "float-quantized",
            PER_TOKEN | {"type": "float", "strategy": "group", "group_size": 32},
        ),
        fp8_blocks(16, 32, "_scale", ml_dtypes.bfloat16),
        "fp8/g32",
    ),
    "packed int4": Scheme(
        compressed(weights(4, "group", group_size=32), "pack-quantized"), pack_quantized(4, 32), "int4/g32"
    ),
    "packed int4 zero points": Scheme(
        compressed(weights(4, "group", symmetric=False, group_size=32), "pack-quantized"),
        pack_quantized(4, 32, True),
        "int4/g32/zp",
    ),
    "packed int8": Scheme(compressed(weights(8, "channel"), "pack-quantized"), pack_quantized(8, None), "int8"),
    "fp8 blocks": Scheme(FP8, fp8_blocks(48, 32, "_scale_inv"), "fp8/g32"),
    "fp8 blocks, powers of two": Scheme(
        FP8 | {"scale_fmt": "ue8m0"}, fp8_blocks(48, 32, "_scale_inv", ml_dtypes.float8_e8m0fnu), "fp8/g32"
    ),
}


def write_model(directory: Path, quantization: dict[str, Any], write: Writer, **fields: Any) -> Tensors:
    """A checkpoint whose projections are quantized. Returns every parameter's weight by Hugging Face name."""
    (directory / "config.json").write_text(json.dumps(CONFIG | fields))
    specs = abstract_parameters(load_config(directory), BF16)
    rng = np.random.default_rng(0)
    tensors, expected = {}, {}
    for name, spec in specs.items():
        stored = weight_source(load_config(directory), name).name
        if "_proj" in stored:
            made, expected[stored] = write(rng, stored.removesuffix(".weight"), *spec.shape)
            tensors |= made
        else:
            tensors[stored] = rng.normal(size=spec.shape).astype(ml_dtypes.bfloat16)
            expected[stored] = tensors[stored].astype(np.float32)
    write_tensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(CONFIG | fields | {"quantization_config": quantization}))
    return expected


def write_mixtral(directory: Path, name: str, **more: Any) -> Tensors:
    fields = CONFIG | MIXTRAL | more
    (directory / "config.json").write_text(json.dumps(fields))
    rng = np.random.default_rng(0)
    tensors, expected = {}, {}
    for stored, shape in stored_shapes(load_config(directory)).items():
        if "_proj" in stored or ".experts." in stored:
            made, expected[stored] = SCHEMES[name].write(rng, stored.removesuffix(".weight"), *shape)
            tensors |= made
        else:
            tensors[stored] = rng.normal(size=shape).astype(np.float32)
    write_tensors(directory / "model.safetensors", tensors)
    quantization = dict(SCHEMES[name].config)
    if "config_groups" in quantization:
        quantization["ignore"] = ["lm_head", r"re:.*block_sparse_moe\.gate$"]
    elif quantization["quant_method"] == "fp8":
        quantization["modules_to_not_convert"] = ["gate", "lm_head"]
    (directory / "config.json").write_text(json.dumps(fields | {"quantization_config": quantization}))
    return expected
