"""The bars of docs/scale.md on the layers of a 70B model, a few of them, compiled for chips that are not here."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jaxinfer.compile_report import Request, report, request_of
from jaxinfer.config import EngineConfig

LAYERS = 3
pytestmark = [pytest.mark.accelerators, pytest.mark.timeout(1200)]


def request(weights: str | None = None, chunk: int = 0, device: str = "v6e:4x4", **options: Any) -> Request:
    options = {"max_num_seqs": 64, "max_model_len": 8192, "mesh": "tensor=16", **options}
    config = EngineConfig(**options, max_num_batched_tokens=chunk or 1, min_prefill_bucket=chunk or 1)
    whole = request_of("llama-3.1-70b", device, config, weights=weights, prefill_chunk=chunk)
    return dataclasses.replace(whole, model=dataclasses.replace(whole.model, layers=whole.model.layers[:LAYERS]))


@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_decode_step_sums_twice_a_layer_and_copies_nothing(weights: str | None) -> None:
    found = report(request(weights))
    [program] = found["programs"].values()
    inside = [line for line in program["collectives"] if line["place"] in ("step", "inner loop")]
    sums = sum(line["count"] for line in inside if line["kind"] == "all-reduce")
    assert sums <= 2 * LAYERS + 1
    assert {line["kind"] for line in inside} <= {"all-reduce", "all-gather"}
    assert program["copies"] == []
    assert program["temporary_bytes"] < 0.02 * found["memory"]["limit_bytes"]
    assert found["memory"]["fits"]


def test_a_tpu7x_copies_no_weight_into_tiles_of_its_own() -> None:
    found = report(request(device="tpu7x:2x2x1", mesh="tensor=8", chunk=512))
    assert {program["program"]: program["copies"] for program in found["programs"].values()} == {
        "decode_loop[64 slots]": [],
        "mixed_step[64 slots + 512 tokens]": [],
    }
    assert found["programs"]["decode"]["temporary_bytes"] < 0.02 * found["memory"]["limit_bytes"]


@pytest.mark.slow
def test_a_prefill_step_sends_beside_products() -> None:
    [program] = report(request(chunk=8192, max_num_seqs=8), only="prefill")["programs"].values()
    assert program["overlap"] >= 0.8
    assert program["copies"] == []
