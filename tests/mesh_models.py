"""Small models of every architecture whose sizes divide over eight devices, with random weights that matter."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tensor_files import write_tensors

from jaxinfer.config import ModelConfig
from jaxinfer.models import load_config
from jaxinfer.models.weight_matching import stored_shapes

GOLDENS = Path(__file__).parent / "goldens"
VOCAB = 99  # divides over no mesh
FULL, SLIDING = "full_attention", "sliding_attention"
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
ALTERNATING = {"layer_types": [SLIDING, FULL] * 2}  # two stages of two layers are alike
MLP_OUTPUTS = ("down_proj.weight", "c_proj.weight", "w2.weight", "down_proj")  # the last holds all experts
MULTIMODAL = ("gemma3_vision", "gemma3n_vision", "gemma4_vision")


@dataclass(frozen=True)
class Made:
    """A model: the golden directory whose config.json is scaled up, K/V heads, and further fields.

    `draw` is the first of whose weights the greedy answers vary (test_mesh_models.py), found without a mesh.
    """

    golden: str
    kv_heads: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()  # fields the architecture does not know
    draw: int = 0  # which of its random weights

    def config(self) -> dict[str, Any]:
        """config.json"""
        config = json.loads((GOLDENS / self.golden / "config.json").read_text())
        scaled = SIZES | {"num_key_value_heads": self.kv_heads} | dict(self.fields)
        inner = config["text_config"] if self.golden in MULTIMODAL else config
        inner |= {name: value for name, value in scaled.items() if name not in self.without}
        return config


FACTORS = {"short_factor": [1.0 + 0.05 * i for i in range(8)], "long_factor": [1.2 + 0.7 * i for i in range(8)]}
PER_LAYER = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}
MODELS: dict[str, Made] = {
    "llama": Made("llama", 2, {"intermediate_size": 128}),  # tied
    "llama_biased": Made("llama_awkward", 4),  # untied, every linear map with a bias
    "llama_mha": Made("llama_awkward", 8, {"attention_bias": False, "mlp_bias": False}),
    "mistral": Made("mistral", 8),  # every layer slides
    "ministral": Made("ministral", 2, ALTERNATING | {"sliding_window": 24}),
    "mixtral": Made("mixtral", 4, {"num_local_experts": 8}),
    "qwen2": Made("qwen2", 2),  # q, k and v with biases
    "qwen3": Made("qwen3_awkward", 1, ALTERNATING),  # norms of q's and k's heads
    "qwen3_moe": Made("qwen3_moe", 4, {"num_experts": 8, "moe_intermediate_size": 32}),
    "gemma": Made("gemma", 1),
    "gemma2": Made("gemma2_awkward", 4, ALTERNATING),  # untied, soft caps
    "gemma3": Made("gemma3", 2, ALTERNATING),
    "gemma3_vision": Made("gemma3_vision", 4, ALTERNATING),
    # reads the K/V of earlier layers; MLPs of several widths; one layer cuts its gate off
    "gemma3n": Made(
        "gemma3n",
        2,
        PER_LAYER
        | ALTERNATING
        | {"intermediate_size": [64, 128, 64, 64], "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    ),
    "gemma3n_vision": Made("gemma3n_vision", 1, PER_LAYER | ALTERNATING | {"intermediate_size": [64] * 4}),
    "gemma4": Made("gemma4", 2, PER_LAYER | ALTERNATING),  # reads the K/V of earlier layers, through wider MLPs
    "gemma4_moe": Made(  # experts beside the MLP; keys as values and other K/V heads in global layers
        "gemma4_awkward",
        4,
        ALTERNATING
        | {
            "num_experts": 8,
            "moe_intermediate_size": 32,
            "per_layer_config": {str(i): {"head_dim": 32, "num_key_value_heads": 2} for i in (1, 3)},
        },
    ),
    "gemma4_vision": Made("gemma4_vision", 2, PER_LAYER | ALTERNATING | {"global_head_dim": 32}),  # stackable
    "phi3": Made(  # q, k, v fused in one tensor, gate and up in another
        "phi3", 2, {"rope_scaling": FACTORS | {"type": "longrope"}, "hidden_size": 128}, without=("head_dim",)
    ),
    "starcoder2": Made("starcoder2", 4, {"use_bias": True}, draw=1),
    "olmo2": Made("olmo2", 2),  # norms of whole projections
    "gpt_oss": Made("gpt_oss_awkward", 2, ALTERNATING | {"num_local_experts": 8, "intermediate_size": 32}),
    "jaxinfer_mini": Made("jaxinfer_mini", 2, ALTERNATING | {"kv_from": [None, None, 0, 1]}),
}


def write_model(directory: Path, name: str) -> ModelConfig:
    """A Hugging Face directory of that model of MODELS, in float32; the same every time."""
    made = MODELS[name]
    rng = np.random.default_rng(sorted(MODELS).index(name) + len(MODELS) * made.draw)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(made.config()))
    config = load_config(directory)
    tensors = {tensor: drawn(rng, tensor, shape, config) for tensor, shape in stored_shapes(config).items()}
    write_tensors(directory / "model.safetensors", tensors)
    return config


def drawn(rng: np.random.Generator, name: str, shape: tuple[int, ...], config: ModelConfig) -> np.ndarray:
    """f32[shape], at a scale at which no part drowns another, rounding is not magnified and greedy answers vary.

    The MLPs move the residual stream most, so that the next token is another one and not the last again. What would
    magnify rounding is kept gentle: attention's scores, and routers', spread by about one.
    """
    offset = config.norm.offset
    default_scale = config.head_dim**-0.5
    gentle = (default_scale / (config.attention_scale or default_scale)) ** 0.5  # for queries, and for keys
    if name.endswith("sinks"):
        values = rng.uniform(-1.0, 3.0, shape)
    elif name.endswith("bias"):
        values = rng.normal(0.0, 0.1, shape)
    elif name.endswith(("q_norm.weight", "k_norm.weight")):
        values = rng.uniform(0.5, 1.5, shape) * gentle - offset
    elif "post_feedforward_layernorm" in name:
        values = rng.uniform(2.0, 6.0, shape) - offset
    elif len(shape) == 1:  # norms and other scales
        values = rng.uniform(0.5, 1.5, shape) - offset
    elif name.endswith("embed_tokens.weight"):
        values = rng.normal(0.0, 0.5 / (config.embed_scale or 1.0), shape)
    elif "_coefs" in name:  # AltUp's streams mix gently
        values = rng.normal(0.0, 0.25, shape) * shape[-1] ** -0.5
    elif "modality_router" in name:  # of inputs divided by the hidden size
        values = rng.normal(0.0, 1.0, shape) * shape[-1] ** 0.5
    elif "per_layer_input_gate" in name:  # opposite pairs: GELU never closes all eight, whose norm would be rounding
        half = rng.normal(0.0, 1.5, (shape[0] // 2, shape[1])) * shape[1] ** -0.5
        values = np.concatenate([half, -half])
    elif name.endswith("router.proj.weight"):  # of inputs divided by its root
        values = rng.normal(0.0, 1.0, shape)
    elif name.endswith(("q_proj.weight", "k_proj.weight")):
        values = rng.normal(0.0, gentle, shape) * shape[-1] ** -0.5
    elif name.endswith(MLP_OUTPUTS):
        values = rng.normal(0.0, 6.0, shape) * shape[-1] ** -0.5
        if not config.gated_mlp:  # its inputs' mean would be most of every output
            values -= values.mean(axis=-1, keepdims=True)
    else:
        values = rng.normal(0.0, 1.0, shape) * shape[-1] ** -0.5
    return values.astype(np.float32)
