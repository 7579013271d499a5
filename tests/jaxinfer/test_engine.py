"""The engine against the oracle: the same tokens and log-probabilities, bit for bit, whatever the schedule."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Oracle

from jaxinfer import programs
from jaxinfer.batch import DeviceState, PagedCache
from jaxinfer.config import ATTENTION_BACKENDS, KV_DTYPES, MATMUL_BACKENDS, ConfigError, EngineConfig
from jaxinfer.engine import Engine, _Flight
from jaxinfer.outcome import Outcome
from jaxinfer.request import FinishReason, QueueFullError, Request, RequestError, SamplingParams, TokenEvent
from pallas_kernels import attention, matmul
from pallas_kernels.attention import PageRows, storage

ROOT = Path(__file__).parents[2]
VOCAB = 96
BASE = EngineConfig(
    dtype="float32",
    max_num_seqs=4,
    max_model_len=256,
    max_num_batched_tokens=64,
    min_prefill_bucket=32,
    page_size=8,
    loop_steps=8,
    kv_memory_bytes=2_000_000,
)
SMALL_POOL = 100_000  # bytes: about one and a half of the longest sequences
CONFIGS = {
    "continuous": {},
    "dynamic": {"batching": "dynamic", "max_batch_wait_s": 0.01},
    "static": {"batching": "static"},
    "no-prefix-cache": {"prefix_caching": False},
    "one-step-loops": {"loop_steps": 1},
    "small-chunks": {"max_num_batched_tokens": 32, "max_prefill_seqs": 1},
    "whole-prompts": {"max_num_batched_tokens": 256, "chunked_prefill": False},
    "preempting": {"kv_memory_bytes": SMALL_POOL, "prefix_caching": False},
    "preempting-cached": {"kv_memory_bytes": SMALL_POOL, "max_num_seqs": 8},
    "preempting-static": {"kv_memory_bytes": SMALL_POOL, "batching": "static", "loop_steps": 1},
    "one-slot": {"max_num_seqs": 1},
    "page-32": {"page_size": 32},
    "reference-attention": {"attention_backend": "reference"},
}


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; GQA, a sliding-window layer between full ones, untied embeddings."""
    out = tmp_path_factory.mktemp("model")
    shape = [
        "--hidden-size",
        "32",
        "--layers",
        "3",
        "--heads",
        "4",
        "--kv-heads",
        "2",
        "--intermediate-size",
        "64",
        "--dtype",
        "float32",
    ]
    command = [sys.executable, str(ROOT / "scripts/make_random_model.py"), "--arch", "llama", *shape]
    subprocess.run([*command, "--vocab-size", str(VOCAB), "--seed", "3", "--out", str(out)], check=True)
    config = json.loads((out / "config.json").read_text())
    config |= {"architectures": ["MinistralForCausalLM"], "model_type": "ministral", "sliding_window": 24}
    config |= {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "max_position_embeddings": 512}
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="session")
def oracle(model_dir: Path) -> Oracle:
    return Oracle(model_dir)


@pytest.fixture(scope="session")
def engine(model_dir: Path) -> Engine:
    built = Engine(model_dir, BASE)
    built.warm_up()
    return built


def prompts(seed: int = 0) -> list[tuple[int, ...]]:
    """Lengths around pages, chunks and windows; some share a prefix, one is another's whole prefix."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(1, VOCAB, 50).tolist()
    tails = [rng.integers(1, VOCAB, n).tolist() for n in (3, 40, 1)]
    alone = [rng.integers(1, VOCAB, n).tolist() for n in (1, 7, 8, 65, 130)]
    return [tuple(p) for p in (*alone, shared + tails[0], shared + tails[1], shared, shared + tails[0] + tails[2])]


def run(engine: Engine, requests: Iterable[Request]) -> dict[tuple[str, int], list[TokenEvent]]:
    """Everything each completion said, with the engine's books checked at the end."""
    for request in requests:
        engine.add(request)
    events: dict[tuple[str, int], list[TokenEvent]] = {}
    while engine.has_work():
        for event in engine.step():
            events.setdefault((event.request_id, event.index), []).append(event)
    engine.check()
    for said in events.values():
        assert [event.finish_reason is not None for event in said] == [False] * (len(said) - 1) + [True]
    return events


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def logprobs_of(events: list[TokenEvent]) -> list[float]:
    return [value.logprob for event in events for value in event.logprobs or ()]


