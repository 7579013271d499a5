"""Definitions of metrics, counted work, the simulated ideal, and the machine's measured ceilings."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.config import LayerSpec, ModelConfig
from jaxinfer.models import load_config
from jaxinfer.perf import hardware
from jaxinfer.perf.metrics import RequestTimes, parse_goodput, request_goodput, serving_metrics, summarize
from jaxinfer.perf.roofline import (
    decode_step_bytes,
    kv_row_bytes,
    layer_matmul_weights,
    mbu,
    mfu,
    prefill_flops,
    unembed_weights,
)
from jaxinfer.perf.simulate import StepCosts, TraceItem, ideal_duration_s

GOLDEN_LLAMA = Path(__file__).parents[1] / "goldens" / "llama"


# ---- metrics


def one_request() -> RequestTimes:
    """Arrives at 10.0; 1 token at 10.5, 2 at 11.0, 1 at 12.0."""
    return RequestTimes(10.0, 7, [(10.5, 1), (11.0, 2), (12.0, 1)])


def test_request_definitions() -> None:
    request = one_request()
    assert request.num_output_tokens == 4
    assert request.ttft_s == 0.5
    assert request.e2el_s == 2.0
    assert request.tpot_s == (12.0 - 10.5) / 3
    assert request.itl_s == [0.5, 1.0]


def test_one_token_has_no_tpot_and_no_gap() -> None:
    request = RequestTimes(0.0, 3, [(0.25, 1)])
    assert request.tpot_s is None
    assert request.itl_s == []
    assert request.ttft_s == request.e2el_s == 0.25


def test_tokens_that_come_with_the_first_count_after_it() -> None:
    assert RequestTimes(0.0, 3, [(1.0, 3), (2.0, 2)]).tpot_s == 1.0 / 4


def test_summary_of_known_values() -> None:
    summary = summarize("itl", [0.001 * n for n in range(1, 102)])  # 1 to 101 ms
    assert summary["mean_itl_ms"] == pytest.approx(51.0)
    assert summary["median_itl_ms"] == pytest.approx(51.0)
    assert summary["p50_itl_ms"] == pytest.approx(51.0)
    assert summary["p90_itl_ms"] == pytest.approx(91.0)
    assert summary["p95_itl_ms"] == pytest.approx(96.0)
    assert summary["p99_itl_ms"] == pytest.approx(100.0)
    assert summary["std_itl_ms"] == pytest.approx(math.sqrt((101**2 - 1) / 12))


def test_percentiles_interpolate() -> None:
    assert summarize("ttft", [0.0, 0.01])["p90_ttft_ms"] == pytest.approx(9.0)


def test_summary_of_nothing_is_null_not_zero() -> None:
    summary = summarize("tpot", [])
    assert set(summary.values()) == {None}
    assert "p99_tpot_ms" in summary


def test_serving_metrics_count_finished_requests_only() -> None:
    failed = RequestTimes(10.0, 100, [(10.1, 1)], error="NaN logits")
    metrics = serving_metrics([one_request(), failed], duration_s=2.0)
    assert metrics["completed"] == 1
    assert metrics["failed"] == 1
    assert metrics["total_input_tokens"] == 7
    assert metrics["total_output_tokens"] == 4
    assert metrics["request_throughput"] == 0.5
    assert metrics["input_throughput"] == 3.5
    assert metrics["output_throughput"] == 2.0
    assert metrics["total_token_throughput"] == 5.5
    assert metrics["median_ttft_ms"] == 500.0
    assert metrics["median_e2el_ms"] == 2000.0


def test_goodput() -> None:
    limits = parse_goodput("ttft:600,tpot:400 e2el:2000")
    assert limits == {"ttft": 0.6, "tpot": 0.4, "e2el": 2.0}
    requests = [one_request(), RequestTimes(0.0, 1, [(0.1, 1)])]
    assert request_goodput(requests, {"tpot": 0.4}, 4.0) == 0.25  # 0.5 s per token is over; one token has none
    assert request_goodput(requests, {"tpot": 0.5, "ttft": 0.5}, 4.0) == 0.5


@pytest.mark.parametrize("text", ["", "ttft", "ttft:", "speed:3", "ttft:-1", "ttft:0", "ttft:nan"])
def test_goodput_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="goodput"):
        parse_goodput(text)


# ---- counted work


def small_model(*layers: LayerSpec) -> ModelConfig:
    """The golden Llama's shape with other layers."""
    return dataclasses.replace(load_config(GOLDEN_LLAMA), layers=layers)


def test_golden_llama_counted_by_hand() -> None:
    model = load_config(GOLDEN_LLAMA)  # hidden 48, 3 layers, 4/2 heads of 16, ffn 80, vocab 192, tied
    layer = 2 * 48 * 64 + 2 * 48 * 32 + 3 * 48 * 80
    assert layer_matmul_weights(model) == 3 * layer == 62208
    assert unembed_weights(model) == 9216
    assert kv_row_bytes(model, 0, 4) == 256
    assert decode_step_bytes(model, [10, 20], 4) == 4 * (62208 + 9216) + 30 * 3 * 256
    # 10 tokens: 55 causal pairs in each of 3 layers, 4 heads x 16 dims, two products
    assert prefill_flops(model, 10) == 2 * 62208 * 10 + 2 * 9216 + 4 * 3 * 55 * 64


