#!/usr/bin/env python3
r"""Write a Hugging Face directory with random weights of any shape, for speed and memory measurements.

    python scripts/make_random_model.py --arch llama --hidden-size 1024 --layers 12 --heads 16 --kv-heads 4 \
        --intermediate-size 2816 --vocab-size 32000 --out llama-150m

No tokenizer: the model is served by token ids. Weights are normal(0, 0.02), norms are ones; the same seed gives the
same bytes. With --quantization FILE, a `quantization_config` in JSON, projections are stored in that format, with
random values. Memory stays at a few MiB whatever the model's size: every tensor is streamed to its file.
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

from jaxinfer.config import ConfigError
from jaxinfer.models import load_config
from jaxinfer.models.quantized_layouts import Piece
from jaxinfer.models.safetensors_files import DTYPES as STORED_DTYPES
from jaxinfer.models.weight_matching import stored_pieces

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
DTYPES = {
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "float16": ("F16", np.dtype(np.float16)),
    "float32": ("F32", np.dtype(np.float32)),
}
STANDARD_DEVIATION = 0.02  # transformers' initializer_range
QUANTIZED_DEVIATION = 50.0  # of 8-bit values, before their scale
MIDDLE = 0x77777777  # zero points in the middle of what four bits hold, as GPTQ stores them
EXPONENTS = 118  # the lowest that MXFP4's scales draw: 2**-9
SHARD_BYTES = 2 * 10**9
CHUNK_ELEMENTS = 1 << 20
BOS_TOKEN_ID, EOS_TOKEN_ID = 1, 2

Tensors = dict[str, tuple[str, Piece]]  # Hugging Face name -> role of the tensor (that of a plain one is "weight")


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
    num_numbers = write_weights(out, stored_pieces(config), args.dtype, args.seed, args.shard_bytes)
    print(f"{out}: {ARCHITECTURES[args.arch]}, {num_numbers / 1e6:,.1f} M numbers, {args.dtype}, seed {args.seed}")
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
    parser.add_argument("--quantization", type=Path, help="a file with the quantization_config of config.json")
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
    if args.quantization is not None:
        fields["quantization_config"] = json.loads(args.quantization.read_text(encoding="utf-8"))
    return fields | ({"sliding_window": args.sliding_window} if args.arch == "mistral" else {})


def dtype_of(piece: Piece, dtype: str) -> tuple[str, np.dtype]:
    """What a tensor is stored as: `dtype` where the format leaves a choice."""
    code, numpy_dtype = DTYPES[dtype]
    return (code, numpy_dtype) if code in piece.codes else (piece.codes[0], STORED_DTYPES[piece.codes[0]])


def num_bytes_of(piece: Piece, dtype: str) -> int:
    return math.prod(piece.shapes[0]) * dtype_of(piece, dtype)[1].itemsize


def shards(all_tensors: Tensors, dtype: str, shard_bytes: int) -> Iterator[Tensors]:
    """Split into runs of at most `shard_bytes`; a larger tensor has a shard of its own."""
    shard: Tensors = {}
    num_bytes = 0
    for name, (role, piece) in all_tensors.items():
        size = num_bytes_of(piece, dtype)
        if shard and num_bytes + size > shard_bytes:
            yield shard
            shard, num_bytes = {}, 0
        shard[name] = role, piece
        num_bytes += size
    yield shard


def write_weights(out: Path, all_tensors: Tensors, dtype: str, seed: int, shard_bytes: int) -> int:
    """One model.safetensors, or shards and their index. Returns how many numbers they hold."""
    parts = list(shards(all_tensors, dtype, shard_bytes))
    rng = np.random.default_rng(np.random.SFC64(seed))
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        name = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_safetensors(out / name, part, dtype, rng)
        weight_map |= dict.fromkeys(part, name)
    pieces = [piece for _, piece in all_tensors.values()]
    if len(parts) > 1:
        total_bytes = sum(num_bytes_of(piece, dtype) for piece in pieces)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_json(out / "model.safetensors.index.json", index)
    return sum(math.prod(piece.shapes[0]) for piece in pieces)


def write_safetensors(path: Path, part: Tensors, dtype: str, rng: np.random.Generator) -> None:
    """Header (8-byte length, JSON padded to 8 bytes), then the tensors one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (_, piece) in part.items():
        end = offset + num_bytes_of(piece, dtype)
        code = dtype_of(piece, dtype)[0]
        header[name] = {"dtype": code, "shape": list(piece.shapes[0]), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for role, piece in part.values():
            write_tensor(file, role, piece, dtype_of(piece, dtype)[1], rng)


def write_tensor(file: BinaryIO, role: str, piece: Piece, dtype: np.dtype, rng: np.random.Generator) -> None:
    remaining = math.prod(piece.shapes[0])
    while remaining:
        count = min(remaining, CHUNK_ELEMENTS)
        file.write(random_values(role, len(piece.shapes[0]), count, dtype, rng).view(np.uint8).data)
        remaining -= count


def random_values(role: str, ndim: int, count: int, dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    """`count` numbers of a tensor: of a plain one ("weight"), or of one of those that a quantized weight is."""
    if role == "weight" and ndim == 1:
        return np.ones(count, dtype)
    if role == "weight" or dtype.name == "float8_e4m3fn":
        values = rng.standard_normal(count, np.float32)
        return (values * (STANDARD_DEVIATION if role == "weight" else QUANTIZED_DEVIATION)).astype(dtype)
    if role == "zeros":
        return np.full(count, MIDDLE if dtype == np.int32 else 0, dtype)
    if role == "scales":
        low, high = (EXPONENTS, EXPONENTS + 4) if dtype == np.uint8 else (0.5, 1.5)
        drawn = rng.uniform(low, high, count)
        return (drawn if dtype == np.uint8 else drawn * STANDARD_DEVIATION / QUANTIZED_DEVIATION).astype(dtype)
    return np.frombuffer(rng.bytes(count * dtype.itemsize), dtype)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
