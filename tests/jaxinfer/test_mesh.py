"""Every mesh computes what one device computes: Llama through the engine, with chunks, neighbours and preemption."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from jax import lax
from mesh_models import VOCAB
from mesh_runs import (
    BASE,
    GREEDY,
    MESHES,
    Answer,
    Run,
    Zoo,
    argmax_only,
    assert_equal,
    greedy_waves,
    logits_error,
    random_tokens,
    serve,
    serve_once,
)

from jaxinfer import sampling
from jaxinfer.blueprint import Blueprint
from jaxinfer.config import ConfigError
from jaxinfer.engine import Engine
from jaxinfer.models import load_config
from jaxinfer.placement import mesh_of
from jaxinfer.request import Request
from sharding.shards import RING_ROWS

NO_EXPERTS = r"expert=2: the model has no experts; use tensor=\d instead"
OTHERS = ("context=4", "pipe=4", "data=4", "data=2,pipe=2", "data=2,context=2,tensor=2", "pipe=2,tensor=4")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def short_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """test_mesh_sampling.py has the whole one."""
    monkeypatch.setattr(sampling, "sample", argmax_only)


@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if "expert" not in mesh])
def test_mesh_equals_one_device(zoo: Zoo, mesh: str) -> None:
    zoo.check("llama", mesh)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", OTHERS)
def test_further_mesh_equals_one_device(zoo: Zoo, mesh: str) -> None:
    slots = 8 if mesh == "data=4" else BASE.max_num_seqs  # a slot alone on its shard would have none to preempt
    zoo.check("llama", mesh, max_num_seqs=slots)


@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if "expert" in mesh])
def test_experts_are_refused_where_there_are_none(zoo: Zoo, mesh: str) -> None:
    with pytest.raises(ConfigError, match=NO_EXPERTS):
        Engine(zoo.path("llama"), replace(BASE, mesh=mesh))


def test_tokens_need_not_be_split(zoo: Zoo) -> None:
    zoo.check("llama", "tensor=2", sequence_parallel=False)


def test_a_mesh_of_one_device_is_one_device(zoo: Zoo) -> None:
    """Through the same shard_map as any other, without a collective: bit by bit the same."""
    devices = jax.devices()[5:6]
    run = serve_once(zoo.path("llama"), BASE, greedy_waves(), devices)
    alone = zoo.alone("llama")
    assert run.answers == alone.answers
    assert all((run.logits[name] == logits).all() for name, logits in alone.logits.items())


def test_replicas_on_disjoint_devices(zoo: Zoo) -> None:
    """Two engines of one process, stepped in turn."""
    engines = [
        Engine(zoo.path("llama"), replace(BASE, mesh="tensor=2"), devices=jax.devices()[i : i + 2]) for i in (0, 2)
    ]
    for engine, first in zip(engines, (0, 2), strict=True):
        held = {device.id for leaf in jax.tree.leaves(engine.device_state) for device in leaf.devices()}
        assert held == {first, first + 1}
    runs = [Run(), Run()]
    for _ in itertools.zip_longest(*(stepping(engine, run) for engine, run in zip(engines, runs, strict=True))):
        pass
    wanted = {key: answer for key, answer in zoo.alone("llama").answers.items() if key[0].startswith("first")}
    for run in runs:
        assert_equal(run, Run(wanted), "a replica")
    for engine in engines:
        engine.close()


def stepping(engine: Engine, run: Run) -> Iterator[None]:
    """Serve the first wave, giving way at every step."""
    for request in greedy_waves()[0]:
        if request.request_id.startswith("first"):
            engine.add(request)
    while engine.has_work():
        for event in engine.step():
            answer = run.answers.setdefault((event.request_id, event.index), Answer())
            answer.tokens += event.token_ids
            answer.logprobs += event.logprobs or ()
            answer.reason = event.finish_reason
        yield
    engine.check()


def test_too_few_devices_are_named(zoo: Zoo) -> None:
    with pytest.raises(ConfigError, match=r"tensor=8,context=2.*needs 16 devices and there are 8.*JAX_NUM_CPU_DEVICES"):
        Engine(zoo.path("llama"), replace(BASE, mesh="tensor=8,context=2"))
    with pytest.raises(ConfigError, match="needs 4 devices and there are 2"):
        Engine(zoo.path("llama"), replace(BASE, mesh="tensor=4"), devices=jax.devices()[:2])


def test_pipeline_says_how_idle_it_is(zoo: Zoo) -> None:
    """Two stages and two micro-batches: one tick of each loop fills, one drains; a lone request leaves half idle."""
    engine = Engine(zoo.path("llama"), replace(BASE, mesh="pipe=2"))
    engine.add(Request("alone", (5, 6, 7), GREEDY))
    while engine.has_work():
        engine.step()
    assert 0.5 <= engine.stats().pipeline_bubble < 0.65
    engine.close()


@pytest.mark.parametrize(
    ("name", "mesh"), [("llama", "tensor=4"), pytest.param("gemma3n", "tensor=2", marks=pytest.mark.slow)]
)
def test_long_steps_go_round_rings(zoo: Zoo, name: str, mesh: str) -> None:
    """Steps of so many tokens that devices pass them round while they multiply; odd runs, chunks, decode rows."""
    long = {"max_model_len": 256, "max_num_batched_tokens": 269, "min_prefill_bucket": 269}
    rng = np.random.default_rng(6)
    prompts = [random_tokens(rng, count) for count in (240, 30, 7)]
    wave = [Request(f"whole-{i}", prompt, GREEDY) for i, prompt in enumerate(prompts)]
    config = replace(BASE, mesh=mesh, **long)
    model = load_config(zoo.path(name))
    parallel = Blueprint(model, config, mesh_of(model, config)).parallel
    assert parallel.rows_per_step(4, 269) // parallel.prefill.token_shards > RING_ROWS
    got = serve_once(zoo.path(name), config, [wave])
    assert_equal(got, serve_once(zoo.path(name), replace(BASE, **long), [wave]), f"{mesh} in rings")


def test_context_shards_take_the_tokens_of_the_first(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a network adds each shard's sums in another order, they may choose other tokens."""

    def differing(*arguments: Any) -> sampling.SampleResult:
        drawn = argmax_only(*arguments)
        return replace(drawn, tokens=(drawn.tokens + lax.axis_index("context")) % VOCAB)

    rng = np.random.default_rng(9)
    wave = [Request(f"whole-{i}", random_tokens(rng, 5 + 20 * i), GREEDY) for i in range(2)]
    alone = serve_once(zoo.path("llama"), BASE, [wave])
    monkeypatch.setattr(sampling, "sample", differing)
    got = serve_once(zoo.path("llama"), replace(BASE, mesh="context=2"), [wave])
    assert {key: answer.tokens for key, answer in got.answers.items()} == {
        key: answer.tokens for key, answer in alone.answers.items()
    }