def greedy(**changes: object) -> SamplingParams:
    return replace(SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=True), **changes)


SAMPLED = SamplingParams(
    temperature=0.9,
    top_p=0.9,
    top_k=40,
    min_p=0.01,
    repetition_penalty=1.2,
    frequency_penalty=0.3,
    presence_penalty=0.2,
    max_tokens=24,
    ignore_eos=True,
    seed=11,
    logprobs=True,
)


def both(seed: int = 0) -> list[Request]:
    """Every prompt once greedy, once sampled."""
    return [
        Request(f"{kind}-{i}", prompt, params)
        for i, prompt in enumerate(prompts(seed))
        for kind, params in (("greedy", greedy()), ("sampled", replace(SAMPLED, seed=i)))
    ]


@pytest.fixture(scope="session")
def expected(engine: Engine, oracle: Oracle) -> dict[tuple[str, int], list[TokenEvent]]:
    """Each request alone in the engine; the greedy ones proven by the oracle."""
    alone = {}
    for request in both():
        alone |= run(engine, [request])
    for i, prompt in enumerate(prompts()):
        assert tokens_of(alone[f"greedy-{i}", 0]) == oracle.greedy(list(prompt), 24), f"prompt {i}"
    return alone


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_gives_the_same_bits(name: str, model_dir: Path, expected: dict) -> None:
    engine = Engine(model_dir, replace(BASE, **CONFIGS[name]))
    got = run(engine, both())
    for key, events in expected.items():
        assert tokens_of(got[key]) == tokens_of(events), f"{name}: {key}"
        if name != "reference-attention":  # another kernel adds in another order
            assert logprobs_of(got[key]) == logprobs_of(events), f"{name}: {key}"
    if name in ("preempting", "preempting-cached"):
        assert engine.stats().num_preemptions > 0
    if CONFIGS[name].get("prefix_caching", True) and CONFIGS[name].get("batching") != "static":
        assert 0 < engine.stats().cached_prompt_tokens <= engine.stats().prompt_tokens


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), arrivals=st.floats(0.1, 4.0), abort_rate=st.floats(0.0, 0.3))
def test_any_schedule_gives_the_same_bits(
    seed: int, arrivals: float, abort_rate: float, engine: Engine, expected: dict
) -> None:
    """Requests arrive and are aborted between any two steps."""
    rng = np.random.default_rng(seed)
    requests = {request.request_id: request for request in both()}
    waiting = rng.permutation(sorted(requests))[: rng.integers(1, len(requests) + 1)].tolist()
    got: dict[str, list[TokenEvent]] = {}
    aborted = set()
    while waiting or engine.has_work():
        for _ in range(min(len(waiting), rng.poisson(arrivals))):
            got[waiting[-1]] = []
            engine.add(requests[waiting.pop()])
        for event in engine.step():
            got[event.request_id].append(event)
        if got and rng.random() < abort_rate:
            name = rng.choice(sorted(got))
            aborted.add(name)
            engine.abort(name)
    engine.check()
    for name, events in got.items():
        whole = expected[name, 0]
        if events[-1].finish_reason is FinishReason.ABORT:
            assert name in aborted
            said = len(tokens_of(events))
            assert tokens_of(events) == tokens_of(whole)[:said]
        else:
            assert tokens_of(events) == tokens_of(whole)
            assert logprobs_of(events) == logprobs_of(whole)


def test_unused_pages_may_hold_nan(model_dir: Path, expected: dict) -> None:
    engine = Engine(model_dir, BASE)
    poisoned = []
    for kv in engine._runner.state.cache.layers:
        spec, pages = kv.spec, jnp.arange(kv.keys.shape[0])
        nan = jnp.full((len(pages), spec.page_size, 2, spec.kv_heads, spec.head_dim), jnp.nan)
        poisoned.append(attention.write_pages(kv, pages, PageRows(nan)))
    engine._runner.state = DeviceState(PagedCache(tuple(poisoned)), engine._runner.state.slots)
    got = run(engine, both())
    assert all(tokens_of(got[key]) == tokens_of(events) for key, events in expected.items())


