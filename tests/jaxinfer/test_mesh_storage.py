"""Meshes whose weights and K/V are quantized, slide out of windows, or are more than one device holds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mesh_models import MODELS, drawn, write_model
from mesh_runs import (
    BASE,
    GREEDY,
    LOGITS_BAR,
    Zoo,
    argmax_only,
    least_kv_bytes,
    logits_error,
    random_tokens,
    serve_once,
)
from oracle import Oracle
from quantized_files import SCHEMES
from tensor_files import write_tensors

from jaxinfer import sampling
from jaxinfer.config import ConfigError
from jaxinfer.engine import Engine
from jaxinfer.models import load_config
from jaxinfer.models.weight_matching import stored_shapes
from jaxinfer.request import Request


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def short_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """test_mesh_sampling.py has the whole one."""
    monkeypatch.setattr(sampling, "sample", argmax_only)


def requests() -> list[Request]:
    """Two prompts over several steps, whose logits are wanted."""
    rng = np.random.default_rng(2)
    return [
        Request(f"whole-{i}", random_tokens(rng, count), replace(GREEDY, max_tokens=12))
        for i, count in enumerate((70, 9))
    ]


# ---- quantized weights

# scheme of tests/quantized_files.py -> factor of its scales, at which weights are as large as plain ones
WEIGHTS = {
    "packed int8": 1 / 12,
    "packed int4": 1.0,
    "gptq zero points": 0.7,
    "fp8 blocks": 1 / 40,
    "w8a8 int8": 1 / 12,
}
ROUNDED = 5e-3  # of the largest logit: experts' eight-bit activations, which a rounding error tips to another step


def write_quantized(directory: Path, scheme: str, architecture: str = "llama") -> Path:
    """A model of MODELS whose projections are quantized."""
    if directory.exists():
        return directory
    write_model(directory, architecture)
    fields = MODELS[architecture].config() | {"num_hidden_layers": 2}
    if "layer_types" in fields:
        fields["layer_types"] = fields["layer_types"][:2]
    (directory / "config.json").write_text(json.dumps(fields))
    model, rng, tensors = load_config(directory), np.random.default_rng(3), {}
    for name, shape in stored_shapes(model).items():
        if name.endswith("_proj.weight") or ".experts." in name:
            made, _ = SCHEMES[scheme].write(rng, name.removesuffix(".weight"), *shape)
            tensors |= {key: scaled(value, WEIGHTS[scheme]) if "scale" in key else value for key, value in made.items()}
        else:
            tensors[name] = drawn(rng, name, shape, model)
    write_tensors(directory / "model.safetensors", tensors)
    quantization: dict[str, Any] = dict(SCHEMES[scheme].config)
    if "config_groups" in quantization:
        quantization["ignore"] = ["lm_head", r"re:.*block_sparse_moe\.gate$"]
    (directory / "config.json").write_text(json.dumps(fields | {"quantization_config": quantization}))
    return directory


def scaled(values: np.ndarray, factor: float) -> np.ndarray:
    return (values.astype(np.float32) * factor).astype(values.dtype)


def slow(*values: str) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("scheme", "mesh"),
    [
        ("packed int8", "tensor=2"),
        slow("packed int8", "tensor=4"),
        slow("packed int4", "tensor=2"),
        ("packed int4", "tensor=4"),
        slow("packed int4", "pipe=2,tensor=2"),
        slow("gptq zero points", "tensor=2"),
        slow("gptq zero points", "tensor=4"),
        slow("fp8 blocks", "tensor=2"),
        ("fp8 blocks", "tensor=4"),
        ("w8a8 int8", "tensor=2"),
        slow("w8a8 int8", "tensor=4"),
    ],
)
def test_quantized_weights(zoo: Zoo, scheme: str, mesh: str) -> None:
    check_quantized(write_quantized(zoo.path("llama").parent / f"quantized-{scheme}", scheme), mesh)


@pytest.mark.slow
def test_quantized_activations_in_rings(zoo: Zoo) -> None:
    """Each device multiplies other rows than the next at a time, and every row keeps its own scale."""
    directory = write_quantized(zoo.path("llama").parent / "quantized-w8a8 int8", "w8a8 int8")
    check_quantized(directory, "tensor=2", sequence_parallel=True, max_num_batched_tokens=128, min_prefill_bucket=128)


@pytest.mark.parametrize(
    ("scheme", "mesh"),
    [
        ("packed int4", "expert=2,tensor=2"),
        slow("packed int4", "tensor=2"),
        slow("w8a8 int8", "expert=2,tensor=2"),
        slow("fp8 blocks", "expert=4"),
    ],
)
def test_quantized_experts(zoo: Zoo, scheme: str, mesh: str) -> None:
    directory = write_quantized(zoo.path("mixtral").parent / f"quantized-experts-{scheme}", scheme, "mixtral")
    check_quantized(directory, mesh, bar=ROUNDED if "w8a8" in scheme else LOGITS_BAR)


def check_quantized(directory: Path, mesh: str, *, bar: float = LOGITS_BAR, **options: Any) -> None:
    config = replace(BASE, **options)
    wanted = serve_once(directory, config, [requests()])
    got = serve_once(directory, replace(config, mesh=mesh), [requests()])
    errors = {name: logits_error(got.logits[name], logits) for name, logits in wanted.logits.items()}
    assert all(error <= bar for error in errors.values()), f"{directory.name} on {mesh}: {errors}"
    tokens, wanted_tokens = ({key: answer.tokens for key, answer in run.answers.items()} for run in (got, wanted))
    assert bar > LOGITS_BAR or tokens == wanted_tokens


def test_groups_that_do_not_divide_are_named(zoo: Zoo) -> None:
    directory = write_quantized(zoo.path("llama").parent / "quantized-packed int4", "packed int4")
    with pytest.raises(ConfigError, match=r"layers.0.attention.o.weight .* 4 groups of 32 inputs, which do not"):
        Engine(directory, replace(BASE, mesh="tensor=8"))


# ---- quantized K/V


@pytest.mark.parametrize("mesh", [slow("tensor=2"), "context=2", slow("tensor=2,context=2,pipe=2")])
def test_int8_pages(zoo: Zoo, mesh: str) -> None:
    """A K/V row that differs in its last bit may round to the next step; no more than that differs."""
    path, oracle = zoo.path("llama_biased"), Oracle(zoo.path("llama_biased"))
    alone, got = (serve_once(path, replace(BASE, kv_dtype="int8", mesh=sizes), [requests()]) for sizes in ("", mesh))
    for request in requests():
        ours, theirs = (run.logits[request.request_id] for run in (got, alone))
        by_rounding = logits_error(theirs, oracle.logits(list(request.prompt_token_ids)))
        assert logits_error(ours, theirs) <= by_rounding / 4


# ---- pages over devices


def test_a_prompt_larger_than_one_device_holds(zoo: Zoo) -> None:
    """One device refuses what four hold together."""
    path, config = zoo.path("llama"), replace(BASE, max_model_len=256)
    needed = least_kv_bytes(load_config(path), config)
    small = replace(config, kv_memory_bytes=needed // 3)
    words = (
        rf"kv_memory_bytes={needed // 3} is too little: .* needs {needed} bytes; .* more devices with a context axis"
    )
    with pytest.raises(ConfigError, match=words):
        Engine(path, small)
    rng, oracle = np.random.default_rng(4), Oracle(path)
    prompts = [random_tokens(rng, count) for count in (225, 180)]
    run = serve_once(
        path, replace(small, mesh="context=4"), [[Request(str(i), p, GREEDY)] for i, p in enumerate(prompts)]
    )
    for i, prompt in enumerate(prompts):
        tokens = run.answers[str(i), 0].tokens
        assert oracle.logits([*prompt, *tokens])[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
        assert len(tokens) == GREEDY.max_tokens


def test_pages_slide_out_of_windows_on_every_device(zoo: Zoo) -> None:
    """Pages lie on devices by turns: as a sequence grows, each gives back those that no later token sees."""
    path, window = zoo.path("mistral"), 16
    engine = Engine(path, replace(BASE, max_model_len=256, mesh="context=2", prefix_caching=False))
    prompt = random_tokens(np.random.default_rng(5), 100)
    engine.add(Request("long", prompt, replace(GREEDY, max_tokens=120)))
    tokens, used = [], []
    while engine.has_work():
        for event in engine.step():
            tokens += event.token_ids
        used += [engine.stats().pages_used[0]] if 0 < len(tokens) < 120 else []
    engine.check()
    engine.close()
    most_rows = window + 2 * BASE.loop_steps  # two calls in flight
    assert 0 < max(used) <= most_rows / 8 + 2 < (len(prompt) + 120) / 8 / 3
    logits = Oracle(path).logits([*prompt, *tokens])
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
