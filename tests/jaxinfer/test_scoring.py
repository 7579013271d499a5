"""Prompt log-probabilities and logits from the engine's own path: right, the same bits in any schedule, and private."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from oracle import Oracle

from jaxinfer import scoring
from jaxinfer.config import ConfigError, EngineConfig
from jaxinfer.engine import Engine
from jaxinfer.llm import LLM
from jaxinfer.request import (
    MAX_TOP_LOGPROBS,
    FinishReason,
    PromptLogprobs,
    Request,
    RequestError,
    SamplingParams,
    TokenEvent,
)

MODEL = Path(__file__).parents[1] / "goldens" / "ministral"  # sliding-window layers among full ones
VOCAB = json.loads((MODEL / "config.json").read_text())["vocab_size"]
BASE = EngineConfig(
    dtype="float32",
    max_num_seqs=4,
    max_model_len=256,
    max_num_batched_tokens=64,
    min_prefill_bucket=16,
    page_size=8,
    loop_steps=4,
    kv_memory_bytes=2_000_000,
)
CONFIGS = {
    "small chunks": {"max_num_batched_tokens": 16, "max_prefill_seqs": 1},
    "one large chunk": {"max_num_batched_tokens": 256, "min_prefill_bucket": 256},
    "no prefix cache": {"prefix_caching": False},
    "static": {"batching": "static"},
    "preempting": {"max_num_seqs": 8},  # and a pool of little more than one long sequence
}


def engine_of(name: str) -> Engine:
    config = replace(BASE, **CONFIGS[name])
    if name == "preempting":
        with pytest.raises(ConfigError, match="kv_memory_bytes=1 is too little") as caught:
            Engine(MODEL, replace(config, kv_memory_bytes=1))
        [least_bytes] = re.findall(r"needs (\d+) bytes", str(caught.value))
        config = replace(config, kv_memory_bytes=int(1.3 * int(least_bytes)))
    return Engine(MODEL, config)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(MODEL)


@pytest.fixture(scope="module")
def engine() -> Engine:
    built = Engine(MODEL, BASE)
    built.warm_up()
    return built


def prompts() -> list[tuple[int, ...]]:
    """Lengths around pages, blocks and chunks; some share a prefix."""
    rng = np.random.default_rng(4)
    shared = rng.integers(1, VOCAB, 40).tolist()
    alone = [rng.integers(1, VOCAB, n).tolist() for n in (1, 2, 16, 17, 64, 65, 200)]
    return [tuple(p) for p in (*alone, shared, [*shared, 5, 6, 7], [*shared, 5, 9])]


def asking(num_top: int = 0, **changes: object) -> SamplingParams:
    return replace(SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True, prompt_logprobs=num_top), **changes)


def run(engine: Engine, requests: Iterable[Request]) -> dict[str, list[TokenEvent]]:
    for request in requests:
        engine.add(request)
    events: dict[str, list[TokenEvent]] = {}
    while engine.has_work():
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    engine.check()
    return events


def told(events: list[TokenEvent]) -> PromptLogprobs:
    """The prompt log-probabilities, which came once and with the first event of completion 0."""
    own = [event for event in events if event.index == 0]
    assert own[0].prompt_logprobs is not None
    assert [event.prompt_logprobs for event in events if event is not own[0]] == [None] * (len(events) - 1)
    return own[0].prompt_logprobs


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


@pytest.fixture(scope="module")
def alone(engine: Engine) -> dict[tuple[int, ...], PromptLogprobs]:
    """Every prompt by itself, with alternatives."""
    return {prompt: told(run(engine, [Request("a", prompt, asking(5))])["a"]) for prompt in prompts()}


def test_values_are_the_plain_computation(alone: dict, oracle: Oracle) -> None:
    for prompt, values in alone.items():
        assert values[0] is None and len(values) == len(prompt)
        truth = log_softmax(oracle.logits(list(prompt)))
        for position, value in enumerate(values[1:], start=1):
            row = truth[position - 1]
            assert value.logprob == pytest.approx(row[prompt[position]], abs=1e-4)
            ahead = np.flatnonzero(row > row[prompt[position]] + 1e-4)
            tied = np.flatnonzero(np.abs(row - row[prompt[position]]) <= 1e-4)
            assert len(ahead) < value.rank <= len(ahead) + len(tied)
            assert [p for _, p in value.top] == pytest.approx(np.sort(row)[::-1][:5], abs=1e-4)
            assert all(p == pytest.approx(row[token], abs=1e-4) for token, p in value.top)
            if value.rank <= 5:
                assert value.top[value.rank - 1] == (prompt[position], value.logprob)


def test_they_are_the_bits_that_sampling_reports(engine: Engine) -> None:
    """Generate, then ask for the same tokens as a prompt."""
    prompt = prompts()[3]
    params = asking(0, max_tokens=40, prompt_logprobs=None, logprobs=True, top_logprobs=5)
    events = run(engine, [Request("a", prompt, params)])["a"]
    tokens = tuple(t for event in events for t in event.token_ids)
    drawn = [value for event in events for value in event.logprobs or ()]
    values = told(run(engine, [Request("b", (*prompt, *tokens), asking(5))])["b"])[len(prompt) :]
    assert [(v.logprob, v.top) for v in values] == [(v.logprob, v.top) for v in drawn]
    assert {v.rank for v in values} == {1}  # greedy


@pytest.mark.parametrize("name", CONFIGS)
def test_any_schedule_gives_the_same_bits(name: str, alone: dict) -> None:
    engine = engine_of(name)
    long = asking(5, max_tokens=50) if name == "preempting" else asking(5)
    requests = [Request(f"{i}-{k}", p, long) for k in range(2) for i, p in enumerate(prompts())]
    got = run(engine, requests)
    for request in requests:
        assert told(got[request.request_id]) == alone[request.prompt_token_ids], request.request_id
        assert got[request.request_id][0].num_cached_tokens == 0
    if name == "preempting":
        assert engine.stats().num_preemptions > 0


def test_fewer_alternatives_are_the_first_of_them(engine: Engine, alone: dict) -> None:
    prompt = prompts()[5]
    mixed = [Request("none", prompt, asking(0)), Request("all", prompt, asking(MAX_TOP_LOGPROBS))]
    got = run(engine, [*mixed, Request("plain", prompt, asking(prompt_logprobs=None))])
    for own, none, most in zip(alone[prompt][1:], told(got["none"])[1:], told(got["all"])[1:], strict=True):
        assert none == replace(own, top=())
        assert most.top[:5] == own.top and len(most.top) == MAX_TOP_LOGPROBS
    assert all(event.prompt_logprobs is None for event in got["plain"])


def test_a_scored_prompt_takes_nothing_from_the_cache_and_leaves_its_pages_there(alone: dict) -> None:
    engine = Engine(MODEL, BASE)
    prompt = prompts()[6]
    plain = Request("plain", prompt, asking(prompt_logprobs=None))
    for _ in range(2):
        events = run(engine, [Request("scored", prompt, asking(5))])["scored"]
        assert told(events) == alone[prompt] and events[-1].num_cached_tokens == 0
    assert run(engine, [plain])["plain"][-1].num_cached_tokens == len(prompt) - 1


def test_completions_of_a_prompt_share_one_scoring(engine: Engine, alone: dict) -> None:
    prompt = prompts()[6]
    events = run(engine, [Request("a", prompt, asking(5, n=3, temperature=1.0, seed=1))])["a"]
    assert told(events) == alone[prompt]
    assert {event.index for event in events} == {0, 1, 2}
    assert max(event.num_cached_tokens for event in events if event.index > 0) > 0


def test_a_request_that_ends_before_its_prompt_is_done_has_none(engine: Engine) -> None:
    prompt = prompts()[6]
    engine.add(Request("a", prompt, asking(2)))
    assert engine.step() == []
    engine.abort("a")
    [event] = run(engine, [])["a"]
    assert event.finish_reason is FinishReason.ABORT and event.prompt_logprobs is None


def test_scoring_compiles_on_demand_and_is_no_stray(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(MODEL, BASE)
    engine.warm_up()
    declared = {str(shape) for shape in engine.programs.declared()}
    assert {str(shape) for shape in engine.programs._compiled} == declared
    logits: list[int] = []
    run(engine, [Request("a", prompts()[5], asking(1), on_prompt_logits=lambda first, _: logits.append(first))])
    added = {str(shape) for shape in engine.programs._compiled} - declared
    assert added and added <= set(engine.info()["programs_on_demand"])
    assert engine.stats().compiles_after_warmup == 0 and "after warm-up" not in caplog.text


# ---- logits


def gather(blocks: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """The blocks joined, after a look at their places."""
    ends = np.cumsum([0, *(len(block) for _, block in blocks)])
    assert [first for first, _ in blocks] == ends[:-1].tolist()
    return np.concatenate([block for _, block in blocks])


@pytest.mark.parametrize("name", ["as it is", *CONFIGS])
def test_logits_are_those_of_every_position(name: str, oracle: Oracle, engine: Engine) -> None:
    built = engine if name == "as it is" else engine_of(name)
    heard: dict[str, list[tuple[int, np.ndarray]]] = {}
    requests = []
    for i, prompt in enumerate(prompts()):
        blocks = heard[str(i)] = []
        listen = lambda first, logits, blocks=blocks: blocks.append((first, logits.copy()))
        requests.append(Request(str(i), prompt, asking(1 if i % 2 else None, max_tokens=20), on_prompt_logits=listen))
    got = run(built, requests)
    for i, prompt in enumerate(prompts()):
        logits = gather(heard[str(i)])
        assert logits.dtype == np.float32 and max(len(block) for _, block in heard[str(i)]) <= scoring.BLOCK_ROWS
        np.testing.assert_allclose(logits, oracle.logits(list(prompt)), atol=2e-4)
        if i % 2:
            own = [v.logprob for v in told(got[str(i)])[1:]]
            assert own == pytest.approx(log_softmax(logits)[np.arange(len(prompt) - 1), prompt[1:]], abs=2e-5)


def test_a_listener_that_raises_ends_its_own_request(engine: Engine) -> None:
    def refuse(first: int, logits: np.ndarray) -> None:
        raise KeyError("no room")

    got = run(
        engine,
        [
            Request("bad", prompts()[6], asking(None), on_prompt_logits=refuse),
            Request("good", prompts()[4], asking(0)),
        ],
    )
    assert got["bad"][-1].finish_reason is FinishReason.ERROR
    assert got["bad"][-1].error == "on_prompt_logits raised KeyError: 'no room'"
    assert got["good"][-1].finish_reason is FinishReason.LENGTH and told(got["good"])


# ---- failures


def test_failed_calls_cost_time_only(alone: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third reading of a call's scores or logits fails; positions are told once all the same."""
    engine = Engine(MODEL, BASE)
    read, calls = engine._runner.read, iter(range(10**6))

    def failing(name: str, *arguments: object) -> object:
        if next(calls) % 3 == 2:
            raise RuntimeError("the device said no")
        return read(name, *arguments)

    monkeypatch.setattr(engine._runner, "read", failing)
    blocks: list[tuple[int, np.ndarray]] = []
    listen = lambda first, logits: blocks.append((first, logits.copy()))
    requests = [Request(str(i), prompt, asking(5)) for i, prompt in enumerate(prompts())]
    got = run(engine, [*requests, Request("l", prompts()[6], asking(None), on_prompt_logits=listen)])
    assert engine.stats().num_failed_calls > 1
    assert all(told(got[r.request_id]) == alone[r.prompt_token_ids] for r in requests)
    assert len(gather(blocks)) == len(prompts()[6])


