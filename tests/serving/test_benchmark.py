"""Trace parsing, the driver's bookkeeping on a scripted engine, and the JSON of every benchmark on a tiny model."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxinfer.config import ConfigError, EngineConfig
from jaxinfer.engine import Engine
from jaxinfer.perf import hardware
from jaxinfer.perf.metrics import PERCENTILES, RequestTimes
from jaxinfer.request import FinishReason, QueueFullError, Request, RequestError, SamplingParams, TokenEvent
from serving import bench_drive, bench_options, bench_startup
from serving.bench_compare import compare_runs
from serving.bench_drive import Run, all_running_step_s, drive
from serving.bench_options import parse_sampling
from serving.bench_startup import phases, summarize_starts
from serving.bench_trace import TraceRequest, draw_trace, parse_length, save_trace
from serving.cli import main

TINY = Path(__file__).parents[1] / "goldens" / "llama"  # 3 layers, 192 tokens, 256 positions
GREEDY = SamplingParams(temperature=0.0)


# ---- traces


@pytest.mark.parametrize(
    ("text", "kind", "low", "high", "longest"),
    [
        ("128", "constant", 128, 128, 128),
        ("16:512", "uniform", 16, 512, 512),
        ("lognormal:64:0.8", "lognormal", 64, 0.8, None),
    ],
)
def test_length_forms(text: str, kind: str, low: float, high: float, longest: int | None) -> None:
    spec = parse_length(text)
    assert (spec.kind, spec.low, spec.high, spec.longest()) == (kind, low, high, longest)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "must be a number"),
        ("many", "must be a number"),
        ("1:2:3", "must be a number"),
        ("0", "at least 1"),
        ("-4", "at least 1"),
        ("9:8", "lower bound first"),
        ("1.5", "must be a number"),
        ("lognormal:64", "must be a number"),
        ("lognormal:x:1", "must be a number"),
        ("lognormal:0:1", "median must be at least 1"),
        ("lognormal:64:-1", "sigma from 0 to 5"),
        ("lognormal:64:nan", "sigma from 0 to 5"),
    ],
)
def test_bad_lengths_say_what_is_wrong(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        parse_length(text)
    assert repr(text) in str(caught.value)


def trace_of(count: int = 400, **options: Any) -> list[TraceRequest]:
    given = {"input_len": "16:512", "output_len": "lognormal:64:0.8", "max_model_len": 2048, "seed": 0, **options}
    lengths = {name: parse_length(given.pop(name)) for name in ("input_len", "output_len")}
    return draw_trace(num_prompts=count, vocab_size=100, **lengths, **given)


def test_drawn_lengths_follow_their_distribution() -> None:
    trace = trace_of(4000)
    inputs = np.array([len(r.prompt_token_ids) for r in trace])
    outputs = np.array([r.output_len for r in trace])
    assert inputs.min() == 16
    assert inputs.max() == 512
    assert np.median(outputs) == pytest.approx(64, rel=0.05)
    assert np.log(outputs).std() == pytest.approx(0.8, rel=0.05)
    assert all(0 <= token < 100 for token in trace[0].prompt_token_ids)


def test_one_seed_one_trace() -> None:
    assert trace_of(seed=3) == trace_of(seed=3)
    assert trace_of(seed=3) != trace_of(seed=4)


def test_options_do_not_change_what_others_draw() -> None:
    plain, poisson = trace_of(20), trace_of(20, request_rate=2.0)
    assert [r.prompt_token_ids for r in plain] == [r.prompt_token_ids for r in poisson]
    assert {r.arrival_s for r in plain} == {0.0}


def test_arrivals_keep_their_rate() -> None:
    arrivals = np.array([r.arrival_s for r in trace_of(4000, request_rate=8.0)])
    assert np.all(np.diff(arrivals) >= 0)
    assert np.diff(arrivals).mean() == pytest.approx(1 / 8, rel=0.1)
    bursty = np.diff([r.arrival_s for r in trace_of(4000, request_rate=8.0, burstiness=0.1)])
    assert bursty.mean() == pytest.approx(1 / 8, rel=0.2)
    assert bursty.std() > 2 * np.diff(arrivals).std()


def test_trace_fits_the_model() -> None:
    trace = trace_of(500, max_model_len=520)
    assert all(len(r.prompt_token_ids) + r.output_len <= 520 for r in trace)
    assert min(r.output_len for r in trace) >= 1


def test_lengths_over_the_model_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'16:512' goes over the limit of 256"):
        trace_of(max_model_len=320, output_len="64")
    with pytest.raises(ConfigError, match=r"'600' goes over the limit of 319"):
        trace_of(max_model_len=320, input_len="8", output_len="600")


def test_saved_trace(tmp_path: Path) -> None:
    trace = trace_of(3)
    save_trace(trace, tmp_path / "trace.json")
    requests = json.loads((tmp_path / "trace.json").read_text())["requests"]
    assert [tuple(r["prompt_token_ids"]) for r in requests] == [r.prompt_token_ids for r in trace]
    assert [r["output_len"] for r in requests] == [r.output_len for r in trace]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("top_q=1", "'top_q' is not one of greedy, temperature"),
        ("top_p=a", "'a' is not a number"),
        ("", "is not one of"),
    ],
)
def test_bad_sampling_specs(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_sampling(text)


def test_sampling_specs() -> None:
    assert parse_sampling("greedy")[1] == SamplingParams(temperature=0.0)
    assert parse_sampling("temperature=1,top_p=0.9")[1] == SamplingParams(temperature=1.0, top_p=0.9)
    with pytest.raises(RequestError, match="top_p"):
        parse_sampling("top_p=2")


# ---- the driver


class ScriptedEngine:
    """Gives every unfinished request `per_step` tokens a step, a second each on a fake clock."""

    def __init__(self, *, per_step: int = 2, max_queue: int = 1000, fail: str | None = None):
        self.now_s = 100.0
        self.left: dict[str, int] = {}
        self.requests: list[Request] = []
        self.most_at_once = 0
        self.per_step, self.max_queue, self.fail = per_step, max_queue, fail

    def add(self, request: Request) -> None:
        if len(self.left) >= self.max_queue:
            raise QueueFullError(self.max_queue, 1.0)
        assert request.sampling.max_tokens is not None
        self.left[request.request_id] = request.sampling.max_tokens
        self.requests.append(request)
        self.most_at_once = max(self.most_at_once, len(self.left))

    def step(self) -> list[TokenEvent]:
        self.now_s += 1.0
        events = []
        for name, left in list(self.left.items()):
            count = min(self.per_step, left)
            self.left[name] -= count
            reason = None if self.left[name] else FinishReason.LENGTH
            if name == self.fail:
                count, reason = 0, FinishReason.ERROR
            if reason is not None:
                del self.left[name]
            error = "NaN logits" if reason is FinishReason.ERROR else None
            events.append(TokenEvent(name, 0, (7,) * count, "", finish_reason=reason, error=error))
        return events

    def idle_s(self) -> float:
        return 0.0


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes engines whose clock the driver reads, and whose sleep moves it."""

    def make(**options: Any) -> Any:
        engine = ScriptedEngine(**options)

        def sleep(seconds: float) -> None:
            engine.now_s += seconds

        monkeypatch.setattr(bench_drive, "time", SimpleNamespace(perf_counter=lambda: engine.now_s, sleep=sleep))
        return engine

    return make


