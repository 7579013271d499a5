"""Every architecture over meshes: by default one each, such that every kind of split meets several architectures."""

from dataclasses import replace

import numpy as np
import pytest
from mesh_models import MODELS, write_model
from mesh_runs import BASE, LOGITS_BAR, MESHES, Zoo, argmax_only, greedy_waves, logits_error
from oracle import Oracle

from jaxinfer import sampling
from jaxinfer.config import ConfigError
from jaxinfer.engine import Engine
from jaxinfer.models import ARCHITECTURES, load_config

ALL = "tensor=2,context=2,pipe=2"
DEFAULT = {
    "llama_biased": ALL,
    "mistral": "context=2",
    "ministral": ALL,
    "mixtral": "expert=2,tensor=2",
    "qwen2": "tensor=4",
    "qwen3": ALL,
    "qwen3_moe": "expert=2",
    "gemma": "tensor=8",
    "gemma2": "pipe=2",
    "gemma3": "data=2,tensor=2",
    "gemma3n": "tensor=4",
    "gemma4": "data=2,tensor=2",
    "gemma4_moe": "expert=2,tensor=2",
    "gemma4_vision": "pipe=2",
    "phi3": "tensor=4",
    "starcoder2": ALL,
    "olmo2": "tensor=4",
    "gpt_oss": "expert=2,context=2,tensor=2",
    "jaxinfer_mini": "tensor=2,context=2",
}
SHARES_KV = ("gemma3n", "gemma3n_vision", "gemma4", "jaxinfer_mini")
MIXTURES = ("mixtral", "qwen3_moe", "gemma4_moe", "gpt_oss")
REFUSED_STAGES = r"pipe=2: layer 2 reads the K/V of layer 0, so stages cannot be alike; use tensor or context instead"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def short_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """test_mesh_sampling.py has the whole one."""
    monkeypatch.setattr(sampling, "sample", argmax_only)


@pytest.mark.parametrize("name", DEFAULT)
def test_architecture_on_its_mesh(zoo: Zoo, name: str) -> None:
    if has_changing_logits(zoo, name):
        zoo.check(name, DEFAULT[name])
    else:
        zoo.check_by_oracle(name, DEFAULT[name])


def has_changing_logits(zoo: Zoo, name: str) -> bool:
    """Whether a longer sequence rotates its first tokens otherwise, so that the oracle would need a pass per token."""
    rule = load_config(zoo.path(name)).length_rule
    return rule is not None and rule.whole


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [*MESHES, "expert=4,tensor=2", "expert=2,context=2,pipe=2"])
@pytest.mark.parametrize("name", MODELS)
def test_architecture_on_every_mesh(zoo: Zoo, name: str, mesh: str) -> None:
    refusal = refusal_of(name, mesh)
    if refusal is None:
        zoo.check(name, mesh)
        return
    with pytest.raises(ConfigError, match=refusal):
        Engine(zoo.path(name), replace(BASE, mesh=mesh))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_vary(zoo: Zoo, name: str) -> None:
    """Else equal tokens say little of a mesh; logits of whole prompts are compared in any case."""
    answers = {key: answer.tokens for key, answer in zoo.alone(name).answers.items()}
    assert all(len(set(tokens)) >= 6 for tokens in answers.values()), answers


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_rounding_is_not_magnified(zoo: Zoo, name: str) -> None:
    """Else rounding alone could put a mesh that is right above the bar: last bits of weights move one device less."""
    oracle, rng = Oracle(zoo.path(name)), np.random.default_rng(0)
    prompts = [list(each.prompt_token_ids) for each in greedy_waves()[0] if each.request_id.startswith("whole")]
    wanted, weights = [oracle.logits(prompt) for prompt in prompts], oracle.parameters
    for _ in range(6):
        oracle.parameters = tuple(rounded_otherwise(rng, np.asarray(weight)) for weight in weights)
        errors = [logits_error(oracle.logits(prompt), logits) for prompt, logits in zip(prompts, wanted, strict=True)]
        assert all(error <= LOGITS_BAR for error in errors), errors


def rounded_otherwise(rng: np.random.Generator, weight: np.ndarray) -> np.ndarray:
    """f32, about a quarter of the values one unit in the last place away: more than rounding them once does."""
    return (weight * (1 + rng.uniform(-1, 1, weight.shape) * 2.0**-24)).astype(np.float32)


def refusal_of(name: str, mesh: str) -> str | None:
    """What the refusal of this mesh says; None: it is taken."""
    if "expert" in mesh and name not in MIXTURES:
        return "the model has no experts; use tensor="
    if "pipe" in mesh and name in SHARES_KV:
        return REFUSED_STAGES
    return None


@pytest.mark.parametrize(
    ("name", "mesh"), [(name, mesh) for mesh in ("pipe=2", "expert=2") for name in MODELS if refusal_of(name, mesh)]
)
def test_what_cannot_be_split_is_refused(zoo: Zoo, name: str, mesh: str) -> None:
    with pytest.raises(ConfigError, match=refusal_of(name, mesh)):
        Engine(zoo.path(name), replace(BASE, mesh=mesh))


def test_every_architecture_is_here(zoo: Zoo) -> None:
    made = {name: load_config(zoo.path(name)).architecture for name in MODELS}
    assert set(made.values()) == set(ARCHITECTURES)
    again = {name for name in MODELS if name not in DEFAULT}  # the same decoders under another name, or more K/V heads
    assert again == {"llama", "llama_mha", "gemma3_vision", "gemma3n_vision"}
    assert {name for name in MODELS if "pipe" in DEFAULT.get(name, "")}.isdisjoint(SHARES_KV)


def test_directories_are_the_same_every_time(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("again") / "gpt_oss"
    write_model(other, "gpt_oss")
    files = [path.name for path in other.iterdir()]
    assert sorted(files) == ["config.json", "model.safetensors"]
    assert all((other / file).read_bytes() == (zoo.path("gpt_oss") / file).read_bytes() for file in files)
