"""The oracle: one sequence, no cache, no batch. Every token recomputes the whole prefix, densely and in float32."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.models import load_config
from jaxinfer.models.checkpoint import load_parameters
from jaxinfer.models.layers import Attend
from jaxinfer.models.transformer import Decoder, merger, run_decoder


def dense_attend(config: ModelConfig, num_tokens: int) -> Attend:
    """An `attend` over one sequence from its first token on: all scores at once, in float32."""
    position = jnp.arange(num_tokens)
    distance = position[:, None] - position[None, :]
    made: dict[int, tuple[jax.Array, jax.Array]] = {}  # layer -> its K and V, for those that read them

    def attend(
        index: int, q: jax.Array, k: jax.Array | None, v: jax.Array | None, sinks: jax.Array | None
    ) -> jax.Array:
        if k is not None and v is not None:
            made[index] = k, v
        k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in made[config.kv_owner(index)])
        scale = config.attention_scale or 1 / math.sqrt(q.shape[-1])
        scores = jnp.einsum("qnh,rnh->nqr", q, k) * scale
        if (cap := config.attention_softcap) is not None:
            scores = cap * jnp.tanh(scores / cap)
        seen = (distance >= 0) & (distance < (config.layers[index].window or num_tokens))
        scores = jnp.where(seen, scores, -jnp.inf)
        if sinks is not None:
            column = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:2], 1))
            scores = jnp.concatenate([scores, column], axis=-1)
        return jnp.einsum("nqr,rnh->qnh", jax.nn.softmax(scores)[..., :num_tokens], v)

    return attend


class Oracle:
    """Logits and greedy tokens of a Hugging Face directory, computed the plain way in float32."""

    def __init__(self, model_dir: str | Path):
        self.config = load_config(model_dir)
        self.parameters = tuple(jax.tree.leaves(load_parameters(model_dir, self.config, jnp.float32)))
        merge = merger(self.config, jnp.float32, "xla")
        self._logits = jax.jit(lambda parameters, *arguments: self._run(merge(parameters), *arguments))

    def _run(self, model: Decoder, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens.shape[0])
        return model.unembed(run_decoder(model, tokens, positions, dense_attend(self.config, tokens.shape[0]), lengths))

    def logits(self, tokens: list[int], num_prompt: int | None = None) -> np.ndarray:
        """f32[tokens, vocab]. Padded to a multiple of 64 (later tokens change nothing), so that few shapes compile.

        num_prompt: of these tokens (default: all), for a rotation that looks at the prompt's length.
        """
        padded = np.zeros(-(-len(tokens) // 64) * 64, np.int32)
        padded[: len(tokens)] = tokens
        lengths = np.maximum(len(tokens) if num_prompt is None else num_prompt, 1 + np.arange(len(padded)))
        if (rule := self.config.length_rule) is not None and rule.whole:
            lengths = np.full(len(padded), len(tokens))
        return np.asarray(self._logits(self.parameters, padded, lengths.astype(np.int32)))[: len(tokens)]

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(np.argmax(self.logits(tokens, len(prompt))[-1])))
        return tokens[len(prompt) :]
