"""A request's tokens, log-probabilities and text do not depend on its company, its schedule or what failed meanwhile.

Every request is judged by what it gives alone, on an engine with one slot's worth of company and no cache. What differs
between engines is buckets, chunks, loops, pages and memory; between runs arrivals, failures, aborts and neighbours.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from jaxinfer import kernel_check, sampling
from jaxinfer.config import ConfigError, EngineConfig, ModelConfig
from jaxinfer.engine import Engine, _Flight
from jaxinfer.models import load_config
from jaxinfer.models.checkpoint import load_parameters
from jaxinfer.models.transformer import merger, run_decoder
from jaxinfer.outcome import Outcome
from jaxinfer.request import FinishReason, Request, SamplingParams
from pallas_kernels import devices
from pallas_kernels.matmul import llvm_cpu
from pallas_kernels.native import jit

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens"
MAX_LEN, PAGE = 160, 8
LONE = EngineConfig(  # the reference: one request at a time, no cached prefix, one bucket for a whole prompt
    dtype="float32",
    max_num_seqs=2,
    max_model_len=MAX_LEN,
    max_num_batched_tokens=256,
    min_prefill_bucket=256,
    max_prefill_seqs=1,
    page_size=32,
    prefix_caching=False,
    loop_steps=8,
    kv_memory_bytes=64_000_000,
)
CROWD: dict[str, Any] = {  # neighbours, two prefill buckets, short loops
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "min_prefill_bucket": 16,
    "max_prefill_seqs": 3,
    "page_size": PAGE,
    "prefix_caching": True,
    "loop_steps": 3,
}
PRESSED: dict[str, Any] = {  # hardly memory for two sequences: most are preempted again and again
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "min_prefill_bucket": 16,
    "max_prefill_seqs": 2,
    "page_size": PAGE,
    "prefix_caching": True,
    "loop_steps": 16,
    "stream_interval_s": 0.001,
}


# ---- models and engines


@dataclass
class Family:
    """One model in one dtype: what each request gives alone, and engines that differ in everything but that."""

    directory: Path
    options: dict[str, Any]
    engines: dict[str, Engine] = field(default_factory=dict)
    alone: dict[str, tuple] = field(default_factory=dict)

    def engine(self, name: str, changes: dict[str, Any]) -> Engine:
        if name not in self.engines:
            self.engines[name] = Engine(self.directory, replace(LONE, **self.options | changes))
        return self.engines[name]

    def pressed(self) -> Engine:
        return self.engine("pressed", PRESSED | {"kv_memory_bytes": self.least_memory()})

    def crowd(self) -> Engine:
        return self.engine("crowd", CROWD)

    def least_memory(self) -> int:
        """Bytes for one sequence of the longest kind and a few pages more."""
        try:
            Engine(self.directory, replace(LONE, **self.options | PRESSED | {"kv_memory_bytes": 1}))
        except ConfigError as error:
            return int(1.2 * int(str(error).split(" needs ")[1].split()[0]))
        raise AssertionError("one byte was enough")

    def expected(self, request: Request) -> tuple:
        """What each completion of the request says, alone."""
        key = repr((request.prompt_token_ids, request.sampling))
        if key not in self.alone:
            said = drive(self.engine("lone", {}), [(0, request)])
            self.alone[key] = tuple(said[request.request_id, i] for i in range(request.sampling.n))
        return self.alone[key]

    @property
    def vocab_size(self) -> int:
        return self.engine("lone", {}).model.vocab_size


@pytest.fixture(scope="module")
def windows_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, GQA, a layer with a window shorter than a page of the reference before one without."""
    out = tmp_path_factory.mktemp("windows")
    sizes = {"hidden-size": 32, "layers": 2, "heads": 4, "kv-heads": 2, "intermediate-size": 80, "vocab-size": 96}
    flags = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    script = [sys.executable, str(ROOT / "scripts/make_random_model.py"), "--arch", "llama", "--head-dim", "16"]
    subprocess.run([*script, *flags, "--dtype", "float32", "--seed", "5", "--out", str(out)], check=True)
    config = json.loads((out / "config.json").read_text())
    config |= {"architectures": ["MinistralForCausalLM"], "model_type": "ministral", "sliding_window": 20}
    config |= {"layer_types": ["sliding_attention", "full_attention"]}
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="module")
def windows(windows_dir: Path) -> Family:
    return Family(windows_dir, {})


