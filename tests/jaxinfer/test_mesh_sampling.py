"""Sampled requests on meshes: every setting, and seeds, give the tokens that one device gives."""

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from mesh_runs import BASE, GREEDY, LOGPROB_BAR, Run, Waves, Zoo, assert_equal, random_tokens, serve_once

from jaxinfer.request import FinishReason, Request, SamplingParams

SEEDED = SamplingParams(temperature=2.0, seed=11, max_tokens=24, ignore_eos=True, logprobs=True, top_logprobs=5)
SETTINGS: dict[str, SamplingParams] = {
    "plain": SEEDED,
    "top-k": replace(SEEDED, top_k=7),
    "top-p": replace(SEEDED, top_p=0.8),
    "min-p": replace(SEEDED, min_p=0.05),
    "penalties": replace(SEEDED, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.3),
    "all": replace(SEEDED, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2, frequency_penalty=0.3),
    "two": replace(SEEDED, n=2, top_p=0.95),
    "bias": replace(SEEDED, logit_bias={97: 4.0, 98: 5.0, 3: -3.0}),  # beside the padding
    "allowed": replace(SEEDED, allowed_token_ids=(1, 24, 25, 49, 50, 51, 98), min_tokens=3, stop_token_ids=(25,)),
    "greedy penalties": replace(GREEDY, repetition_penalty=1.5, top_logprobs=20),
    "prompt": replace(GREEDY, prompt_logprobs=3, max_tokens=2),
    "cool": replace(SEEDED, temperature=0.7),
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("models"))


@cache
def waves() -> Waves:
    """Each setting with a prompt of its own, all at once: the first of which `alone` is what it says there."""
    rng = np.random.default_rng(4)
    return [[Request(name, random_tokens(rng, 9 + 4 * i), params) for i, (name, params) in enumerate(SETTINGS.items())]]


@pytest.fixture(scope="module")
def alone(zoo: Zoo) -> Run:
    run = serve_once(zoo.path("llama"), BASE, waves())
    plain = run.answers["plain", 0].tokens
    assert len(set(plain)) > 12 and run.answers["two", 0].tokens != run.answers["two", 1].tokens
    assert {97, 98} & set(run.answers["bias", 0].tokens)
    assert set(run.answers["allowed", 0].tokens) <= {1, 24, 25, 49, 50, 51, 98}
    seen = [each.top for answer in run.answers.values() for each in answer.logprobs]
    seen += [each.top for each in run.prompt_logprobs["prompt"] if each is not None]
    gaps = [better - worse for top in seen for (_, better), (_, worse) in pairwise(top)]
    assert min(gaps) > 2 * LOGPROB_BAR, "their order could be another one on a mesh that is right"
    return run


def slow(*meshes: str) -> list[Any]:
    return [pytest.param(mesh, marks=pytest.mark.slow) for mesh in meshes]


MORE = slow("tensor=4", "tensor=8", "data=2,tensor=2", "pipe=2", "context=2", "data=2,context=2,pipe=2")


@pytest.mark.parametrize("mesh", ["tensor=2", "data=2", "tensor=2,context=2,pipe=2", *MORE])
def test_every_setting(zoo: Zoo, alone: Run, mesh: str) -> None:
    """And a token of the answer without stops as one: the answer up to there."""
    plain = alone.answers["plain", 0].tokens
    stops = Request("stops", waves()[0][0].prompt_token_ids, replace(SEEDED, stop_token_ids=(plain[9],)))
    run = serve_once(zoo.path("llama"), zoo.tight("llama", mesh), [*waves(), [stops]])
    stopped = run.answers.pop(("stops", 0))
    assert stopped.tokens == plain[: plain.index(plain[9]) + 1] and stopped.reason is FinishReason.STOP
    assert_equal(run, alone, mesh)
    for key, answer in alone.answers.items():
        for ours, theirs in zip(run.answers[key].logprobs, answer.logprobs, strict=True):
            np.testing.assert_allclose([p for _, p in ours.top], [p for _, p in theirs.top], atol=LOGPROB_BAR)
    for mine, other in zip(run.prompt_logprobs["prompt"], alone.prompt_logprobs["prompt"], strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            assert mine.rank == other.rank and [token for token, _ in mine.top] == [token for token, _ in other.top]
            assert abs(mine.logprob - other.logprob) <= LOGPROB_BAR


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor=4", "tensor=2,context=2,pipe=2"])
def test_greedy_requests_through_the_whole_sampler(zoo: Zoo, mesh: str) -> None:
    """test_mesh.py leaves it out: the same tokens with it."""
    zoo.check("llama", mesh)