def test_a_shard_that_grows_alone_wakes_no_slot_of_another(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot that is nobody's stays so: in a program as large as another shard needs, it would write others' pages."""
    monkeypatch.setattr("jaxinfer.programs.MIN_MIXED_SLOTS", 2)
    engine = Engine(zoo.path("llama"), replace(BASE, mesh="data=2", max_num_seqs=16))
    rng = np.random.default_rng(3)
    for count in (16, 1, 5, 1):
        for i in range(count):
            engine.add(Request(f"{count}-{i}", random_tokens(rng, 9), replace(GREEDY, max_tokens=6)))
        while engine.has_work():
            sequences = list(itertools.chain.from_iterable(engine._sequences.values()))
            engine.step()
            owned = {8 * each.data_shard + each.slot for each in sequences if each.slot is not None}
            awake = np.flatnonzero(~np.asarray(engine.device_state.slots.done))
            assert set(awake.tolist()) <= owned
    engine.close()


@pytest.mark.parametrize("mesh", ["data=2,tensor=2", pytest.param("pipe=2", marks=pytest.mark.slow)])
def test_a_failed_call_costs_time_not_requests(zoo: Zoo, mesh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(zoo.path("llama"), zoo.tight("llama", mesh))
    runner, calls = engine._runner, itertools.count()
    step = runner.step

    def failing(*arguments: Any) -> Any:
        if next(calls) % 9 != 7:
            return step(*arguments)
        jax.tree.map(lambda leaf: leaf.delete(), runner.state)  # as a failed call leaves it
        raise RuntimeError("a device said no")

    monkeypatch.setattr(runner, "step", failing)
    run = serve(engine, greedy_waves(), num_failures=None)
    assert run.stats is not None and run.stats.num_failed_calls > 2
    assert_equal(run, zoo.alone("llama"), f"{mesh}, failing")
    json.dumps(engine.info())
    engine.close()


@pytest.mark.parametrize(
    ("name", "mesh"), [("llama", "tensor=4"), pytest.param("mixtral", "expert=2,tensor=2", marks=pytest.mark.slow)]
)
def test_bfloat16(zoo: Zoo, name: str, mesh: str) -> None:
    """Rounded before sums as well as after: as far from float32 as one device's bfloat16 is, about."""
    exact = zoo.alone(name).logits
    alone, split = (
        serve_once(zoo.path(name), replace(BASE, dtype="bfloat16", mesh=sizes), greedy_waves()[:1])
        for sizes in ("", mesh)
    )
    for prompt, logits in exact.items():
        error, error_alone = logits_error(split.logits[prompt], logits), logits_error(alone.logits[prompt], logits)
        assert error <= 2 * error_alone, f"{prompt}: {error}, on one device {error_alone}"