def requests_of(*outputs: int, arrivals: tuple[float, ...] = ()) -> list[TraceRequest]:
    times = arrivals or (0.0,) * len(outputs)
    return [TraceRequest(at, (1, 2, 3), n) for at, n in zip(times, outputs, strict=True)]


def test_drive_notes_every_piece(scripted: Any) -> None:
    engine = scripted()
    run = drive(engine, requests_of(5, 2), GREEDY, label="x")
    assert run.records[0].pieces == [(101.0, 2), (102.0, 2), (103.0, 1)]
    assert run.records[0].ttft_s == 1.0
    assert run.records[1].e2el_s == 1.0
    assert run.duration_s == 3.0
    assert [r.request_id for r in engine.requests] == ["x-0", "x-1"]
    assert all(r.sampling.ignore_eos and r.cache_salt == "x" for r in engine.requests)


def test_drive_holds_requests_back(scripted: Any) -> None:
    engine = scripted()
    run = drive(engine, requests_of(4, 2, 2), GREEDY, label="x", max_outstanding=2)
    assert engine.most_at_once == 2
    assert run.records[2].arrival_s == 101.0  # its clock starts when the second request had ended
    assert run.records[2].ttft_s == 1.0


def test_drive_without_limit_counts_queueing(scripted: Any) -> None:
    run = drive(scripted(max_queue=1), requests_of(2, 2), GREEDY, label="x")
    assert [record.ttft_s for record in run.records] == [1.0, 2.0]


def test_drive_waits_for_arrivals(scripted: Any) -> None:
    run = drive(scripted(), requests_of(2, 2, arrivals=(0.0, 50.0)), GREEDY, label="x")
    assert run.records[1].arrival_s == 150.0
    assert run.records[1].ttft_s == pytest.approx(1.0)
    assert run.duration_s == pytest.approx(51.0)


