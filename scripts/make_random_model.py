#!/usr/bin/env python3
r"""Write a Hugging Face directory with random weights of any shape, for speed and memory measurements.

    python scripts/make_random_model.py --arch llama --hidden-size 1024 --layers 12 --heads 16 --kv-heads 4 \
        --intermediate-size 2816 --vocab-size 32000 --out llama-150m

No tokenizer: the model is served by token ids. Weights are normal(0, 0.02), norms are ones; the same seed gives the
same bytes. Memory stays at a few MiB whatever the model's size: every tensor is streamed to its file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxinfer.config import ConfigError, ModelConfig
from jaxinfer.models import load_config, weight_name
from jaxinfer.models.transformer import abstract_parameters

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
DTYPES = {
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "float16": ("F16", np.dtype(np.float16)),
    "float32": ("F32", np.dtype(np.float32)),
}
STANDARD_DEVIATION = 0.02  # transformers' initializer_range
SHARD_BYTES = 2 * 10**9
CHUNK_ELEMENTS = 1 << 20
BOS_TOKEN_ID, EOS_TOKEN_ID = 1, 2

Tensors = dict[str, tuple[int, ...]]  # Hugging Face name -> shape


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        print(f"{out} exists and is not an empty directory; remove it or choose another --out", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", hf_config(args))
    write_json(out / "generation_config.json", {"bos_token_id": BOS_TOKEN_ID, "eos_token_id": EOS_TOKEN_ID})
    try:
        config = load_config(out)
    except ConfigError as error:
        for name in ("config.json", "generation_config.json"):
            (out / name).unlink()
        print(error, file=sys.stderr)
        return 2
    num_parameters = write_weights(out, tensors(config), args.dtype, args.seed, args.shard_bytes)
    print(
        f"{out}: {ARCHITECTURES[args.arch]}, {num_parameters / 1e6:,.1f} M parameters, {args.dtype}, seed {args.seed}"
    )
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), required=True)
    for name in ("hidden-size", "layers", "heads", "kv-heads", "intermediate-size", "vocab-size"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--head-dim", type=int, help="default: hidden size / heads")
    parser.add_argument("--tie", action="store_true", help="share the embedding with the output layer")
    parser.add_argument("--max-position-embeddings", type=int, default=4096)
    parser.add_argument("--sliding-window", type=int, help="mistral: tokens a query sees (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="size over which weights are sharded")
    parser.add_argument("--out", required=True, help="directory to write; must be empty or absent")
    args = parser.parse_args(argv)
    if args.sliding_window is not None and args.arch != "mistral":
        parser.error(f"--sliding-window is for --arch mistral, not {args.arch}")
    if args.seed < 0 or args.shard_bytes < 1:
        parser.error(f"--seed {args.seed} must not be negative and --shard-bytes {args.shard_bytes} must be positive")
    return args


def hf_config(args: argparse.Namespace) -> dict[str, Any]:
    """config.json, with every field that transformers needs to load the same model."""
    fields: dict[str, Any] = {
        "architectures": [ARCHITECTURES[args.arch]],
        "model_type": args.arch,
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.intermediate_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim or args.hidden_size // max(args.heads, 1),
        "hidden_act": "silu",
        "max_position_embeddings": args.max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": args.tie,
        "torch_dtype": args.dtype,
        "bos_token_id": BOS_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
    }
    return fields | ({"sliding_window": args.sliding_window} if args.arch == "mistral" else {})


def tensors(config: ModelConfig) -> Tensors:
    """Every tensor of the model under its Hugging Face name, in the order the model uses them."""
    specs = abstract_parameters(config, np.dtype(np.float32))
    return {weight_name(config.architecture, name): spec.shape for name, spec in specs.items()}


def shards(all_tensors: Tensors, itemsize: int, shard_bytes: int) -> Iterator[Tensors]:
    """Split into runs of at most `shard_bytes`; a larger tensor has a shard of its own."""
    shard: Tensors = {}
    num_bytes = 0
    for name, shape in all_tensors.items():
        size = math.prod(shape) * itemsize
        if shard and num_bytes + size > shard_bytes:
            yield shard
            shard, num_bytes = {}, 0
        shard[name] = shape
        num_bytes += size
    yield shard


def write_weights(out: Path, all_tensors: Tensors, dtype: str, seed: int, shard_bytes: int) -> int:
    """One model.safetensors, or shards and their index. Returns the number of parameters."""
    itemsize = DTYPES[dtype][1].itemsize
    parts = list(shards(all_tensors, itemsize, shard_bytes))
    rng = np.random.default_rng(np.random.SFC64(seed))
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        name = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_safetensors(out / name, part, dtype, rng)
        weight_map |= dict.fromkeys(part, name)
    num_parameters = sum(math.prod(shape) for shape in all_tensors.values())
    if len(parts) > 1:
        index = {"metadata": {"total_size": num_parameters * itemsize}, "weight_map": weight_map}
        write_json(out / "model.safetensors.index.json", index)
    return num_parameters


def write_safetensors(path: Path, part: Tensors, dtype: str, rng: np.random.Generator) -> None:
    """Header (8-byte length, JSON padded to 8 bytes), then the tensors one after the other."""
    code, numpy_dtype = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in part.items():
        end = offset + math.prod(shape) * numpy_dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for shape in part.values():
            write_tensor(file, shape, numpy_dtype, rng)


def write_tensor(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype, rng: np.random.Generator) -> None:
    remaining = math.prod(shape)
    while remaining:
        count = min(remaining, CHUNK_ELEMENTS)
        if len(shape) == 1:
            values = np.ones(count, np.float32)
        else:
            values = rng.standard_normal(count, np.float32)
            values *= STANDARD_DEVIATION
        file.write(values.astype(dtype).view(np.uint8).data)
        remaining -= count


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