@pytest.fixture(scope="module")
def windows_bf16(windows_dir: Path) -> Family:
    return Family(windows_dir, {"dtype": "bfloat16", "invariant": True})


@pytest.fixture(scope="module")
def experts() -> Family:
    return Family(GOLDENS / "qwen3_moe", {})


# ---- running requests


Saying = tuple[list[int], list[tuple], str, FinishReason]


def drive(
    engine: Engine,
    arrivals: list[tuple[int, Request]],
    *,
    aborts: dict[str, int] | None = None,
    failing: Callable[[int], str | None] = lambda call: None,
) -> dict[tuple[str, int], Saying]:
    """Add each request after so many steps, run until all is said -> (request, completion) -> what it said.

    `aborts`: request id -> steps after which it is aborted. `failing(call)`: whether a device call fails, and where.
    """
    said: dict[tuple[str, int], Saying] = {}
    waiting = sorted(arrivals, key=lambda arrival: arrival[0])
    steps = 0
    with failures(engine, failing):
        while waiting or engine.has_work():
            while waiting and waiting[0][0] <= steps:
                engine.add(waiting.pop(0)[1])
            for name, when in (aborts or {}).items():
                if when == steps:
                    engine.abort(name)
            for event in engine.step():
                tokens, logprobs, text, _ = said.get((event.request_id, event.index), ([], [], "", None))
                tokens += event.token_ids
                logprobs += [(value.logprob, value.top) for value in event.logprobs or ()]
                said[event.request_id, event.index] = (tokens, logprobs, text + event.text, event.finish_reason)
            steps += 1
    engine.check()
    return said


@contextmanager
def failures(engine: Engine, failing: Callable[[int], str | None]) -> Iterator[None]:
    """Make device calls fail as a broken device does: the donated state is gone, at once or when the result is read."""
    dispatch, calls = engine._dispatch, itertools.count(1)

    def fragile(plans: Any) -> _Flight:
        where = failing(next(calls))
        if where is None:
            return dispatch(plans)
        jax.tree.map(lambda array: array.delete(), engine._runner.state)
        if where == "dispatch":
            raise RuntimeError("the device said no")
        shape = engine.programs.shape_for(plans[0].num_slots, 0)
        return _Flight(plans, shape, Outcome(Unreadable(), None, None), 0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_dispatch", fragile)
        yield


class Unreadable:
    is_fully_addressable = True

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise RuntimeError("the device said no")


def assert_as_alone(family: Family, engine: Engine, requests: list[Request], said: dict, aborted: set[str]) -> None:
    """Bit for bit; what was aborted said the beginning of it."""
    for request in requests:
        for index, (tokens, logprobs, text, reason) in enumerate(family.expected(request)):
            got_tokens, got_logprobs, got_text, got_reason = said[request.request_id, index]
            if got_reason is FinishReason.ABORT:
                assert request.request_id in aborted
                tokens, logprobs = tokens[: len(got_tokens)], logprobs[: len(got_logprobs)]
                assert text.startswith(got_text.rstrip("\N{REPLACEMENT CHARACTER}"))
            else:
                assert (got_reason, got_text) == (reason, text), request.request_id
            assert got_tokens == tokens, request.request_id
            assert got_logprobs == logprobs, request.request_id


# ---- any schedule


@dataclass(frozen=True)
class Schedule:
    """Requests, when each arrives, which are aborted and which device calls fail."""

    requests: tuple[Request, ...]
    arrivals: tuple[int, ...]
    aborts: dict[str, int]
    failing: dict[int, str]

    def run(self, engine: Engine) -> dict[tuple[str, int], Saying]:
        plan = list(zip(self.arrivals, self.requests, strict=True))
        return drive(engine, plan, aborts=self.aborts, failing=self.failing.get)


@st.composite
def schedules(draw: st.DrawFn, vocab_size: int, most: int) -> Schedule:
    rng = np.random.default_rng(draw(st.integers(0, 5)))  # few, so that requests recur and are computed alone once
    shared = rng.integers(1, vocab_size, 90).tolist()
    requests = []
    for i in range(draw(st.integers(1, most))):
        prefix = draw(st.sampled_from((0, 0, 1, PAGE, 13, 2 * PAGE, 40, 90)))
        tail = draw(st.sampled_from((1, 2, 7, 20, 45)))
        prompt = tuple(shared[:prefix] + np.random.default_rng(tail).integers(1, vocab_size, tail).tolist())
        requests.append(Request(f"r{i}", prompt, draw(st.sampled_from(SETTINGS))))
    arrivals = draw(st.lists(st.integers(0, 25), min_size=len(requests), max_size=len(requests)))
    aborts = draw(st.dictionaries(st.sampled_from([r.request_id for r in requests]), st.integers(1, 30), max_size=1))
    calls = draw(st.lists(st.tuples(st.integers(2, 9), st.sampled_from(["dispatch", "result"])), max_size=2))
    failing, at = {}, 0
    for gap, where in calls:  # apart, for three in a row end their requests
        at += 2 + gap
        failing[at] = where
    return Schedule(tuple(requests), tuple(arrivals), aborts, failing)


GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=True, top_logprobs=3)
SETTINGS = (
    GREEDY,
    replace(GREEDY, max_tokens=50),
    replace(GREEDY, temperature=0.9, top_p=0.9, seed=1),
    replace(GREEDY, temperature=1.2, top_k=20, min_p=0.02, seed=2, max_tokens=30, n=2),
    replace(GREEDY, temperature=0.7, repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1, seed=3),
    replace(GREEDY, max_tokens=25, logit_bias={5: 2.0, 11: -3.0}, stop_token_ids=(5, 17), min_tokens=4),
    replace(GREEDY, temperature=0.0, logprobs=False, top_logprobs=0, max_tokens=5),
)


