"""Every architecture against transformers' own logits and greedy tokens, from files that scripts/make_goldens.py wrote.

Twice: the decoder alone, on one sequence with all scores at once; and through `LLM`, with pages, chunks and neighbours.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import dense_attend
from safetensors.numpy import load_file

from jaxinfer.config import ActivationSpec, LayerSpec, ModelConfig
from jaxinfer.llm import LLM
from jaxinfer.models import ARCHITECTURES, load_config
from jaxinfer.models.checkpoint import load_parameters
from jaxinfer.models.transformer import abstract_parameters, merger, run_decoder
from jaxinfer.request import SamplingParams
from jaxinfer.rope import DynamicScaling, LongScaling, RopeSpec

GOLDENS = Path(__file__).parent.parent / "goldens"
NAMES = sorted(path.name for path in GOLDENS.iterdir())
BAR = 2e-4  # of the largest logit
FLOAT32 = jnp.dtype(jnp.float32)
Parameters = dict[str, jax.Array]  # by our names; a quantized one is a pytree
Change = Callable[[ModelConfig], ModelConfig]


@dataclass(frozen=True)
class Golden:
    """One directory, loaded."""

    directory: Path
    config: ModelConfig
    parameters: Parameters
    prompt: list[int]
    greedy: list[int]
    logits: np.ndarray  # f32[prompt tokens, vocab]


@functools.cache
def golden(name: str) -> Golden:
    tensors = load_file(GOLDENS / name / "golden.safetensors")
    config = load_config(GOLDENS / name)
    parameters = load_parameters(GOLDENS / name, config, FLOAT32)
    by_name = dict(zip(abstract_parameters(config, FLOAT32), parameters, strict=True))
    prompt, greedy = tensors["prompt"].tolist(), tensors["greedy"].tolist()
    return Golden(GOLDENS / name, config, by_name, prompt, greedy, tensors["logits"])


def forward(config: ModelConfig, tokens: list[int], num_prompt: int) -> Callable[[Parameters], np.ndarray]:
    """Parameters -> logits f32[tokens, vocab] of one sequence; compiled once. Parameters it has no use for are left."""
    names, merge = list(abstract_parameters(config, FLOAT32)), merger(config, FLOAT32, "auto")
    positions = jnp.arange(len(tokens))
    rule = config.length_rule
    is_whole = rule is not None and rule.whole
    lengths = jnp.full(len(tokens), len(tokens)) if is_whole else jnp.maximum(num_prompt, positions + 1)

    @jax.jit
    def run(leaves: list[jax.Array]) -> jax.Array:
        model = merge(tuple(leaves))
        hidden = run_decoder(model, jnp.array(tokens), positions, dense_attend(config, len(tokens)), lengths)
        return model.unembed(hidden)

    return lambda parameters: np.asarray(run(jax.tree.leaves([parameters[name] for name in names])))


@functools.cache
def right_forward(name: str) -> Callable[[Parameters], np.ndarray]:
    """Of the prompt and its continuation."""
    this = golden(name)
    return forward(this.config, this.prompt + this.greedy, len(this.prompt))


def error(ours: np.ndarray, name: str) -> float:
    """Largest difference of the prompt's logits, of their largest."""
    theirs = golden(name).logits
    return float(np.abs(ours[: len(theirs)] - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens_equal_transformers(name: str) -> None:
    this = golden(name)
    logits = right_forward(name)(this.parameters)
    assert error(logits, name) <= BAR
    assert logits[len(this.prompt) - 1 : -1].argmax(-1).tolist() == this.greedy


# ---- could the files tell?


def moved(leaf: jax.Array) -> jax.Array:
    """The same values in other places; a lone value, doubled."""
    return 2 * leaf if leaf.size == 1 else jnp.roll(leaf, 1, axis=-1)


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_changes_the_logits(name: str) -> None:
    """What is loaded is used: each tensor with its values moved by one place is far over the bar."""
    this, run = golden(name), right_forward(name)
    silent = {}
    for weight, value in this.parameters.items():
        changed = error(run(this.parameters | {weight: jax.tree.map(moved, value)}), name)
        if changed <= 10 * BAR and not cannot_show(weight, this.config):
            silent[weight] = changed
    assert not silent


def cannot_show(weight: str, config: ModelConfig) -> bool:
    """A scalar over all that the last norm sees, and the scale of a correction where the model says not to scale it."""
    is_last_scalar = weight == f"layers.{len(config.layers) - 1}.scalar"
    return is_last_scalar or (weight.endswith("alt_up.output_scale") and not config.alt_up.scale_corrected)


def model(**fields: object) -> Change:
    return lambda config: dataclasses.replace(config, **fields)


def layers(change: Callable[[LayerSpec], LayerSpec]) -> Change:
    return lambda config: dataclasses.replace(config, layers=tuple(change(layer) for layer in config.layers))


def each(**fields: object) -> Change:
    return layers(lambda layer: dataclasses.replace(layer, **fields))


def rope(change: Callable[[RopeSpec], RopeSpec]) -> Change:
    return layers(lambda layer: dataclasses.replace(layer, rope=layer.rope and change(layer.rope)))


def norm(**fields: object) -> Change:
    return lambda config: dataclasses.replace(config, norm=dataclasses.replace(config.norm, **fields))


def experts(**fields: object) -> Change:
    return layers(
        lambda layer: dataclasses.replace(layer, experts=layer.experts and dataclasses.replace(layer.experts, **fields))
    )


def scaling(**fields: object) -> Change:
    return rope(lambda spec: dataclasses.replace(spec, scaling=dataclasses.replace(spec.scaling, **fields)))


def alt_up(**fields: object) -> Change:
    return lambda config: dataclasses.replace(config, alt_up=dataclasses.replace(config.alt_up, **fields))


def layer_inputs(**fields: object) -> Change:
    return lambda config: dataclasses.replace(
        config, per_layer_input=dataclasses.replace(config.per_layer_input, **fields)
    )


def reads_from(index: int, owner: int) -> Change:
    """Layer `index` reads the K/V of another owner."""

    def change(config: ModelConfig) -> ModelConfig:
        one = dataclasses.replace(config.layers[index], kv_from=owner)
        return dataclasses.replace(config, layers=(*config.layers[:index], one, *config.layers[index + 1 :]))

    return change


def one_rope(config: ModelConfig) -> ModelConfig:
    """The first layer's rotation in all of them."""
    return each(rope=config.layers[0].rope)(config)


def wider_window(layer: LayerSpec) -> LayerSpec:
    return dataclasses.replace(layer, window=layer.window and layer.window + 1)


UNSCALED = rope(lambda spec: dataclasses.replace(spec, scaling=None))
ALL_TURN = rope(lambda spec: dataclasses.replace(spec, num_turning=None))
WINDOW_OFF, WINDOW_WIDER = each(window=None), layers(wider_window)

WRONG: dict[str, dict[str, Change]] = {
    "llama": {"rope scaling": UNSCALED},
    "llama_awkward": {
        "bias of q, k, v": model(qkv_bias=False),
        "of o": model(o_bias=False),
        "MLP": model(mlp_bias=False),
    },
    "llama_linear": {"rope scaling": UNSCALED, "factor": scaling(factor=2.0)},
    "llama_dynamic": {"rope scaling": UNSCALED, "length": scaling(original_max_position=48)},
    "llama_yarn": {"attention factor": scaling(attention_factor=1.0), "ramp": scaling(beta_slow=1.0)},
    "llama_longrope": {"short factors": scaling(original_max_position=200), "factor": scaling(attention_factor=1.0)},
    "mistral": {"window off": WINDOW_OFF, "wider": WINDOW_WIDER},
    "ministral": {"window off": WINDOW_OFF, "wider": WINDOW_WIDER},
    "mixtral": {"weights": experts(renormalize=False), "fewer": experts(per_token=1)},
    "mixtral_awkward": {"window": WINDOW_WIDER, "order": experts(renormalize=False)},
    "qwen2": {"bias": model(qkv_bias=False)},
    "qwen2_awkward": {"window off": WINDOW_OFF, "wider": WINDOW_WIDER},
    "qwen3": {"norms of q and k": model(qk_norm=None)},
    "qwen3_moe": {"weights": experts(renormalize=False)},
    "qwen3_moe_awkward": {"weights": experts(renormalize=True)},
    "gemma": {
        "offset": norm(offset=0.0),
        "embedding scale": model(embed_scale=None),
        "activation": model(activation=ActivationSpec("silu")),
    },
    "gemma2": {
        "soft cap of scores": model(attention_softcap=None),
        "of logits": model(logit_softcap=None),
        "scale": model(attention_scale=None),
        "window": WINDOW_WIDER,
        "norms": model(norm_place="before"),
    },
    "gemma3": {"one base": one_rope, "norms of q and k": model(qk_norm=None), "window": WINDOW_OFF},
    "gemma3_awkward": {"rope scaling": UNSCALED, "scale": model(attention_scale=None)},
    "gemma3n": {
        "sparsity": each(activation_sparsity=0.0),
        "norm of values": model(v_norm=False),
        "scale": model(attention_scale=None),
        "unscaled correction": alt_up(scale_corrected=False),
    },
    "gemma3n_awkward": {
        "stream": alt_up(active=0),
        "K/V of": reads_from(3, 0),
        "scaled correction": alt_up(scale_corrected=True),
        "soft cap": model(logit_softcap=None),
        "tokens past the table": layer_inputs(vocab_size=96),
    },
    "gemma4": {"all turn": ALL_TURN, "norm of values": model(v_norm=False), "soft cap": model(logit_softcap=None)},
    "gemma4_awkward": {"fewer experts": experts(per_token=1), "window": WINDOW_WIDER},
    "phi3": {"factors": scaling(original_max_position=200), "window": WINDOW_WIDER},
    "phi3_awkward": {"all turn": rope(lambda spec: RopeSpec(spec.theta))},
    "starcoder2": {"norm": norm(kind="rms"), "bias": model(mlp_bias=False), "window": WINDOW_WIDER},
    "olmo2": {"norms": model(qk_norm=None)},
    "gpt_oss": {
        "sinks": model(sinks=False),
        "window": WINDOW_WIDER,
        "ramp of whole dimensions": scaling(truncate=True),
        "bias of o": model(o_bias=False),
    },
    "gpt_oss_awkward": {
        "sinks": model(sinks=False),
        "limit": model(activation=ActivationSpec("clamped_swiglu", limit=7.0)),
        "slope": model(activation=ActivationSpec("clamped_swiglu", alpha=1.0, limit=1.5)),
        "biases": experts(bias=False),
    },
    "jaxinfer_mini": {"K/V of": reads_from(4, 1), "window": WINDOW_WIDER},
    "jaxinfer_mini_awkward": {"K/V of": reads_from(4, 1), "window": WINDOW_OFF},
}


@pytest.mark.parametrize(("name", "what"), [(name, what) for name, changes in WRONG.items() for what in changes])
def test_goldens_notice_a_wrong_model(name: str, what: str) -> None:
    """The files can tell: one thing left out, or one token more of window, is far over the bar."""
    this = golden(name)
    wrong = WRONG[name][what](this.config)
    assert wrong != this.config
    assert error(forward(wrong, this.prompt, len(this.prompt))(this.parameters), name) > 10 * BAR


# ---- through the engine

# Those whose attention, cache or rotation differs from one another's; the slow suite runs all.
SERVED = ("llama_dynamic", "gemma2", "gemma3n_awkward", "gemma4", "gemma4_awkward", "gpt_oss", "jaxinfer_mini")
SERVED_IN_CHUNKS = ("llama_longrope", "gemma3n", "gpt_oss_awkward")
COMMON = {"dtype": "float32", "max_num_seqs": 4, "page_size": 8, "loop_steps": 16}
WHOLE = COMMON | {"max_num_batched_tokens": 96, "min_prefill_bucket": 96}  # a prompt in one step, one size compiled
CHUNKS = COMMON | {"max_num_batched_tokens": 16, "min_prefill_bucket": 16, "max_prefill_seqs": 2}
GREEDY = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)


def by_default(*names: str) -> list[object]:
    """All golden models, those not named in the slow suite."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


def neighbours(prompt: list[int]) -> list[list[int]]:
    """Four prompts of which the second is the golden one; the third begins as it does."""
    rng = np.random.default_rng(0)
    before, end, after = (rng.integers(3, 90, size).tolist() for size in (70, 9, 5))
    return [before, prompt, prompt[:40] + end, after]


@pytest.mark.parametrize("name", by_default(*SERVED))
def test_served_alone_and_among_others(name: str) -> None:
    """Prompt in one step; then again, found in the prefix cache, in a batch of other lengths."""
    this = golden(name)
    llm = LLM(this.directory, warm_up=False, **WHOLE)
    [alone] = llm.generate([this.prompt], GREEDY, progress=False)
    assert alone.num_cached_tokens == 0
    assert alone.outputs[0].token_ids == this.greedy
    assert error(llm.prompt_logits(this.prompt), name) <= BAR
    results = llm.generate(neighbours(this.prompt), GREEDY, progress=False)
    assert results[1].outputs[0].token_ids == this.greedy
    assert results[1].num_cached_tokens >= 64
    assert all(len(result.outputs[0].token_ids) == 48 for result in results)


@pytest.mark.parametrize("name", by_default(*SERVED_IN_CHUNKS))
def test_served_in_chunks_among_others(name: str) -> None:
    """Sixteen tokens a step at most, shared with neighbours."""
    this = golden(name)
    llm = LLM(this.directory, warm_up=False, **CHUNKS)
    results = llm.generate(neighbours(this.prompt), GREEDY, progress=False)
    assert results[1].outputs[0].token_ids == this.greedy
    assert results[1].num_cached_tokens == 0
    assert error(llm.prompt_logits(this.prompt), name) <= BAR


# ---- what there is


def test_goldens_are_small_and_cover_every_architecture() -> None:
    sizes = {name: sum(path.stat().st_size for path in (GOLDENS / name).iterdir()) for name in NAMES}
    assert max(sizes.values()) <= 250_000
    assert sum(sizes.values()) <= 6_000_000
    made = [golden(name).config.architecture for name in NAMES]
    assert {name: made.count(name) >= (1 if "Conditional" in name else 2) for name in ARCHITECTURES} == dict.fromkeys(
        ARCHITECTURES, True
    )


def test_goldens_reach_past_what_they_test() -> None:
    """Prompts are longer than every window and than every context before rope scaling."""
    for name in NAMES:
        this = golden(name)
        assert len(this.greedy) == 48
        assert len(set(this.greedy)) >= 16
        for layer in this.config.layers:
            assert layer.window is None or layer.window < len(this.prompt) - 16
            original = getattr(layer.rope.scaling, "original_max_position", 0) if layer.rope is not None else 0
            assert original < len(this.prompt)
    kinds = {type(layer.rope.scaling) for name in NAMES for layer in golden(name).config.layers if layer.rope}
    assert {DynamicScaling, LongScaling} <= kinds and len(kinds) == 6  # five scalings and none
    shapes = {(config.q_heads // config.kv_heads, config.tie_embeddings) for config in map(config_of, NAMES)}
    assert {(1, True), (2, True), (2, False), (4, True), (4, False)} <= shapes


def config_of(name: str) -> ModelConfig:
    return golden(name).config