def test_drive_reports_failures(scripted: Any) -> None:
    run = drive(scripted(fail="x-0"), requests_of(4, 4), GREEDY, label="x")
    assert run.records[0].error == "NaN logits"
    assert run.records[1].error is None


def test_drive_reports_missing_tokens(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = scripted()
    add = engine.add

    def shorten(request: Request) -> None:
        add(request)
        engine.left[request.request_id] = 1

    monkeypatch.setattr(engine, "add", shorten)
    (record,) = drive(engine, requests_of(4), GREEDY, label="x").records
    assert record.error == "1 tokens came, 4 were asked for"


def test_progress_counts_finished_requests(scripted: Any) -> None:
    seen: deque[int] = deque()
    drive(scripted(), requests_of(2, 4, 2), GREEDY, label="x", progress=seen.append)
    assert list(seen) == [1, 2, 3]


def test_step_time_is_that_of_the_request_that_started_last() -> None:
    early = RequestTimes(0.0, 1, [(1.0, 1), (9.0, 4)])
    late = RequestTimes(0.0, 1, [(2.0, 1), (6.0, 4)])
    assert all_running_step_s([early, late]) == 1.0


def test_step_time_leaves_out_a_first_piece_seen_late() -> None:
    assert all_running_step_s([RequestTimes(0.0, 1, [(3.9, 1), (4.0, 4), (8.0, 4), (12.0, 4)])]) == 1.0
    with pytest.raises(ValueError, match="one token"):
        all_running_step_s([RequestTimes(0.0, 1, [(1.0, 1)])])


# ---- summaries


def run_of(duration_s: float) -> Run:
    """Two requests of 5 tokens: one at the end of prefill, four in decode."""
    pieces = [(1.0, 1), (duration_s, 4)]
    return Run([RequestTimes(0.0, 3, list(pieces)) for _ in range(2)], duration_s)


def test_compare_takes_the_median_of_paired_ratios() -> None:
    runs = {"a": [run_of(2.0), run_of(4.0), run_of(3.0)], "b": [run_of(4.0), run_of(4.0), run_of(4.0)]}
    report = compare_runs(runs)
    assert report["ratio"] == 0.75  # ratios 0.5, 1, 0.75
    assert report["decode_ratio"] == pytest.approx(2 / 3)  # step times 0.25, 0.75, 0.5 against 0.75
    assert report["variants"]["a"]["output_throughput"] == pytest.approx(10 / 3)
    assert report["variants"]["a"]["lowest"] == 2.5
    assert report["failed"] == 0


def test_startup_phases_and_keys() -> None:
    start = phases(100.0, {"import": 101.0, "load": 103.0, "compile": 110.0, "first_token": 110.5})
    assert start["phases_s"] == {"import": 1.0, "load": 2.0, "compile": 7.0, "first_token": 0.5}
    assert (start["ready_s"], start["first_token_s"]) == (10.0, 10.5)
    report = summarize_starts(
        {"cold": [start | {"compiles_after_warmup": 0}], "warm": [start | {"compiles_after_warmup": 2}]}
    )
    assert report["avg_cold_startup_time"] == 10.0
    assert report["avg_warm_compilation_time"] == 7.0
    assert report["cold_startup_percentiles"]["99"] == 10.0
    assert report["avg_warm_first_token_time"] == 10.5
    assert report["compiles_after_warmup"] == 2


# ---- the command, on a real engine

SMALL = ["--dtype", "float32", "--max-num-batched-tokens", "32", "--max-prefill-seqs", "2", "--page-size", "8"]
SMALL_CONFIG = EngineConfig(
    dtype="float32", max_num_seqs=4, max_model_len=64, max_num_batched_tokens=32, max_prefill_seqs=2, page_size=8
)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """One compiled engine for every report that does not depend on its options."""
    engine = Engine(TINY, SMALL_CONFIG)
    engine.warm_up()
    yield engine
    engine.close()


@pytest.fixture
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hardware.READ_BYTES, "cpu", 1 << 22)
    monkeypatch.setitem(hardware.MATMUL_SHAPES, "cpu", ((64, 64, 64),))


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str], quick_ceilings: None) -> Any:
    """Runs `jaxinfer bench ...` in this process and returns the one JSON document it printed."""

    def run(kind: str, *options: str) -> dict[str, Any]:
        assert main(["bench", kind, str(TINY), *SMALL, "--json", *options]) == 0
        out = capsys.readouterr().out
        return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    return run


