"""The decoder against transformers' own logits and greedy tokens, from files that scripts/make_goldens.py wrote."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxinfer.config import LayerSpec, ModelConfig
from jaxinfer.models import load_config
from jaxinfer.models.checkpoint import load_parameters
from jaxinfer.models.transformer import merger

GOLDENS = Path(__file__).parent.parent / "goldens"
NAMES = sorted(path.name for path in GOLDENS.iterdir())
BAR = 2e-4  # of the largest logit
Logits = Callable[[list[int]], np.ndarray]


def dense_attention(config: ModelConfig):
    """Causal, windowed softmax attention over one sequence, all scores at once."""

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        position = jnp.arange(q.shape[0])
        visible = position[None, :] <= position[:, None]
        if (window := config.layers[layer].window) is not None:
            visible &= position[None, :] > position[:, None] - window
        queries_per_kv_head = config.q_heads // config.kv_heads
        k, v = (jnp.repeat(x, queries_per_kv_head, axis=1) for x in (k, v))
        scores = jnp.einsum("qnh,knh->nqk", q, k) / np.sqrt(config.head_dim)
        return jnp.einsum("nqk,knh->qnh", jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1), v)

    return attend


def logits_function(directory: Path, config: ModelConfig, length: int) -> Logits:
    """Tokens -> f32[tokens, vocab]; padded to `length`, so that it compiles once."""
    parameters = load_parameters(directory, config, jnp.dtype(jnp.float32))
    merge = merger(config, jnp.dtype(jnp.float32), "auto")

    @jax.jit
    def forward(parameters: tuple[jax.Array, ...], tokens: jax.Array) -> jax.Array:
        model = merge(parameters)
        return model.unembed(model(tokens, jnp.arange(length), dense_attention(config)))

    def logits(tokens: list[int]) -> np.ndarray:
        padded = np.zeros(length, np.int32)
        padded[: len(tokens)] = tokens
        return np.asarray(forward(parameters, padded))[: len(tokens)]

    return logits


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens_equal_transformers(name: str) -> None:
    golden = load_file(GOLDENS / name / "golden.safetensors")
    prompt, expected = golden["prompt"].tolist(), golden["greedy"].tolist()
    config = load_config(GOLDENS / name)
    logits = logits_function(GOLDENS / name, config, len(prompt) + len(expected))
    assert relative_error(logits(prompt), golden["logits"]) <= BAR
    tokens = list(prompt)
    for _ in expected:
        tokens.append(int(logits(tokens)[-1].argmax()))
    assert tokens[len(prompt) :] == expected


def without_window(layer: LayerSpec) -> LayerSpec:
    return dataclasses.replace(layer, window=None)


def wider_window(layer: LayerSpec) -> LayerSpec:
    return dataclasses.replace(layer, window=layer.window and layer.window + 1)


def without_rope_scaling(layer: LayerSpec) -> LayerSpec:
    return dataclasses.replace(layer, rope=dataclasses.replace(layer.rope, scaling=None))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", without_rope_scaling),
        ("mistral", without_window),
        ("mistral", wider_window),
        ("ministral", without_window),
    ],
)
def test_goldens_notice_a_wrong_model(name: str, change: Callable[[LayerSpec], LayerSpec]) -> None:
    """The files can tell: one token more of window, or no rope scaling, is far over the bar."""
    golden = load_file(GOLDENS / name / "golden.safetensors")
    prompt = golden["prompt"].tolist()
    config = load_config(GOLDENS / name)
    wrong = dataclasses.replace(config, layers=tuple(change(layer) for layer in config.layers))
    assert relative_error(logits_function(GOLDENS / name, wrong, len(prompt))(prompt), golden["logits"]) > 10 * BAR


def test_goldens_are_small_and_cover_what_they_claim() -> None:
    assert {"llama", "mistral"} <= set(NAMES)
    for name in NAMES:
        assert sum(path.stat().st_size for path in (GOLDENS / name).iterdir()) <= 400_000
    num_prompt_tokens = len(load_file(GOLDENS / "llama" / "golden.safetensors")["prompt"])
    llama, mistral = load_config(GOLDENS / "llama"), load_config(GOLDENS / "mistral")
    rope = llama.layers[0].rope
    assert rope is not None and rope.scaling is not None and rope.scaling.original_max_position < num_prompt_tokens
    assert llama.tie_embeddings and not mistral.tie_embeddings
    assert all(layer.window is not None and layer.window < num_prompt_tokens for layer in mistral.layers)
    assert all(1 < config.kv_heads < config.q_heads for config in (llama, mistral))
