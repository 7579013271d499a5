"""JaxinferMiniForCausalLM in torch, for golden files: Llama's block, sliding layers, K/V shared across layers.

Written apart from the engine's decoder, so that one checks the other. Cross-layer K/V sharing: Brandon et al. 2024.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

ARCHITECTURE = "JaxinferMiniForCausalLM"
KeyValue = tuple[torch.Tensor, torch.Tensor]  # each f32[tokens, kv_heads, head_dim]


@dataclass(frozen=True)
class MiniConfig:
    """config.json's fields; `layer_types` is written with a letter per layer here, s(liding) or f(ull)."""

    hidden_size: int
    intermediate_size: int
    num_key_value_heads: int
    head_dim: int
    layer_types: str
    kv_from: tuple[int | None, ...]  # the earlier layer whose K/V a layer reads; None: its own
    num_attention_heads: int = 4
    vocab_size: int = 96
    sliding_window: int = 16
    max_position_embeddings: int = 256
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_id: int = 2

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        fields = asdict(self)
        theta = fields.pop("rope_theta")
        names = {"s": "sliding_attention", "f": "full_attention"}
        return fields | {
            "architectures": [ARCHITECTURE],
            "model_type": "jaxinfer_mini",
            "hidden_act": "silu",
            "num_hidden_layers": len(self.layer_types),
            "layer_types": [names[letter] for letter in self.layer_types],
            "kv_from": list(self.kv_from),
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "dtype": "bfloat16",
        }


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    """Queries always its own; keys and values its own, or those an earlier layer made."""

    def __init__(self, config: MiniConfig, layer: int):
        super().__init__()
        embed, heads, kv_heads, size = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.config = config
        self.window = config.sliding_window if config.layer_types[layer] == "s" else None
        self.q_proj = nn.Linear(embed, heads * size, bias=False)
        if config.kv_from[layer] is None:
            self.k_proj = nn.Linear(embed, kv_heads * size, bias=False)
            self.v_proj = nn.Linear(embed, kv_heads * size, bias=False)
        self.o_proj = nn.Linear(heads * size, embed, bias=False)

    def key_value(self, x: torch.Tensor, start: int) -> KeyValue:
        shape = (len(x), self.config.num_key_value_heads, self.config.head_dim)
        return rotate(self.k_proj(x).view(shape), start, self.config.rope_theta), self.v_proj(x).view(shape)

    def forward(self, x: torch.Tensor, start: int, kv: KeyValue) -> torch.Tensor:
        """x: f32[new tokens, embed], the first at position `start`; kv: of all tokens so far."""
        keys, values = kv
        query = self.q_proj(x).view(len(x), self.config.num_attention_heads, self.config.head_dim)
        query = rotate(query, start, self.config.rope_theta)
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        scores = torch.einsum("qnh,knh->nqk", query, keys) * self.config.head_dim**-0.5
        behind = torch.arange(start, start + len(x))[:, None] - torch.arange(len(keys))[None, :]
        hidden = behind < 0 if self.window is None else (behind < 0) | (behind >= self.window)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return self.o_proj(torch.einsum("nqk,knh->qnh", weights, values).reshape(len(x), -1))


class MLP(nn.Module):
    def __init__(self, config: MiniConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: MiniConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)


class MiniForCausalLM(nn.Module):
    """The calls that make_goldens.py makes of a transformers model: forward, generate, save_pretrained."""

    def __init__(self, config: MiniConfig):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config, index) for index in range(len(config.layer_types)))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def run(self, tokens: torch.Tensor, start: int, cache: dict[int, KeyValue]) -> torch.Tensor:
        """i64[new tokens] at positions from `start` -> f32[new tokens, vocab]; adds to `cache`, by owning layer."""
        x = self.model.embed_tokens(tokens)
        for index, layer in enumerate(self.model.layers):
            normed, owner = layer.input_layernorm(x), self.config.kv_from[index]
            if owner is None:
                new = layer.self_attn.key_value(normed, start)
                old = cache.get(index)
                cache[index] = new if old is None else (torch.cat([old[0], new[0]]), torch.cat([old[1], new[1]]))
            x = x + layer.self_attn(normed, start, cache[index if owner is None else owner])
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        unembed = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        return self.model.norm(x) @ unembed.T

    def forward(self, tokens: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.run(tokens[0], 0, {})[None])

    def generate(self, prompt: torch.Tensor, max_new_tokens: int, **_: Any) -> SimpleNamespace:
        """Greedy, with the cache; one sequence."""
        cache: dict[int, KeyValue] = {}
        tokens, rows, fed = prompt[0], [], 0
        for _step in range(max_new_tokens):
            rows.append(self.run(tokens[fed:], fed, cache)[-1:])
            fed = len(tokens)
            tokens = torch.cat([tokens, rows[-1].argmax(-1)])
        return SimpleNamespace(sequences=tokens[None], logits=tuple(rows))

    def save_pretrained(self, out: Path) -> None:
        (out / "config.json").write_text(json.dumps(self.config.to_dict(), indent=2, sort_keys=True) + "\n")
        save_file(dict(self.state_dict()), out / "model.safetensors", metadata={"format": "pt"})


def rotate(x: torch.Tensor, start: int, theta: float) -> torch.Tensor:
    """Rotary embedding of f32[tokens, heads, head_dim] at positions from `start`: dimension i goes with i + half."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.arange(start, start + len(x), dtype=torch.float32)[:, None, None] * frequencies
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
