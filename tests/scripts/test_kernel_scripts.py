"""The scripts that check and tune kernels, and the notebook, as far as they run without an accelerator."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import gpu_check
import tune_kernels

from pallas_kernels import devices, tuning, workloads

ROOT = Path(__file__).resolve().parents[2]


def test_gpu_check_writes_what_held_and_what_was_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "cpu.json"
    arguments = ["gpu_check.py", "--out", str(out), "--only", "attention,matmul", "--cases", "mqa", "--no-timing"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert gpu_check.main() == 0
    result = json.loads(out.read_text())
    assert result["device"] == "cpu"
    assert result["versions"]["jax"]
    status = {(record["backend"], record["case"]): record["status"] for record in result["checks"]}
    assert status["xla", "prefill-mqa"] == "ok"
    assert status["mosaic_tpu", "prefill-mqa"] == "refused"
    assert all(record["reason"] for record in result["checks"] if record["status"] == "refused")


def test_gpu_check_goes_on_after_a_broken_kernel_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise AssertionError("out differs")

    out = tmp_path / "cpu.json"
    monkeypatch.setattr(gpu_check.attention_cases, "check", broken)
    arguments = ["gpu_check.py", "--out", str(out), "--only", "attention", "--cases", "prefill-mqa", "--no-timing"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert gpu_check.main() == 1
    result = json.loads(out.read_text())
    assert result["counts"]["failed"] == len(result["checks"]) > 1
    assert "out differs" in result["checks"][0]["error"]


def test_timing_compares_what_runs_and_says_what_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ValueError("not here")

    monkeypatch.setattr(
        gpu_check, "timed_programs", lambda device: [("sums", {"a": lambda: lambda: 1.0, "b": refuse}, {"calls": 2})]
    )
    (record,) = gpu_check.timings(devices.named("cpu"), lambda text: None)
    assert list(record["seconds"]) == ["a"]
    assert record["seconds"]["a"]["median_s"] > 0
    assert record["errors"] == {"b": "ValueError: not here"}


def landscape(candidates: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """Seconds of a kernel that is fastest at rows 64 and columns 256, and does not compile above 512 columns."""
    return {
        name: 1 + abs(blocks["rows"] - 64) / 64 + abs(blocks["columns"] - 256) / 256
        for name, blocks in candidates.items()
        if blocks["columns"] <= 512
    }


@pytest.mark.parametrize(
    "default", [{"rows": 16, "columns": 512}, {"rows": 64, "columns": 256}, {"rows": 8, "columns": 32}]
)
def test_the_search_finds_the_fastest_blocks(default: dict[str, int]) -> None:
    assert tune_kernels.search(default, landscape) == ({"rows": 64, "columns": 256}, 1.0)


def test_a_gain_within_the_noise_changes_nothing() -> None:
    times = iter(range(1000))
    measure = lambda candidates: {name: 1 - 0.001 * next(times) % 0.01 for name in candidates}
    assert tune_kernels.search({"rows": 16}, measure)[0] == {"rows": 16}


def test_entries_measured_before_are_kept() -> None:
    old = {"k": [{"key": {"rows": 1}, "blocks": {"a": 1}}, {"key": {"rows": 2}, "blocks": {"a": 1}}]}
    assert tune_kernels.merged(old, "k", {"key": {"rows": 2}, "blocks": {"a": 8}}) == {
        "k": [{"key": {"rows": 1}, "blocks": {"a": 1}}, {"key": {"rows": 2}, "blocks": {"a": 8}}]
    }


def test_a_default_that_does_not_run_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"the default \{'rows': 16\} does not run"):
        tune_kernels.search({"rows": 16}, lambda candidates: {})


def test_a_candidate_with_another_result_is_passed_over(capsys: pytest.CaptureFixture) -> None:
    """However fast: a block size that leaves out work must not win."""

    def make() -> workloads.Call:
        blocks = tuning.block_sizes("matmul.triton", devices.named("h100"), {"rows": 4}, **key)
        return workloads.Call(lambda x: x * (blocks["rows"] >= 4), (jnp.ones(3),))

    key = {"format": "int8", "rows": 16, "in_size": 8, "out_size": 8}
    measure = tune_kernels.measure_on_device(make, "matmul.triton", rounds=1)
    assert list(measure({"best": {"rows": 4}})) == ["best"]
    assert list(measure({"best": {"rows": 4}, "2": {"rows": 2}, "8": {"rows": 8}})) == ["best", "8"]
    assert "its result differs by 1" in capsys.readouterr().err


def test_every_tuned_shape_asks_for_its_block_sizes() -> None:
    device = devices.named("v6e")
    asked = [
        question.kernel
        for op, work in list(tune_kernels.works(device))[::9]
        for question in tune_kernels.questions(work, "mosaic_tpu", device, f"{op}.mosaic_tpu")
    ]
    assert set(asked) == {"attention.mosaic_tpu", "matmul.mosaic_tpu", "grouped_matmul.mosaic_tpu"}


@pytest.mark.parametrize("script", ["gpu_check.py", "tune_kernels.py"])
def test_help_needs_no_accelerator(script: str) -> None:
    process = subprocess.run([sys.executable, ROOT / "scripts" / script, "--help"], capture_output=True, text=True)
    assert process.returncode == 0
    assert "pallas_kernels/tuning" in process.stdout or "--out" in process.stdout


def test_tuning_without_an_accelerator_says_so(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tune_kernels.py"])
    with pytest.raises(SystemExit):
        tune_kernels.main()
    assert "no accelerator here" in capsys.readouterr().err


def test_the_notebook_runs() -> None:
    process = subprocess.run([sys.executable, ROOT / "notebooks" / "kernels.py"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "GB/s" in process.stdout
