"""Block sizes: measured, default, forced; and that no table holds an entry that nothing asks for."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from pallas_kernels import devices, tuning, workloads
from sharding import topology

TABLES = Path(tuning.__file__).parent / "tuning"
TPU = devices.named("v6e")
KERNEL = "attention.mosaic_tpu"
KEY = {
    "phase": "decode",
    "dtype": "bfloat16",
    "kv_dtype": "int8",
    "q_heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "page_size": 128,
    "window": None,
}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the v6e's table holds during a test."""
    kernels: dict[str, Any] = {}
    monkeypatch.setattr(tuning, "_table", lambda device: kernels if device == TPU.name else {})
    yield kernels


def test_a_measured_entry_is_found_and_the_rest_stays_default(table: dict, caplog: pytest.LogCaptureFixture) -> None:
    table[KERNEL] = [{"key": KEY, "blocks": {"a": 7}}]
    with caplog.at_level(logging.INFO, logger="pallas_kernels.tuning"):
        assert tuning.block_sizes(KERNEL, TPU, {"a": 1, "b": 2}, **KEY) == {"a": 7, "b": 2}
        assert tuning.block_sizes(KERNEL, TPU, {"a": 1, "b": 2}, **KEY | {"window": 64}) == {"a": 1, "b": 2}
        assert tuning.block_sizes(KERNEL, devices.named("v5e"), {"a": 1}, **KEY) == {"a": 1}
    messages = [record.getMessage() for record in caplog.records]
    assert ["measured" in message for message in messages] == [True, False, False]
    assert all("default block sizes" in message for message in messages[1:])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting property name"),
        ("{}", "kernels"),
        (json.dumps({"kernels": {KERNEL: [{"blocks": {}}]}}), "key"),
        (json.dumps({"kernels": {"attention.none": [{"key": KEY, "blocks": {}}]}}), "attention.none"),
        (json.dumps({"kernels": {KERNEL: [{"key": {"phase": "decode"}, "blocks": {}}]}}), "has phase, .*, not phase"),
        (json.dumps({"kernels": {KERNEL: [{"key": KEY, "blocks": {"a": 0}}]}}), "integers above 0, not {'a': 0}"),
    ],
)
def test_a_broken_table_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"v6e.json is not a table of block sizes: .*{words}"):
        tuning.read_table(text, "v6e.json")


def test_a_wrong_key_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"is tuned by phase, .*; got phase"):
        tuning.block_sizes(KERNEL, TPU, {}, phase="decode")


def test_forced_sizes_win_and_questions_are_collected(table: dict) -> None:
    table[KERNEL] = [{"key": KEY, "blocks": {"a": 7}}]
    with tuning.asked() as questions, tuning.forced(KERNEL, {"a": 9}):
        assert tuning.block_sizes(KERNEL, TPU, {"a": 1}, **KEY) == {"a": 9}
    assert questions == [tuning.Question(KERNEL, KEY, {"a": 1})]
    assert tuning.block_sizes(KERNEL, TPU, {"a": 1}, **KEY) == {"a": 7}
    assert len(questions) == 1


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (16, 16), (17, 32)])
def test_row_buckets(rows: int, bucket: int) -> None:
    assert tuning.row_bucket(rows) == bucket


def unmatched(device_name: str, kernels: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Entries that no call of their shape asks for, or that set block sizes which the kernel does not have."""
    device = devices.named(device_name)
    wrong = []
    for kernel, entries in kernels.items():
        for entry in entries:
            try:
                call = workloads.of_key(kernel, entry["key"]).call(kernel.partition(".")[2], device, filled=False)
                with tuning.asked() as questions, topology.targeting(device):
                    jax.eval_shape(call.function, *call.args)
            except (TypeError, ValueError) as refusal:
                wrong.append(f"{kernel} {entry['key']}: {refusal}")
                continue
            asked = [question for question in questions if question.kernel == kernel and question.key == entry["key"]]
            if not asked or not set(entry["blocks"]) <= set(asked[0].default):
                wrong.append(f"{kernel} {entry['key']}: asked for {[q.key for q in questions]}")
    return wrong


def test_every_entry_of_every_table_can_match() -> None:
    tables = {file.stem: json.loads(file.read_text())["kernels"] for file in TABLES.glob("*.json")}
    wrong = [line for device, kernels in tables.items() for line in unmatched(device, kernels)]
    assert not wrong, "\n".join(wrong)


def test_a_table_of_what_kernels_ask_for_matches_and_others_are_found() -> None:
    call = workloads.of_key(KERNEL, KEY).call("mosaic_tpu", TPU, filled=False)
    with tuning.asked() as questions, topology.targeting(TPU):
        jax.eval_shape(call.function, *call.args)
    (question,) = [question for question in questions if question.kernel == KERNEL]
    assert question.key == KEY
    good = {"key": KEY, "blocks": question.default}
    assert unmatched("v6e", {KERNEL: [good]}) == []
    for bad in (
        {"key": KEY | {"phase": "decoding"}, "blocks": {}},
        {"key": KEY | {"dtype": "bf16"}, "blocks": {}},
        {"key": KEY | {"page_size": 16}, "blocks": {}},
        {"key": KEY | {"head_size": 128}, "blocks": {}},
        {"key": {"phase": "decode"}, "blocks": {}},
        {"key": KEY, "blocks": {"no_such_block": 4}},
    ):
        assert len(unmatched("v6e", {KERNEL: [bad]})) == 1, bad
