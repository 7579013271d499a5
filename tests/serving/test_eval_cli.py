"""`jaxinfer eval` and `jaxinfer check`: what they print, that it repeats, and what they refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from ascii_model import ascii_model
from safetensors.numpy import load_file, save_file

from serving import cli

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "goldens" / "llama"
SMALL = (
    *("--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--min-prefill-bucket", "64"),
    *("--max-model-len", "128", "--page-size", "8"),
)
TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse. " * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(ascii_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text").write_text(TEXT)
    return str(tmp_path / "text")


def run(capfd, *arguments: str, code: int = 0) -> str:
    assert cli.main(list(arguments)) == code
    return capfd.readouterr().out


def refused(capfd, *arguments: str) -> str:
    assert cli.main(list(arguments)) == 2
    out, err = capfd.readouterr()
    assert out == ""
    return err


def test_perplexity_repeats_to_the_last_byte(capfd, model: str, text: str, tmp_path: Path) -> None:
    command = ("eval", "ppl", model, "--text", text, "--dtype", "float32", "--window", "100", *SMALL)
    outputs = [run(capfd, *command, "--json", "--output", str(tmp_path / name)) for name in ("first", "second")]
    assert outputs[0] == outputs[1] == (tmp_path / "first").read_text() == (tmp_path / "second").read_text()
    report = json.loads(outputs[0])
    assert report["num_scored_tokens"] == report["text"]["num_tokens"] == len(TEXT)
    assert report["window"] == 100 and report["stride"] == 50 and report["seed"] == 0
    chunked = json.loads(run(capfd, *command, "--json", "--max-prefill-seqs", "1", "--max-num-batched-tokens", "100"))
    assert chunked.pop("engine") != report.pop("engine")
    assert chunked == report
    other = json.loads(run(capfd, *command, "--json", "--seed", "1"))
    assert other["perplexity"]["value"] == report["perplexity"]["value"]
    assert other["perplexity"]["ci95"] != report["perplexity"]["ci95"]


def test_perplexity_prints_a_table(capfd, model: str, text: str) -> None:
    out = run(capfd, "eval", "ppl", model, "--text", text, "--limit", "90", "--bos", "window", *SMALL)
    assert (
        "perplexity" in out and "bits per byte" in out and "90 in 1 windows" in out and "one window tells none" in out
    )


def test_compare_finds_what_quantized_pages_change(capfd, model: str, text: str, tmp_path: Path) -> None:
    command = ("eval", "compare", model, "--text", text, "--dtype", "float32", "--window", "100", *SMALL, "--json")
    report = json.loads(run(capfd, *command, "--b", "kv_dtype=int4"))
    assert report["kl"]["ci95"][0] > 0 and report["kl"]["max"] >= report["kl"]["p99"] > report["kl"]["median"] > 0
    assert 0.5 < report["top1_agreement"]["value"] < 1
    assert report["a"]["engine"] == [each for each in report["b"]["engine"] if each != "--kv-dtype=int4"]
    same = json.loads(run(capfd, *command, "--against", model, "--b", "max_num_batched_tokens=100"))
    assert same["kl"]["max"] == 0.0 and same["top1_agreement"]["value"] == 1.0
    assert same["nats_per_token_difference"]["value"] == 0.0
    assert "KL(A || B)" in run(capfd, *command[:-1], "--limit", "60")


def test_choices_write_the_harness_files(capfd, model: str, tmp_path: Path) -> None:
    task = tmp_path / "sums.jsonl"
    records = [{"query": f"{i} plus {i} is", "choices": [str(2 * i), str(2 * i + 1)], "gold": i % 2} for i in range(5)]
    task.write_text("\n".join(map(json.dumps, records)))
    command = ("eval", "choices", model, "--task", str(task), "--dtype", "float32", *SMALL)
    logged = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    reports = [json.loads(run(capfd, *command, "--json", "--log-samples", str(path))) for path in logged]
    assert reports[0] == reports[1] and logged[0].read_bytes() == logged[1].read_bytes()
    assert set(reports[0]["results"]) == {"sums"} and reports[0]["n-samples"]["sums"]["effective"] == 5
    samples = [json.loads(line) for line in logged[0].read_text().splitlines()]
    assert np.mean([sample["acc"] for sample in samples]) == reports[0]["results"]["sums"]["acc,none"]
    again = json.loads(run(capfd, "eval", "choices", model, "--task", str(logged[0]), "--json", *command[5:]))
    assert again["results"]["a"]["acc,none"] == reports[0]["results"]["sums"]["acc,none"]
    out = run(capfd, *command, "--limit", "2", "--task-name", "short")
    assert "short: acc_norm" in out and "acc_bytes" in out


def test_arguments_that_cannot_be_are_refused(capfd, model: str, text: str, tmp_path: Path) -> None:
    assert "window=200 must be from 2 to 127" in refused(
        capfd, "eval", "ppl", model, "--text", text, "--window", "200", *SMALL
    )
    assert "cannot be read" in refused(capfd, "eval", "ppl", model, "--text", text + "x")
    for path in (str(tmp_path), str(tmp_path / "absent" / "file")):  # said before a model is loaded
        for flags in (("ppl", model, "--text", text, "--output"), ("choices", model, "--task", text, "--log-samples")):
            assert "cannot be written" in refused(capfd, "eval", *flags, path)
    assert "seed=-1" in refused(capfd, "eval", "ppl", model, "--text", text, "--seed", "-1")
    assert "no tokenizer" in refused(capfd, "eval", "ppl", str(GOLDEN), "--text", text, *SMALL)
    other = tmp_path / "other"
    other.mkdir()
    assert "not a model directory" in refused(capfd, "eval", "compare", model, "--text", text, "--against", text)
    shipped = ("eval", "compare", "--text", text, "--against", model, *SMALL)
    assert "vocabularies of 4096 and 192" in refused(capfd, *shipped)
    for option, words in (
        ("kv_dtype", "is not NAME=VALUE"),
        ("seed=3", "is not NAME=VALUE with one of the names attention_backend"),
        ("loop_steps=x", "'x' is not of type int"),
        ("prefix_caching=1", "'1' must be true or false"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(["eval", "compare", model, "--text", text, "--b", option])
        assert caught.value.code == 2 and words in capfd.readouterr().err
    assert "kv_dtype='int3'" in refused(capfd, "eval", "compare", model, "--text", text, "--b", "kv_dtype=int3", *SMALL)


def test_generate_prints_the_prompts_own_log_probabilities(capfd, model: str) -> None:
    command = ("generate", model, "--token-ids", "5,6,7", "--prompt-logprobs", "2", "--n", "2", "--max-tokens", "2")
    first, second = json.loads(run(capfd, *command, "--json", *SMALL))["outputs"]
    assert first["prompt_logprobs"][0] is None and second["prompt_logprobs"] is None
    for token, item in zip((6, 7), first["prompt_logprobs"][1:], strict=True):
        assert item["token_id"] == token and item["logprob"] < 0 and item["rank"] >= 1 and len(item["top"]) == 2
        assert set(item["top"][0]) == {"token_id", "logprob"}


# ---- check


@pytest.fixture
def logits(tmp_path: Path) -> Path:
    """What transformers computed for the golden model."""
    golden = load_file(GOLDEN / "golden.safetensors")
    save_file({"tokens": golden["prompt"], "logits": golden["logits"]}, tmp_path / "logits.safetensors")
    return tmp_path / "logits.safetensors"


def test_check_passes_for_the_model_that_wrote_the_logits(capfd, logits: Path) -> None:
    command = ("check", str(GOLDEN), "--against", str(logits), *SMALL)
    report = json.loads(run(capfd, *command, "--json"))
    assert report["passed"] and report["dtype"] == "float32" and report["tolerance"] == 2e-4
    [prompt] = report["prompts"]
    assert 0 < prompt["relative_error"] < 2e-5 and prompt["top1_agreement"] == 1 and prompt["num_tokens"] == 80
    assert "PASS" in run(capfd, *command, "--dtype", "bfloat16")


def test_check_fails_for_another_model(capfd, logits: Path, tmp_path: Path) -> None:
    tensors = load_file(logits)
    tensors["logits"][70, 5] += 0.01 * np.abs(tensors["logits"]).max()
    save_file(tensors, logits)
    command = ("check", str(GOLDEN), "--against", str(logits), *SMALL)
    report = json.loads(run(capfd, *command, "--json", code=1))
    assert not report["passed"] and report["prompts"][0]["relative_error"] == pytest.approx(0.01, rel=0.05)
    assert (report["prompts"][0]["worst"]["position"], report["prompts"][0]["worst"]["token_id"]) == (70, 5)
    assert "FAIL" in run(capfd, *command, code=1)
    assert "PASS" in run(capfd, *command, "--tolerance", "0.02")


def test_check_refuses_what_it_cannot_compare(capfd, logits: Path, tmp_path: Path) -> None:
    command = ("check", str(GOLDEN), *SMALL, "--against")
    assert "is not a file" in refused(capfd, *command, str(tmp_path))
    assert "tolerance=-1.0 must be" in refused(capfd, *command, str(logits), "--tolerance", "-1")
    assert "must hold `tokens` and `logits`" in refused(capfd, *command, str(GOLDEN / "golden.safetensors"))


def dump_script() -> str:
    [script] = re.findall(r"^```python\n(import sys\n.*?)^```$", (ROOT / "docs/evaluation.md").read_text(), re.M | re.S)
    return script


def test_the_documented_dump_script_is_ten_lines_that_compile() -> None:
    script = dump_script()
    assert len([line for line in script.splitlines() if line]) == 10
    compile(script, "dump.py", "exec")
    assert '"tokens"' in script and '"logits"' in script


def test_docs_name_only_flags_that_exist(capfd) -> None:
    page = (ROOT / "docs/evaluation.md").read_text()
    known = set()
    for command in (("eval", "ppl"), ("eval", "compare"), ("eval", "choices"), ("check",), ("serve",)):
        with pytest.raises(SystemExit):
            cli.main([*command, "--help"])
        known |= set(re.findall(r"--[a-z][\w-]*", capfd.readouterr().out))
    named = set(re.findall(r"--[a-z][\w-]*", page)) - {"--log_samples"}  # lm-evaluation-harness's
    assert named <= known and {"--window", "--stride", "--tolerance", "--kv-dtype"} <= named