def test_unembedding_counts_once_per_sampled_row() -> None:
    model = load_config(GOLDEN_LLAMA)
    assert prefill_flops(model, 10, num_sampled=3) - prefill_flops(model, 10) == 2 * 2 * 9216


def test_untied_model_reads_the_same_bytes() -> None:
    """The token embedding is a lookup: an untied table adds nothing to a step."""
    model = load_config(GOLDEN_LLAMA)
    untied = dataclasses.replace(model, tie_embeddings=False)
    assert decode_step_bytes(untied, [5], 2) == decode_step_bytes(model, [5], 2)


def test_windows_bound_rows_and_pairs() -> None:
    full, windowed = small_model(LayerSpec()), small_model(LayerSpec(window=4))
    assert decode_step_bytes(full, [100], 4) - decode_step_bytes(windowed, [100], 4) == (100 - 4) * 256
    assert decode_step_bytes(full, [3], 4) == decode_step_bytes(windowed, [3], 4)
    pairs = 1 + 2 + 3 + 4 + 6 * 4
    assert prefill_flops(windowed, 10) == prefill_flops(full, 10) - 4 * (55 - pairs) * 64
    assert prefill_flops(windowed, 3) == prefill_flops(full, 3)


def test_shared_kv_layer_has_no_kv_weights_but_reads_rows() -> None:
    own, shared = small_model(LayerSpec(), LayerSpec()), small_model(LayerSpec(), LayerSpec(kv_from=0))
    assert layer_matmul_weights(own) - layer_matmul_weights(shared) == 2 * 48 * 32
    assert decode_step_bytes(shared, [8], 4) - decode_step_bytes(shared, [7], 4) == 2 * 256


def test_utilizations() -> None:
    assert mbu(5e9, 0.5, 20.0) == 0.5
    assert mfu(1e12, 2.0, 1.0) == 0.5


# ---- the ideal


UNIT = StepCosts({1: 1.0}, prefill_token_s=0.0)  # a step takes a second, prompts nothing


def items(*outputs: int, prompt: int = 1, arrival_s: float = 0.0) -> list[TraceItem]:
    return [TraceItem(arrival_s, prompt, n) for n in outputs]


def test_one_request_is_its_prefill_and_its_steps() -> None:
    costs = StepCosts({1: 2.0}, prefill_token_s=0.5)
    assert ideal_duration_s(items(4, prompt=10), 1, costs) == 10 * 0.5 + 3 * 2.0


def test_prefill_yields_the_first_token() -> None:
    assert ideal_duration_s(items(1, 1, 1, prompt=2), 1, StepCosts({1: 9.0}, 0.25)) == 3 * 2 * 0.25


def test_two_slots_refill_at_once() -> None:
    # slot a: 3 steps, then the request of 2; slot b: 1 step, then the request of 2 steps
    assert ideal_duration_s(items(4, 2, 3, 3), 2, UNIT) == 5
    assert ideal_duration_s(items(4, 2, 3), 2, UNIT) == 3
    assert ideal_duration_s(items(4, 2, 3, 3), 1, UNIT) == 3 + 1 + 2 + 2
    assert ideal_duration_s(items(4, 2, 3, 3), 4, UNIT) == 3


def test_step_time_depends_on_how_many_run() -> None:
    costs = StepCosts({1: 1.0, 3: 2.0}, 0.0)
    assert costs.decode(2) == 1.5
    assert costs.decode(8) == 2.0
    assert ideal_duration_s(items(3, 2), 2, costs) == 1.5 + 1.0  # both, then one alone


def test_arrivals_wait_for_the_clock() -> None:
    trace = [*items(2), *items(2, arrival_s=10.0)]
    assert ideal_duration_s(trace, 2, UNIT) == 11.0
    assert ideal_duration_s([*items(5), *items(5, arrival_s=1.5)], 2, UNIT) == 2 + 4  # seen at the next step, 2.0


def test_simulation_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="num_slots=0"):
        ideal_duration_s(items(1), 0, UNIT)
    with pytest.raises(ValueError, match="output of 0"):
        ideal_duration_s(items(0), 1, UNIT)


@given(outputs=st.lists(st.integers(1, 30), min_size=1, max_size=40), slots=st.integers(1, 8))
def test_ideal_lies_between_its_bounds(outputs: list[int], slots: int) -> None:
    duration = ideal_duration_s(items(*outputs), slots, UNIT)
    steps = [n - 1 for n in outputs]
    assert max(max(steps), sum(steps) / slots) <= duration <= sum(steps) / slots + max(steps)


# ---- the machine


def test_ceilings_of_this_machine() -> None:
    found = hardware.measure("float32", read_bytes=1 << 22, shapes=((64, 64, 64),))
    assert found.read_bandwidth_gbps > 0.01
    assert found.matmul_tflops > 1e-6
    assert found.read_by in ("int32 sum", "int32 max")
    assert found.matmul_by.endswith("64x64x64")


def test_best_seconds_leaves_the_first_call_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: now[0])
    durations = iter([100.0, 3.0, 2.0, 5.0])

    def function() -> np.ndarray:
        now[0] += next(durations)
        return np.zeros(1)

    assert hardware.best_seconds(function, repeats=3) == 2.0


def test_device_description() -> None:
    device = hardware.describe_device()
    assert device["platform"] == "cpu"
    assert device["count"] >= 1
    assert device["processor"]
