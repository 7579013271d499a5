"""The same requests through an engine on a mesh and one on one device: what they are, and what must be equal."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from mesh_models import VOCAB, write_model
from oracle import Oracle

from jaxinfer import sampling
from jaxinfer.config import ConfigError, EngineConfig, ModelConfig
from jaxinfer.engine import Engine
from jaxinfer.engine_stats import EngineStats
from jaxinfer.memory import pages_per_group
from jaxinfer.models import load_config
from jaxinfer.request import MAX_TOP_LOGPROBS, FinishReason, PromptLogprobs, Request, SamplingParams, TokenLogprobs
from sharding.vocabulary import Vocabulary

LOGITS_BAR = 1e-5  # of the largest logit: float32 added up in another order
LOGPROB_BAR = 1e-4
MESHES = (
    "tensor=2",
    "tensor=4",
    "tensor=8",
    "context=2",
    "pipe=2",
    "expert=2",
    "data=2",
    "expert=2,tensor=2",
    "data=2,tensor=2",
    "tensor=2,context=2,pipe=2",
)
# One program of each kind: four slots in all, one size of prefill.
BASE = EngineConfig(
    dtype="float32",
    max_num_seqs=4,
    max_model_len=128,
    max_num_batched_tokens=32,
    min_prefill_bucket=32,
    page_size=8,
    loop_steps=8,
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=True)


@dataclass
class Answer:
    """What one completion said."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    reason: FinishReason | None = None
    error: str | None = None


@dataclass
class Run:
    """All that an engine answered: completions by (request id, index); by request id logits f32[prompt, vocab] and how
    it saw the prompt, where asked for."""

    answers: dict[tuple[str, int], Answer] = field(default_factory=dict)
    logits: dict[str, np.ndarray] = field(default_factory=dict)
    prompt_logprobs: dict[str, PromptLogprobs] = field(default_factory=dict)
    stats: EngineStats | None = None


Waves = Sequence[Sequence[Request]]


def random_tokens(rng: np.random.Generator, count: int) -> tuple[int, ...]:
    return tuple(rng.integers(3, VOCAB, count).tolist())


@cache
def greedy_waves() -> Waves:
    """More requests than slots, prompts over several prefill steps; then some that begin as those did.

    "whole" requests want their prompt's logits. All together need more pages than a tight engine has.
    """
    rng = np.random.default_rng(0)
    shared = random_tokens(rng, 41)
    first = [random_tokens(rng, count) for count in (70, 3, 90, 17)] + [shared + random_tokens(rng, 30), shared]
    second = [shared + random_tokens(rng, count) for count in (5, 20, 1)] + [first[4] + random_tokens(rng, 9)]
    wholes = [Request(f"whole-{i}", first[i], GREEDY) for i in (0, 3)]
    rest = [Request(f"first-{i}", prompt, replace(GREEDY, max_tokens=36)) for i, prompt in enumerate(first)]
    return [wholes + rest, [Request(f"second-{i}", prompt, GREEDY) for i, prompt in enumerate(second)]]


def serve(engine: Engine, waves: Waves, *, num_failures: int | None = 0) -> Run:
    """Each wave after the one before has ended; the engine's books are checked at the end.

    num_failures: calls that may fail; None: any number.
    """
    run = Run()
    for wave in waves:
        for request in wave:
            engine.add(_listening(request, run) if request.request_id.startswith("whole") else request)
        while engine.has_work():
            for event in engine.step():
                answer = run.answers.setdefault((event.request_id, event.index), Answer())
                answer.tokens += event.token_ids
                answer.logprobs += event.logprobs or ()
                answer.reason, answer.error = event.finish_reason, event.error
                if event.prompt_logprobs is not None:
                    run.prompt_logprobs[event.request_id] = event.prompt_logprobs
        engine.check()
    run.stats = engine.stats()
    assert num_failures is None or run.stats.num_failed_calls <= num_failures
    return run


def _listening(request: Request, run: Run) -> Request:
    blocks: list[np.ndarray] = []

    def hear(first: int, logits: np.ndarray) -> None:
        assert first == sum(len(block) for block in blocks)
        blocks.append(np.array(logits))
        run.logits[request.request_id] = np.concatenate(blocks)

    return replace(request, on_prompt_logits=hear)