@pytest.mark.parametrize("kv_dtype", storage.QUANTIZED)
def test_quantized_pages_hold_more_tokens_and_change_little(model_dir: Path, kv_dtype: str, expected: dict) -> None:
    """The page pool is a budget of bytes; a request's tokens do not depend on how it was chunked."""
    config = replace(BASE, kv_dtype=kv_dtype, kv_memory_bytes=SMALL_POOL)
    engine = Engine(model_dir, config)
    plain = Engine(model_dir, replace(BASE, kv_memory_bytes=SMALL_POOL))
    assert engine.info()["kv_dtype"] == kv_dtype
    assert engine.info()["kv_bytes_per_token"] < 0.45 * plain.info()["kv_bytes_per_token"]  # of float32
    assert engine.num_pages[0] > 1.5 * plain.num_pages[0]
    got = run(engine, both())
    if kv_dtype == "int8":
        chunked = run(Engine(model_dir, replace(config, max_num_batched_tokens=32, max_prefill_seqs=1)), both())
        assert all(tokens_of(got[key]) == tokens_of(events) for key, events in chunked.items())
    first = [abs(logprobs_of(got[key])[0] - logprobs_of(expected[key])[0]) for key in expected]
    assert max(first) < {"int8": 0.02, "float8_e4m3fn": 0.1, "int4": 0.5}[kv_dtype]


def test_every_backend_can_be_asked_for() -> None:
    assert set(ATTENTION_BACKENDS) == {"auto", *attention.OP.backends}
    assert set(MATMUL_BACKENDS) == {"auto", *matmul.OP.backends}
    assert {"auto", *storage.DTYPES} == {*KV_DTYPES, "float16"}  # the engine computes in bfloat16 or float32


def test_nothing_compiles_after_warm_up(engine: Engine) -> None:
    before = engine.stats().compiles_after_warmup
    run(engine, both(seed=5))
    varied = [
        Request("a", (5, 6), SamplingParams(temperature=1.3, max_tokens=5)),
        Request("b", (5, 6), SamplingParams(top_k=3, n=3, max_tokens=9)),
        Request("c", (5,), SamplingParams(allowed_token_ids=(1, 2, 3), logprobs=True, top_logprobs=20)),
        Request("d", (5,), SamplingParams(logit_bias={7: 5.0}, min_tokens=3, stop_token_ids=(7,))),
    ]
    run(engine, varied)
    assert engine.stats().compiles_after_warmup == before == 0