@pytest.fixture
def shared(engine: Engine, bench: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`bench` on the module's engine: what the options ask for is checked to be within it."""

    def open_shared(directory: Path, config: EngineConfig, **_: Any) -> Engine:
        assert directory == TINY
        assert config.max_num_seqs <= SMALL_CONFIG.max_num_seqs
        assert config.max_model_len is not None and config.max_model_len <= 64
        return engine

    monkeypatch.setattr(bench_options, "Engine", open_shared)
    monkeypatch.setattr(engine, "warm_up", lambda progress: None)
    monkeypatch.setattr(engine, "close", lambda: engine.check())
    return bench


def check_common(report: dict[str, Any]) -> None:
    for key in ("mbu", "mfu_prefill", "host_us_per_loop", "read_bandwidth_gbps", "matmul_tflops"):
        assert isinstance(report[key], float), key
        assert math.isfinite(report[key]) and report[key] > 0, key
    assert report["compiles_after_warmup"] == 0
    assert report["seed"] == EngineConfig().seed
    assert report["versions"]["jax"]
    assert report["device"]["platform"] == "cpu"
    assert report["failed"] == 0


def check_latencies(report: dict[str, Any], *names: str) -> None:
    for name in names:
        for kind in ("mean", "median", "std", *(f"p{q}" for q in PERCENTILES)):
            assert isinstance(report[f"{kind}_{name}_ms"], float), (kind, name)
        assert report[f"p50_{name}_ms"] <= report[f"p90_{name}_ms"] <= report[f"p99_{name}_ms"]


def test_latency_report(shared: Any) -> None:
    report = shared("latency", "--batch-size", "2", "--input-len", "12", "--output-len", "9", "--num-iters", "2")
    check_common(report)
    check_latencies(report, "ttft", "tpot", "itl", "e2el")
    assert report["completed"] == 4
    assert report["total_input_tokens"] == 48
    assert report["total_output_tokens"] == 36
    assert len(report["latencies"]) == 2
    assert report["avg_latency"] == pytest.approx(sum(report["latencies"]) / 2)
    assert report["duration"] == pytest.approx(sum(report["latencies"]))
    assert report["percentiles"]["50"] == pytest.approx(report["avg_latency"])
    assert 0 < report["prefill_s"] < report["avg_latency"]
    weights, row = 71424 * 4, 3 * 256  # of this shape, see tests/jaxinfer/test_perf.py
    assert report["decode_step_bytes"] == weights + 2 * (12 + 4.5) * row
    seconds = report["decode_step_ms"] / 1e3
    assert report["mbu"] == pytest.approx(report["decode_step_bytes"] / seconds / report["read_bandwidth_gbps"] / 1e9)


def test_throughput_report(shared: Any, tmp_path: Path) -> None:
    options = [
        "--num-prompts",
        "12",
        "--max-concurrency",
        "4",
        "--input-len",
        "4:40",
        "--output-len",
        "lognormal:6:0.4",
    ]
    more = ["--goodput", "e2el:60000", "--save-trace", str(tmp_path / "trace.json")]
    report = shared("throughput", *options, *more)
    check_common(report)
    check_latencies(report, "ttft", "tpot", "itl", "e2el")
    requests = json.loads((tmp_path / "trace.json").read_text())["requests"]
    assert report["completed"] == 12
    assert report["batching"] == "continuous"
    assert report["total_input_tokens"] == sum(len(r["prompt_token_ids"]) for r in requests)
    assert report["total_output_tokens"] == sum(r["output_len"] for r in requests)
    assert report["output_throughput"] == pytest.approx(report["total_output_tokens"] / report["duration"])
    assert report["input_throughput"] == pytest.approx(report["total_input_tokens"] / report["duration"])
    assert report["request_goodput"] == report["request_throughput"]
    assert report["ideal_duration"] > 0
    assert report["fraction_of_ideal"] == pytest.approx(report["ideal_duration"] / report["duration"])
    assert report["cached_input_tokens"] < 0.1 * report["total_input_tokens"]  # 192 ids: first tokens may coincide
    assert set(report["calibration"]["decode_step_ms"]) == {"1", "2", "4"}


def test_batch_sizes_interleave(shared: Any) -> None:
    report = shared("latency", "--batch-size", "1,3", "--input-len", "6", "--output-len", "5", "--num-iters", "2")
    check_common(report)
    assert report["batch_size"] == 1
    assert report["completed"] == 2
    assert report["batches"]["3"]["completed"] == 6
    assert report["mbu_ratio"] == pytest.approx(report["batches"]["3"]["mbu"] / report["mbu"])


@pytest.mark.parametrize("batching", ["dynamic", "static"])
def test_other_batching_on_an_engine_of_its_own(bench: Any, batching: str) -> None:
    options = ["--num-prompts", "5", "--input-len", "4", "--output-len", "lognormal:4:0.8", "--max-model-len", "64"]
    report = bench("throughput", *options, "--max-concurrency", "4", "--batching", batching)
    check_common(report)
    assert report["completed"] == 5
    assert report["batching"] == report["config"]["batching"] == batching
    assert report["config"]["max_num_seqs"] == 4


def test_open_loop_and_closed_loop(shared: Any) -> None:
    options = ["--num-prompts", "6", "--input-len", "4", "--output-len", "4"]
    opened = shared("throughput", *options, "--max-concurrency", "4", "--request-rate", "200", "--burstiness", "0.5")
    assert (opened["completed"], opened["request_rate"]) == (6, 200.0)
    closed = shared("throughput", *options, "--max-concurrency", "2", "--queue-ahead", "0", "--repeats", "2")
    assert (closed["completed"], closed["request_rate"]) == (6, "inf")
    assert len(closed["durations"]) == 2


def test_compare_report(shared: Any) -> None:
    report = shared("compare", "--batch-size", "2", "--input-len", "8", "--output-len", "6", "--rounds", "2")
    check_common(report)
    assert list(report["variants"]) == ["greedy", "temperature=1,top_p=0.9"]
    assert report["ratio"] > 0
    assert report["decode_ratio"] > 0


def test_table_without_json(capsys: pytest.CaptureFixture[str], shared: Any) -> None:
    arguments = ["--input-len", "8", "--output-len", "4", "--num-iters", "1"]
    assert main(["bench", "latency", str(TINY), *SMALL, *arguments]) == 0
    out = capsys.readouterr().out
    for text in ("Decode MBU", "Prefill MFU", "TTFT median", "Read bandwidth", "Output throughput"):
        assert text in out


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--input-len", "9:8"], "lower bound first"),
        (["--input-len", "some"], "must be a number, LOW:HIGH"),
        (["--num-prompts", "0"], "must be a whole number of at least 1"),
        (["--request-rate", "-1"], "must be a number above 0"),
        (["--goodput", "speed:1"], "one of ttft, tpot, e2el"),
        (["--batching", "eager"], "continuous"),
    ],
)
def test_bad_options_end_with_a_message(options: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "throughput", str(TINY), *options])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.out == ""