def least_kv_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Bytes of each device for K/V pages of one sequence, as the refusal of less says."""
    try:
        pages_per_group(model, replace(config, kv_memory_bytes=1), config.max_model_len or model.max_position)
    except ConfigError as error:
        found = re.search(r"needs (\d+) bytes", str(error))
        assert found is not None, error
        return int(found[1])
    raise AssertionError("one byte was enough")


class Zoo:
    """Directories of MODELS and what one device answers, each made once."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._alone: dict[tuple[str, EngineConfig], Run] = {}

    def path(self, name: str) -> Path:
        path = self._directory / name
        if not path.exists():
            write_model(path, name)
        return path

    def tight(self, name: str, mesh: str, **options: Any) -> EngineConfig:
        """BASE on a mesh, with so few pages that running sequences take them from each other."""
        config = replace(BASE, mesh=mesh, **options)
        return replace(config, kv_memory_bytes=least_kv_bytes(load_config(self.path(name)), config))

    def alone(self, name: str, **options: Any) -> Run:
        """Greedy requests on one device, with pages for all."""
        config = replace(BASE, **options)
        if (name, config) not in self._alone:
            self._alone[name, config] = serve_once(self.path(name), config, greedy_waves())
        return self._alone[name, config]

    def on_mesh(self, name: str, mesh: str, **options: Any) -> Run:
        """Greedy requests on a mesh, tight of pages."""
        run = serve_once(self.path(name), self.tight(name, mesh, **options), greedy_waves())
        assert run.stats is not None and run.stats.cached_prompt_tokens > 0, run.stats
        if any(layer.window is None for layer in load_config(self.path(name)).layers):  # else pages slide out in time
            assert run.stats.num_preemptions > 0, run.stats
        return run

    def check(self, name: str, mesh: str, **options: Any) -> None:
        """What a mesh answers is what one device does."""
        assert_equal(self.on_mesh(name, mesh, **options), self.alone(name), f"{name} on {mesh}")

    def check_by_oracle(self, name: str, mesh: str, **options: Any) -> None:
        """The same against the oracle, which compiles in a fifth of the time: each token is the best one."""
        run, oracle = self.on_mesh(name, mesh, **options), Oracle(self.path(name))
        assert oracle.config.length_rule is None or not oracle.config.length_rule.whole, "a token's logits change later"
        for request in (request for wave in greedy_waves() for request in wave):
            prompt, answer = list(request.prompt_token_ids), run.answers[request.request_id, 0]
            logits = oracle.logits(prompt + answer.tokens, len(prompt))
            assert len(answer.tokens) == request.sampling.max_tokens, f"{name} on {mesh}: {answer}"
            assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer.tokens, f"{name} on {mesh}: {request}"
            if request.request_id.startswith("whole"):
                assert logits_error(run.logits[request.request_id], logits[: len(prompt)]) <= LOGITS_BAR


def argmax_only(
    logits: jax.Array,
    arrays: sampling.SamplingArrays,
    counts: sampling.TokenCounts,
    allowed: jax.Array,
    stop_ids: jax.Array,
    positions: jax.Array,
    num_generated: jax.Array,
    active: jax.Array,
    vocabulary: Vocabulary,
) -> sampling.SampleResult:
    """`sampling.sample` of greedy rows, for tests of other things: it compiles for longer than these models do."""
    whole = vocabulary.whole(logits)
    tokens = jnp.argmax(whole, axis=1).astype(jnp.int32)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(whole), tokens[:, None], axis=1)[:, 0]
    none = jnp.zeros((len(tokens), MAX_TOP_LOGPROBS))
    return sampling.SampleResult(tokens, logprobs, none.astype(jnp.int32), none, jnp.any(~jnp.isfinite(whole), axis=1))


def serve_once(directory: Path, config: EngineConfig, waves: Waves, devices: Sequence[jax.Device] | None = None) -> Run:
    engine = Engine(directory, config, devices=devices)
    try:
        return serve(engine, waves)
    finally:
        engine.close()


def assert_equal(got: Run, wanted: Run, what: str) -> None:
    """The same tokens and ends; logits and log-probabilities as close as float32 allows."""
    assert got.answers.keys() == wanted.answers.keys()
    errors = {name: logits_error(got.logits[name], logits) for name, logits in wanted.logits.items()}
    assert all(error <= LOGITS_BAR for error in errors.values()), f"{what}: prompt logits differ: {errors}"
    for key, answer in wanted.answers.items():
        mine = got.answers[key]
        assert (mine.tokens, mine.reason, mine.error) == (answer.tokens, answer.reason, answer.error), f"{what}: {key}"
        np.testing.assert_allclose(
            [each.logprob for each in mine.logprobs],
            [each.logprob for each in answer.logprobs],
            atol=LOGPROB_BAR,
            err_msg=f"{what}: {key}",
        )
        for ours, theirs in zip(mine.logprobs, answer.logprobs, strict=True):
            assert [token for token, _ in ours.top] == [token for token, _ in theirs.top], f"{what}: {key}"


def logits_error(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference, of the largest logit."""
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    assert np.isfinite(wanted).all()
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())