def any_schedule(family: Family, examples: int, most: int = 7, pressed: bool = True) -> None:
    """The property: on every engine of a family, a request says what it says alone."""

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(schedule=schedules(family.vocab_size, most))
    def check(schedule: Schedule) -> None:
        note(f"arrivals {schedule.arrivals}, aborts {schedule.aborts}, failing {schedule.failing}")
        for engine in (family.crowd(), *([family.pressed()] if pressed else [])):
            said = schedule.run(engine)
            assert_as_alone(family, engine, list(schedule.requests), said, set(schedule.aborts))

    check()


def test_any_schedule_in_float32(windows: Family) -> None:
    any_schedule(windows, 6)


def test_any_schedule_in_bfloat16(windows_bf16: Family) -> None:
    any_schedule(windows_bf16, 4, pressed=False)


@pytest.mark.slow  # its programs take a minute to compile
def test_any_schedule_of_experts_in_float32(experts: Family) -> None:
    any_schedule(experts, 3, pressed=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bfloat16", "invariant": True},
        {"dtype": "bfloat16", "invariant": True, "matmul_backend": "xla", "attention_backend": "xla"},
        {"dtype": "bfloat16", "invariant": True, "kv_dtype": "int8"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "float32",
)
@pytest.mark.parametrize("name", ["windows", "qwen3_moe", "shipped"])
def test_many_schedules(name: str, options: dict[str, Any], windows_dir: Path, shipped_model: Path) -> None:
    directory = {"windows": windows_dir, "shipped": shipped_model}.get(name, GOLDENS / name)
    family = Family(directory, options)
    any_schedule(family, 10, most=10)
    wide = {**CROWD, "max_num_seqs": 6, "min_prefill_bucket": 1, "max_num_batched_tokens": 8}  # six rows: an odd bucket
    many = [(i, Request(str(i), (3 + i, 9, 4), SETTINGS[i % len(SETTINGS)])) for i in range(9)]
    assert_as_alone(
        family,
        family.engine("wide", wide),
        [request for _, request in many],
        drive(family.engines["wide"], many),
        set(),
    )


# ---- what a schedule is made of, each for certain


def prompt_of(length: int, seed: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(1, vocab_size, length).tolist())


def test_a_prompt_may_be_cut_anywhere(windows: Family) -> None:
    """A neighbour's prompt of any length takes its part of a step's budget; the rest of the step is the first chunk."""
    engine, starts, dispatch = windows.crowd(), set(), windows.crowd()._dispatch

    def recording(plans: Any) -> _Flight:
        starts.update(chunk.start for chunk in plans[0].chunks if chunk.sequence.request.request_id == "target")
        return dispatch(plans)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_dispatch", recording)
        for length in range(1, 32):
            pair = {
                name: Request(
                    name,
                    prompt_of(size, seed, windows.vocab_size),
                    replace(GREEDY, max_tokens=2),
                    cache_salt=f"{name} {length}",  # nothing of it is cached: its first chunk starts at 0
                )
                for name, size, seed in (("other", length, 100 + length), ("target", 40, length))
            }
            other, target = pair["other"], pair["target"]
            said = drive(engine, [(0, other), (0, target)])
            assert_as_alone(windows, engine, [other, target], said, set())
    assert starts >= set(range(1, 32)), f"first chunks ended at {sorted(starts)}"


def test_a_prefix_may_be_cached_up_to_anywhere(windows: Family) -> None:
    engine = windows.crowd()
    base, hits = prompt_of(30, 7, windows.vocab_size), set()
    drive(engine, [(0, Request("base", base, replace(GREEDY, max_tokens=1)))])
    for shared in range(1, 30):
        before = engine.stats().cached_prompt_tokens
        other = 1 + base[shared] % (windows.vocab_size - 1)  # from here on the prompts differ
        request = Request("again", (*base[:shared], other, 2, 3), replace(GREEDY, max_tokens=2))
        assert_as_alone(windows, engine, [request], drive(engine, [(0, request)]), set())
        hits.add(engine.stats().cached_prompt_tokens - before)
    assert {hit % PAGE for hit in hits} == set(range(PAGE)), f"hits of {sorted(hits)} tokens"


def test_the_preempted_say_the_same(windows: Family) -> None:
    engine = windows.pressed()
    before = engine.stats().num_preemptions
    settings = (GREEDY, replace(GREEDY, temperature=0.9, seed=4, repetition_penalty=1.2))
    requests = [
        Request(str(i), prompt_of(7 + 3 * i, i, windows.vocab_size), replace(settings[i % 2], max_tokens=90))
        for i in range(6)
    ]
    said = drive(engine, [(0, request) for request in requests])
    assert engine.stats().num_preemptions >= before + 3
    assert_as_alone(windows, engine, requests, said, set())


@pytest.mark.parametrize("where", ["dispatch", "result"])
def test_a_failed_call_is_replayed_to_the_same_bits(where: str, windows: Family) -> None:
    engine = windows.crowd()
    before = engine.stats().num_failed_calls
    requests = [Request(str(i), prompt_of(20 + i, i, windows.vocab_size), GREEDY) for i in range(5)]
    failing = dict.fromkeys((2, 5, 9), where)
    said = drive(engine, [(i, request) for i, request in enumerate(requests)], failing=failing.get)
    assert engine.stats().num_failed_calls == before + 3
    assert_as_alone(windows, engine, requests, said, set())


def test_a_dependence_on_the_batch_is_seen(windows: Family) -> None:
    """Weights that change in their last bits where two sequences run: such an engine fails every test above."""
    engine, weights = windows.crowd(), windows.crowd()._runner.parameters
    nudged = tuple(w * jnp.float32(1 + 2**-20) if w.ndim == 1 else w for w in weights)
    dispatch = engine._dispatch

    def depending(plans: Any) -> _Flight:
        engine._runner.parameters = nudged if len(plans[0].running) > 1 else weights
        return dispatch(plans)

    requests = [Request(str(i), prompt_of(10, i, windows.vocab_size), GREEDY) for i in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_dispatch", depending)
        said = drive(engine, [(0, request) for request in requests])
    engine._runner.parameters = weights
    with pytest.raises(AssertionError):
        assert_as_alone(windows, engine, requests, said, set())
    engine._scheduler.reset_device()  # what it kept of these prompts is wrong


# ---- parts, where engines would have to be too large


@pytest.mark.parametrize("vocab_size", [96, 1000, 4096])
def test_log_probabilities_do_not_depend_on_the_number_of_slots(vocab_size: int) -> None:
    logits = jnp.asarray(4 * np.random.default_rng(0).standard_normal((256, vocab_size)), jnp.float32)
    normalize = jax.jit(sampling.log_normalizers)
    whole = np.asarray(normalize(logits))
    for slots in (2, 3, 6, 7, 16, 64):
        parts = [np.asarray(normalize(logits[i : i + slots])) for i in range(0, 256 - slots + 1, slots)][:8]
        got = np.concatenate(parts)
        np.testing.assert_array_equal(got, whole[: got.size], err_msg=f"{slots} slots")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])  # softmax before and after the choice; biases and sinks
