"""The oracle: one sequence, no cache, no batch. Every token recomputes the whole prefix, densely and in float32."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.models import load_config
from jaxinfer.models.checkpoint import load_parameters
from jaxinfer.models.transformer import merger


class Oracle:
    """Logits and greedy tokens of a Hugging Face directory, computed the plain way in float32."""

    def __init__(self, model_dir: str | Path):
        self.config = load_config(model_dir)
        self.parameters = load_parameters(model_dir, self.config, jnp.float32)
        merge = merger(self.config, jnp.float32, "xla")
        self._logits = jax.jit(lambda parameters, tokens: self._run(merge(parameters), tokens))

    def _run(self, model, tokens: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens.shape[0])
        distance = positions[:, None] - positions[None, :]

        def attend(index: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
            seen = (distance >= 0) & (distance < (self.config.layers[index].window or len(tokens)))
            scores = jnp.einsum("qnh,rnh->nqr", q, k) / math.sqrt(q.shape[-1])
            return jnp.einsum("nqr,rnh->qnh", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v)

        return model.unembed(model(tokens, positions, attend))

    def logits(self, tokens: list[int]) -> np.ndarray:
        """f32[tokens, vocab]. Padded to a multiple of 64 (later tokens change nothing), so that few shapes compile."""
        padded = np.zeros(-(-len(tokens) // 64) * 64, np.int32)
        padded[: len(tokens)] = tokens
        return np.asarray(self._logits(self.parameters, padded))[: len(tokens)]

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(np.argmax(self.logits(tokens)[-1])))
        return tokens[len(prompt) :]