def test_values_that_are_not_finite_end_the_request_that_has_them(engine: Engine, monkeypatch) -> None:
    read = engine._runner.read

    def poisoned(name: str, *arguments: object) -> object:
        scores = read(name, *arguments)
        return scores._replace(logprobs=scores.logprobs.at[30].set(np.nan))

    monkeypatch.setattr(engine._runner, "read", poisoned)
    got = run(engine, [Request("bad", prompts()[3] * 2, asking(0)), Request("good", prompts()[1], asking(0))])
    assert got["bad"][-1].finish_reason is FinishReason.ERROR
    assert got["bad"][-1].error == "the model gave no finite log-probability to the prompt token at position 31"
    assert told(got["good"])[1] is not None


@pytest.mark.parametrize("value", [-1, MAX_TOP_LOGPROBS + 1, True, 1.5, "2"])
def test_a_bad_number_of_alternatives_is_refused(value: object) -> None:
    with pytest.raises(RequestError, match=f"prompt_logprobs: {value!r} must be a whole number from 0 to 20"):
        SamplingParams(prompt_logprobs=value)  # type: ignore[arg-type]


# ---- LLM


def test_llm_gives_them_in_process(alone: dict, oracle: Oracle) -> None:
    llm = LLM(
        MODEL,
        warm_up=False,
        **{name: getattr(BASE, name) for name in ("dtype", "max_num_batched_tokens")},
        max_num_seqs=4,
        max_model_len=256,
        min_prefill_bucket=16,
        page_size=8,
    )
    results = llm.generate(list(prompts()), asking(5), progress=False)
    assert [result.prompt_logprobs for result in results] == list(alone.values())
    assert llm.score(list(prompts()), num_top=5) == list(alone.values())
    prompt = prompts()[6]
    np.testing.assert_allclose(llm.prompt_logits(prompt), oracle.logits(list(prompt)), atol=2e-4)
    with pytest.raises(RequestError, match="prompt_logprobs: 21"):
        llm.score([prompt], num_top=21)
    with pytest.raises(RequestError, match=r"prompts\[1\]"):
        llm.score([prompt, (VOCAB,)])