def test_a_stray_compile_is_counted(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(model_dir, BASE)
    engine.warm_up()
    engine.programs._compiled.clear()
    run(engine, [Request("a", (1, 2), greedy(max_tokens=2))])
    assert engine.stats().compiles_after_warmup > 0
    assert "after warm-up" in caplog.text


# ---- sampling fields, seen from outside


def test_n_completions_differ_and_repeat(engine: Engine) -> None:
    params = SamplingParams(temperature=1.0, n=4, seed=5, max_tokens=12, ignore_eos=True)
    first = run(engine, [Request("a", tuple(range(1, 20)), params)])
    again = run(engine, [Request("a", tuple(range(1, 20)), params)])
    texts = [tuple(tokens_of(first["a", i])) for i in range(4)]
    assert len(set(texts)) == 4
    assert texts == [tuple(tokens_of(again["a", i])) for i in range(4)]
    one = run(engine, [Request("a", tuple(range(1, 20)), replace(params, n=1))])
    assert tuple(tokens_of(one["a", 0])) == texts[0]


def test_unseeded_requests_differ(engine: Engine) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    got = run(engine, [Request(name, (1, 2, 3), params) for name in "ab"])
    assert tokens_of(got["a", 0]) != tokens_of(got["b", 0])


def test_fields_are_honoured(engine: Engine, oracle: Oracle) -> None:
    prompt = (4, 8, 15, 16)
    plain = oracle.greedy(list(prompt), 24)
    stop = plain[5]
    cases = {
        "stop": greedy(stop_token_ids=(stop,)),
        "min": greedy(stop_token_ids=(plain[0],), min_tokens=6),
        "bias": greedy(logit_bias={77: 100.0}),
        "allowed": greedy(allowed_token_ids=(3, 5)),
        "top": greedy(top_logprobs=5),
        "penalty": greedy(repetition_penalty=50.0, max_tokens=40),
    }
    got = {name: run(engine, [Request(name, prompt, params)])[name, 0] for name, params in cases.items()}
    assert tokens_of(got["stop"]) == plain[: plain.index(stop) + 1]
    assert got["stop"][-1].finish_reason is FinishReason.STOP
    assert plain[0] not in tokens_of(got["min"])[:6] and len(tokens_of(got["min"])) >= 6
    assert set(tokens_of(got["bias"])) == {77}
    assert set(tokens_of(got["allowed"])) <= {3, 5}
    assert len(set(tokens_of(got["penalty"])) | set(prompt)) == 40 + len(set(prompt))
    for event in got["top"]:
        for token, value in zip(event.token_ids, event.logprobs or (), strict=True):
            assert value.top[0] == (token, value.logprob) and len(value.top) == 5
    truth = jax.nn.log_softmax(oracle.logits([*prompt, *plain])[len(prompt) - 1 : -1])
    values = [value for event in got["top"] for value in event.logprobs or ()]
    np.testing.assert_allclose(
        [v.logprob for v in values], truth[np.arange(24), plain], atol=1e-4
    )  # the oracle sums in another order


def test_length_limits(engine: Engine) -> None:
    long = run(engine, [Request("a", tuple([7] * 250), greedy(max_tokens=None))])["a", 0]
    assert len(tokens_of(long)) == 6 and long[-1].finish_reason is FinishReason.LENGTH
    assert long[-1].num_prompt_tokens == 250 and long[-1].num_generated_tokens == 6


def test_bad_requests_are_refused_and_disturb_nobody(engine: Engine) -> None:
    engine.add(Request("good", (1, 2, 3), greedy()))
    for request, words in (
        (Request("a", ()), "prompt: is empty"),
        (Request("a", (VOCAB,)), f"{VOCAB} is outside the vocabulary of {VOCAB}"),
        (Request("a", tuple([1] * 256)), "256 tokens leave no room to generate: max_model_len is 256"),
        (Request("a", (1,), SamplingParams(stop=("x",))), "stop strings need a tokenizer"),
        (Request("a", (1,), SamplingParams(logit_bias={-1: 1.0})), "-1 must be a whole number from 0"),
        (Request("good", (1,)), "in use"),
    ):
        with pytest.raises(RequestError, match=words):
            engine.add(request)
    assert len(tokens_of(run(engine, [])["good", 0])) == 24


def test_queue_is_bounded(model_dir: Path) -> None:
    engine = Engine(model_dir, replace(BASE, max_queue=3))
    for i in range(3):
        engine.add(Request(str(i), (1,), greedy(max_tokens=2)))
    with pytest.raises(QueueFullError, match="max_queue=3") as caught:
        engine.add(Request("x", (1,), greedy()))
    assert caught.value.retry_after_s > 0
    assert len(run(engine, [])) == 3


# ---- failures


@pytest.mark.parametrize("when", ["dispatch", "result"])
def test_a_failed_call_costs_time_not_requests(
    when: str, model_dir: Path, expected: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model_dir, BASE)
    dispatch, calls = engine._dispatch, iter(range(10**6))

    class Broken:
        is_fully_addressable = True

        def __array__(self, *_: object, **__: object) -> np.ndarray:
            raise RuntimeError("the device said no")

    def failing(plans):
        call = next(calls)
        if call % 7 != 5:
            return dispatch(plans)
        jax.tree.map(lambda x: x.delete(), engine._runner.state)  # as a failed call leaves it
        if when == "dispatch":
            raise RuntimeError("the device said no")

        shape = engine.programs.shape_for(plans[0].num_slots, 0)
        return _Flight(plans, shape, Outcome(Broken(), None, None), 0.0)

    monkeypatch.setattr(engine, "_dispatch", failing)
    got = run(engine, both())
    assert engine.stats().num_failed_calls > 0
    for key, events in expected.items():
        assert tokens_of(got[key]) == tokens_of(events), key


def test_any_exception_while_dispatching_is_recovered_from(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model_dir, BASE)
    dispatch, failures = engine._dispatch, [MemoryError("no memory"), OverflowError("too large")]

    def failing(plan):
        if failures:
            raise failures.pop()
        return dispatch(plan)

    monkeypatch.setattr(engine, "_dispatch", failing)
    assert len(tokens_of(run(engine, [Request("a", (1, 2, 3), greedy())])["a", 0])) == 24
    assert engine.stats().num_failed_calls == 2


def test_a_name_is_free_once_its_end_was_told(engine: Engine) -> None:
    engine.add(Request("again", (1, 2, 3), greedy()))
    engine.abort("again")
    with pytest.raises(RequestError, match="'again' is in use"):
        engine.add(Request("again", (1, 2, 3), greedy()))
    assert [event.finish_reason for event in engine.step()] == [FinishReason.ABORT]
    assert len(tokens_of(run(engine, [Request("again", (1, 2, 3), greedy())])["again", 0])) == 24


def test_a_call_that_always_fails_ends_its_requests(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model_dir, BASE)
    real = engine._dispatch

    def fail(plan):
        raise RuntimeError("no device")

    monkeypatch.setattr(engine, "_dispatch", fail)
    got = run(engine, [Request("a", (1, 2, 3), greedy())])
    assert got["a", 0][-1].finish_reason is FinishReason.ERROR
    assert "failed 3 times in a row" in (got["a", 0][-1].error or "")
    monkeypatch.setattr(engine, "_dispatch", real)
    assert len(tokens_of(run(engine, [Request("b", (1, 2, 3), greedy())])["b", 0])) == 24


def test_nan_ends_its_own_request_only(model_dir: Path, expected: dict) -> None:
    engine = Engine(model_dir, BASE)
    requests = [Request(f"greedy-{i}", prompt, greedy()) for i, prompt in enumerate(prompts()[:4])]
    used = {token for r in requests for token in (*r.prompt_token_ids, *tokens_of(expected[r.request_id, 0]))}
    bad = min(set(range(VOCAB)) - used)
    embed = engine._runner.parameters[0]
    engine._runner.parameters = (embed.at[bad].set(jnp.nan), *engine._runner.parameters[1:])
    got = run(engine, [*requests[:2], Request("bad", (1, 2, bad), greedy()), *requests[2:]])
    assert got["bad", 0][-1].finish_reason is FinishReason.ERROR
    assert "NaN" in (got["bad", 0][-1].error or "")
    assert not tokens_of(got["bad", 0]) and got["bad", 0][-1].num_generated_tokens == 0
    for request in requests:
        assert tokens_of(got[request.request_id, 0]) == tokens_of(expected[request.request_id, 0])


def test_a_compilation_cache_that_cannot_be_written_is_refused_if_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    below, updates = tmp_path / "file" / "below", []
    config = SimpleNamespace(jax_compilation_cache_dir=None, update=lambda *change: updates.append(change))
    monkeypatch.setattr(programs, "jax", SimpleNamespace(config=config))
    monkeypatch.setattr(programs, "default_compilation_cache", lambda: below)
    with pytest.raises(ConfigError, match=r"compilation_cache_dir='.*below' cannot be written"):
        programs.enable_compilation_cache(EngineConfig(compilation_cache_dir=str(below)))
    programs.enable_compilation_cache(EngineConfig())
    assert "compiled programs are not kept" in caplog.text and not updates
    programs.enable_compilation_cache(EngineConfig(compilation_cache_dir=str(tmp_path / "new")))
    assert ("jax_compilation_cache_dir", str(tmp_path / "new")) in updates


def test_options_that_cannot_be_honoured_are_refused(model_dir: Path) -> None:
    for changes, words in (
        ({"max_model_len": 1000}, "max_model_len=1000 is over the model's 512 positions"),
        ({"kv_memory_bytes": 20_000}, "one sequence of max_model_len=256 needs"),
        ({"page_size": 48}, "no attention backend takes .*page_size 48 must divide 128"),
        ({"chunked_prefill": False}, "needs max_num_batched_tokens of at least max_model_len=256, not 64"),
    ):
        with pytest.raises(ConfigError, match=words):
            Engine(model_dir, replace(BASE, **changes))
