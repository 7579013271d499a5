#!/usr/bin/env python3
r"""Make tests/goldens_quantized/: weights that other packages quantized, with the values they read back from them.

Runs in an environment of its own, since torch never enters the project's:

    python3.11 -m venv ../goldens-env
    ../goldens-env/bin/pip install torch==2.13.0 transformers==5.23.0 compressed-tensors==0.20.0 safetensors
    ../goldens-env/bin/python scripts/make_quantized_goldens.py

One file for each package. A weight `NAME.weight` lies in it under the names a checkpoint has, beside what the package
makes of it in float32, `NAME.expected`; the file's metadata hold each weight's `quantization_config`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

try:
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams
    from safetensors.torch import save_file
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors
except ModuleNotFoundError as error:
    print(f"{error}; this script needs its own environment:\n{__doc__}", file=sys.stderr)
    sys.exit(2)

OUT = Path(__file__).resolve().parent.parent / "tests" / "goldens_quantized"
OUT_SIZE, IN_SIZE = 20, 64  # 20 zero points are two words and a half
MAX_BYTES = 60_000
Tensors = dict[str, torch.Tensor]

TOKEN = {"strategy": "token", "dynamic": True, "observer": None}
SCHEMES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "w4a16": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, None),
    "w4a16_asym": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False},
        None,
    ),
    "w8a16": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}, None),
    "w8a8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, TOKEN),
    "w8_asym": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, None),
    "fp8_dynamic": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        TOKEN | {"type": "float"},
    ),
    "fp8_tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, None),
    "fp8_block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [4, 32]},
        {"type": "float", "strategy": "group", "group_size": 32, "dynamic": True},
    ),
}


def main() -> int:
    torch.manual_seed(0)
    OUT.mkdir(parents=True, exist_ok=True)
    save("compressed_tensors", *compressed_tensors())
    save("transformers", *transformers())
    return 0


def compressed_tensors() -> tuple[Tensors, dict[str, Any]]:
    tensors: Tensors = {}
    configs: dict[str, Any] = {}
    for name, (format_name, weights, activations) in SCHEMES.items():
        arguments = QuantizationArgs(**weights)
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=arguments,
            input_activations=None if activations is None else QuantizationArgs(**activations),
            format=CompressionFormat(format_name),
        )
        config = QuantizationConfig(config_groups={"group_0": scheme}, format=format_name, ignore=["lm_head"])
        weight = torch.randn(OUT_SIZE, IN_SIZE, dtype=torch.bfloat16)
        scale, zero_point = parameters_of(weight, arguments)
        compressor = BaseCompressor.get_value_from_registry(format_name)
        stored = compressor.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}, scheme)
        wide = {key: tensor.float() if key == "weight_scale" else tensor for key, tensor in stored.items()}
        tensors |= {f"{name}.{key}": tensor for key, tensor in stored.items()}
        tensors[f"{name}.expected"] = compressor.decompress(wide, scheme)["weight"].float()
        configs[name] = config.model_dump(mode="json")
    return tensors, configs


def parameters_of(weight: torch.Tensor, arguments: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points from the extremes of whatever shares them."""
    if arguments.strategy == "tensor":
        return calculate_qparams(weight.min(), weight.max(), arguments)
    outputs, inputs = arguments.block_structure or (1, arguments.group_size or IN_SIZE)
    blocks = weight.reshape(OUT_SIZE // outputs, outputs, IN_SIZE // inputs, inputs)
    return calculate_qparams(blocks.amin(dim=(1, 3)), blocks.amax(dim=(1, 3)), arguments)


def transformers() -> tuple[Tensors, dict[str, Any]]:
    """Block-scaled FP8 and MXFP4, whose files transformers reads; the bytes are random."""
    values = (100 * torch.randn(OUT_SIZE, IN_SIZE)).to(torch.float8_e4m3fn)
    scales = torch.rand(OUT_SIZE // 16 + 1, IN_SIZE // 32) + 0.5  # the last block has four outputs
    blocks = torch.randint(0, 256, (3, OUT_SIZE, IN_SIZE // 32, 16), dtype=torch.uint8)
    powers = torch.randint(118, 130, (3, OUT_SIZE, IN_SIZE // 32), dtype=torch.uint8)
    experts = convert_moe_packed_tensors(blocks, powers, dtype=torch.float32)  # [expert, in, out]
    tensors = {
        "fp8.weight": values,
        "fp8.weight_scale_inv": scales,
        "fp8.expected": _dequantize_fp8_weight(values, scales, [16, 32], torch.float32),
        "mxfp4.experts.down_proj_blocks": blocks,
        "mxfp4.experts.down_proj_scales": powers,
        "mxfp4.experts.expected": experts.transpose(1, 2).contiguous(),
    }
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 32]}
    return tensors, {"fp8": fp8, "mxfp4.experts": {"quant_method": "mxfp4"}}


def save(name: str, tensors: Tensors, configs: dict[str, Any]) -> None:
    path = OUT / f"{name}.safetensors"
    save_file(tensors, path, metadata={"quantization_configs": json.dumps(configs)})
    num_bytes = path.stat().st_size
    print(f"{path}: {num_bytes} bytes, {', '.join(configs)}")
    if num_bytes > MAX_BYTES:
        raise SystemExit(f"{path} has {num_bytes} bytes, over {MAX_BYTES}")


if __name__ == "__main__":
    sys.exit(main())