def test_lengths_over_the_model_end_with_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "throughput", str(TINY), "--json", "--input-len", "300", "--output-len", "1"]) == 2
    captured = capsys.readouterr()
    assert "'300' goes over the limit of 255" in captured.err
    assert captured.out == ""


def test_startup_starts_cold_then_warm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Which processes are started: cold ones in directories of their own, warm ones in the last of these."""
    calls: list[tuple[str, bool]] = []

    def start_once(directory: Path, config: dict[str, Any], measure: bool) -> dict[str, Any]:
        assert directory == TINY
        assert EngineConfig(**config).max_num_seqs == 3
        calls.append((Path(config["compilation_cache_dir"]).name, measure))
        start = phases(0.0, {"import": 1.0, "load": 2.0, "compile": 3.0, "first_token": 4.0})
        return start | {"compiles_after_warmup": 0} | ({"report": {"mbu": 0.5}} if measure else {})

    monkeypatch.setattr(bench_startup, "start_once", start_once)
    options = ["--json", "--max-num-seqs", "3", "--num-iters-cold", "2", "--num-iters-warm", "2"]
    assert main(["bench", "startup", str(TINY), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert calls == [("0", False), ("1", False), ("1", False), ("1", True)]
    assert report["mbu"] == 0.5
    assert report["cold_startup_times"] == [3.0, 3.0]
    assert report["starts"]["warm"]["first_token_s"] == 4.0


def test_startup_names_why_a_start_failed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"exit code 1(.|\n)*does not exist"):
        bench_startup.start_once(tmp_path / "nothing", {}, measure=False)


@pytest.mark.slow
def test_startup_report(bench: Any) -> None:
    """Two real starts: the second one finds the first one's compiled programs."""
    report = bench("startup", "--max-num-seqs", "1", "--max-model-len", "64", "--min-prefill-bucket", "32")
    check_common(report)
    for kind in ("cold", "warm"):
        assert set(report["starts"][kind]["phases_s"]) == {"import", "load", "compile", "first_token"}
        assert 0 < report[f"avg_{kind}_startup_time"] < report[f"avg_{kind}_first_token_time"]
        assert len(report[f"{kind}_startup_times"]) == 1
    assert report["avg_warm_compilation_time"] < report["avg_cold_compilation_time"]