def test_experts_do_not_depend_on_the_number_of_tokens(name: str, dtype: str) -> None:
    """All of a model but attention, on the first rows of a batch; in float32, and in bfloat16 where it is asked for."""
    config = load_config(GOLDENS / name)
    loaded = load_parameters(GOLDENS / name, config, jnp.dtype(dtype))
    logits = forward(config, tuple(jax.tree.leaves(loaded)), dtype, invariant=dtype == "bfloat16")
    whole = logits(130)
    for rows in (2, 6, 36):
        np.testing.assert_array_equal(logits(rows), whole[:rows], err_msg=f"{rows} rows")


def forward(config: ModelConfig, parameters: tuple, dtype: str, invariant: bool) -> Callable[[int], np.ndarray]:
    """rows -> logits f32[rows, vocab] of so many tokens that do not see each other."""
    merge = merger(config, jnp.dtype(dtype), "auto", invariant)
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, config.vocab_size, 300), jnp.int32)
    position = jnp.arange(300, dtype=jnp.int32)

    @partial(jax.jit, static_argnums=0)
    def run(rows: int, parameters: tuple) -> jax.Array:
        model = merge(parameters)
        hidden = run_decoder(model, tokens[:rows], position[:rows], lambda index, q, *_: q, position[:rows] + 1)
        return model.unembed(hidden)

    return lambda rows: np.asarray(run(rows, parameters))


