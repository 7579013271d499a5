"""Runs every golden model through the engine and writes the table of docs/models.md: architecture, features, goldens.

    make models

Exits 1 where an architecture has fewer than two golden models, or one of them is over the bar.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from doc_tables import replaced, table
from safetensors.numpy import load_file

from jaxinfer.config import LayerSpec, ModelConfig
from jaxinfer.llm import LLM
from jaxinfer.models import ARCHITECTURES, load_config
from jaxinfer.request import SamplingParams
from jaxinfer.rope import RopeSpec

ROOT = Path(__file__).resolve().parent.parent
PAGE, GOLDENS = ROOT / "docs" / "models.md", ROOT / "tests" / "goldens"
BAR = 2e-4  # of the largest logit
# What shares all but the names of its tensors with another one: its goldens count together with that one's.
SAME_MODEL = {
    "Gemma3ForConditionalGeneration": "Gemma3ForCausalLM",
    "Gemma3nForConditionalGeneration": "Gemma3nForCausalLM",
    "Gemma4ForConditionalGeneration": "Gemma4ForCausalLM",
}
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_num_seqs": 2,
    "max_num_batched_tokens": 128,
    "min_prefill_bucket": 128,
}


@dataclass(frozen=True)
class Golden:
    """What the engine made of one golden model."""

    name: str
    error: float  # max|ours - theirs| / max|theirs|
    num_equal: int  # greedy tokens before the first that differs
    num_tokens: int

    @property
    def passed(self) -> bool:
        return self.error <= BAR and self.num_equal == self.num_tokens

    def __str__(self) -> str:
        return f"`{self.name}` {self.error:.1e}" + (
            "" if self.passed else f", {self.num_equal}/{self.num_tokens} **over the bar**"
        )


def run(directory: Path) -> Golden:
    """Logits of the prompt and greedy tokens against what transformers computed."""
    golden = load_file(directory / "golden.safetensors")
    prompt, expected = golden["prompt"].tolist(), golden["greedy"].tolist()
    llm = LLM(directory, warm_up=False, **ENGINE)
    error = np.abs(llm.prompt_logits(prompt) - golden["logits"]).max() / np.abs(golden["logits"]).max()
    params = SamplingParams(temperature=0, max_tokens=len(expected), ignore_eos=True)
    tokens = llm.generate([prompt], params, progress=False)[0].outputs[0].token_ids
    llm.engine.close()
    equal = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b), len(expected))
    return Golden(directory.name, float(error), equal, len(expected))


def features(models: list[ModelConfig]) -> str:
    """What the golden models of an architecture exercise, in words."""
    found: dict[str, None] = {}
    for model in models:
        kinds = [model.kv_shape(index).kv_heads for index in range(len(model.layers))]
        found |= dict.fromkeys("MQA" if n == 1 else "MHA" if n == model.q_heads else "GQA" for n in kinds)
        for layer in model.layers:
            found |= dict.fromkeys(layer_features(layer))
        found |= dict.fromkeys(model_features(model))
    return ", ".join(found)


def layer_features(layer: LayerSpec) -> list[str]:
    present = {
        "windows": layer.window is not None,
        "K/V shared by layers": layer.kv_from is not None,
        "experts": layer.experts is not None,
        "keys as values": layer.k_eq_v,
        "sparse activations": layer.activation_sparsity > 0,
        "head sizes by layer": layer.head_dim is not None,
    }
    return [name for name, is_there in present.items() if is_there] + (rope_features(layer.rope) if layer.rope else [])


def rope_features(rope: RopeSpec) -> list[str]:
    scaling = [] if rope.scaling is None else [type(rope.scaling).__name__.removesuffix("Scaling").lower() + " rope"]
    partial = rope.rotary_dim is not None or rope.num_turning is not None
    return scaling + ["partial rope"] * partial


def model_features(model: ModelConfig) -> list[str]:
    present = {
        "q, k, v biases": model.qkv_bias,
        "output bias": model.o_bias,
        "MLP biases": model.mlp_bias,
        "no gate": not model.gated_mlp,
        "layer norm": model.norm.kind == "layer",
        "1 + weight norms": model.norm.offset != 0,
        "norms of outputs": model.norm_place == "after",
        "norms of inputs and outputs": model.norm_place == "around",
        "norms of q and k": model.qk_norm is not None,
        "norm of v": model.v_norm,
        "attention sinks": model.sinks,
        "capped scores": model.attention_softcap is not None,
        "capped logits": model.logit_softcap is not None,
        "scaled embeddings": model.embed_scale is not None,
        "per-layer inputs": model.per_layer_input is not None,
        "AltUp and LAuReL": model.alt_up is not None,
        "quantized weights": model.quantization is not None,
        "tied": model.tie_embeddings,
        "untied": not model.tie_embeddings,
    }
    return [name for name, is_there in present.items() if is_there]


def main() -> int:
    by_architecture: dict[str, list[Path]] = defaultdict(list)
    for directory in sorted(GOLDENS.iterdir()):
        [architecture] = json.loads((directory / "config.json").read_text())["architectures"]
        by_architecture[architecture].append(directory)
    counts: dict[str, int] = defaultdict(int)
    rows, failed = [], []
    for architecture, registered in ARCHITECTURES.items():
        directories = by_architecture[architecture]
        goldens = [run(directory) for directory in directories]
        print(architecture, *goldens, file=sys.stderr, flush=True)
        counts[SAME_MODEL.get(architecture, architecture)] += sum(golden.passed for golden in goldens)
        failed += [golden.name for golden in goldens if not golden.passed]
        file = registered.partition(":")[0].replace(".", "/") + ".py"
        same = SAME_MODEL.get(architecture)
        shown = features([load_config(directory) for directory in directories])
        status = ", ".join(map(str, goldens)) or f"that of `{same}`, whose names its table changes"
        rows.append([f"`{architecture}`", f"[{file.rpartition('/')[2]}](../{file})", shown, status])
    text = table(["`architectures` in config.json", "file", "what its golden models have", "goldens: error"], rows)
    PAGE.write_text(replaced(PAGE.read_text(), "models", text, PAGE))
    few = [name for name, count in counts.items() if count < 2]
    for what, names in (("over the bar", failed), ("fewer than two green goldens", few)):
        if names:
            print(f"{what}: {', '.join(names)}", file=sys.stderr)
    return 1 if failed or few else 0


if __name__ == "__main__":
    raise SystemExit(main())