@pytest.mark.skipif(jit.unavailable() is not None, reason="no native kernels: one backend serves every number of rows")
def test_without_the_option_bfloat16_may_differ(windows_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs where the native kernel leaves large batches to XLA, a row's bits depend on the batch, if not asked.

    Such a CPU is played here: on one with bfloat16 dots and without matrix units, the kernel serves every batch.
    """
    limited = replace(llvm_cpu._isa("dense"), most_rows=32)
    monkeypatch.setattr(llvm_cpu, "_isa", lambda format: limited)
    jax.clear_caches()  # products are traced once for all models
    config = load_config(windows_dir)
    parameters = tuple(jax.tree.leaves(load_parameters(windows_dir, config, jnp.dtype(jnp.bfloat16))))
    for invariant in (False, True):
        logits = forward(config, parameters, "bfloat16", invariant)
        same = np.array_equal(logits(16), logits(200)[:16])
        assert same is invariant
    jax.clear_caches()


# ---- where it is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"matmul_backend": "reference"}, "matmul_backend=reference: for .*may depend on the batch on cpu"),
        ({"attention_backend": "reference"}, "attention_backend=reference: .*may depend on the batch on cpu"),
    ],
)
def test_backends_that_promise_nothing_are_refused(changes: dict[str, str], words: str, windows_dir: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        Engine(windows_dir, replace(LONE, dtype="bfloat16", invariant=True, **changes))


def test_platforms_where_nothing_was_shown_are_refused(windows_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_check.devices, "current", lambda: devices.named("h100"))
    with pytest.raises(ConfigError, match="invariant=True is supported on cpu, not on cuda, where no test has shown"):
        kernel_check.check_kernels(load_config(windows_dir), replace(LONE, invariant=True), ())


def test_the_engine_says_what_it_promises(windows_bf16: Family, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        engine = Engine(windows_bf16.directory, replace(LONE, **windows_bf16.options))
    assert "benchmarks/invariance.py measures the cost" in caplog.text
    assert engine.info()["invariant"] is True
