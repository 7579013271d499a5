"""The commands, in this process: what they print and what they return."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from unittest.mock import Mock

import pytest

from jaxinfer.config import ConfigError
from serving import cli

MODEL = Path(__file__).parents[1] / "goldens" / "llama"
SMALL = ["--dtype", "float32", "--max-num-seqs", "4", "--max-num-batched-tokens", "32", "--max-model-len", "64"]


def _json(capfd, *arguments: str) -> dict:
    """The one document that a command prints."""
    assert cli.main([*arguments, *SMALL, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_generate_prints_one_document(capfd):
    document = _json(
        capfd,
        *("generate", str(MODEL), "--token-ids", "1,2,3", "--token-ids", "9"),
        *("--max-tokens", "5", "--temperature", "0", "--ignore-eos"),
    )
    assert [len(output["token_ids"]) for output in document["outputs"]] == [5, 5]
    for i, output in enumerate(document["outputs"]):
        assert (output["prompt_index"], output["index"], output["finish_reason"]) == (i, 0, "length")
        assert output["text"] is None and output["logprobs"] is None
    assert document["usage"] == {"prompt_tokens": 4, "completion_tokens": 10, "total_tokens": 14}


def test_generate_with_n_and_logprobs(capfd):
    document = _json(
        capfd,
        *("generate", str(MODEL), "--token-ids", "1,2", "--token-ids", "3", "--n", "2", "--seed", "5"),
        *("--max-tokens", "4", "--logprobs", "--top-logprobs", "2", "--ignore-eos"),
    )
    outputs = document["outputs"]
    assert [(o["prompt_index"], o["index"]) for o in outputs] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for output in outputs:
        assert [item["token_id"] for item in output["logprobs"]] == output["token_ids"]
        assert all(len(item["top"]) == 2 and item["logprob"] <= 0 for item in output["logprobs"])
    assert document["usage"]["completion_tokens"] == 16


def test_generate_takes_text_and_ids_for_the_shipped_model(capfd):
    document = _json(
        capfd,
        *("generate", "--prompt", "def add(a, b):\n    return", "--token-ids", "5,6", "--prompt", "import "),
        *("--max-tokens", "6", "--temperature", "0"),
    )
    assert [o["prompt_index"] for o in document["outputs"]] == [0, 1, 2]
    assert all(isinstance(o["text"], str) for o in document["outputs"])
    assert document["outputs"][0]["text"]


def test_generate_prints_text_for_people(capfd):
    arguments = ["generate", str(MODEL), "--token-ids", "1,2,3", "--max-tokens", "3", "--ignore-eos", *SMALL]
    assert cli.main(arguments) == 0
    out = capfd.readouterr().out
    assert "[1, 2, 3]" in out and "length" in out


def test_info_prints_one_document(capfd):
    info = _json(capfd, "info", str(MODEL))
    assert (info["model"], info["dtype"], info["max_model_len"]) == ("llama", "float32", 64)
    sizes = [choice["bytes_per_token"] for choice in info["kv_choices"]]  # 4 heads of 16 for 2, three layers, float32
    assert sizes == [3 * 2 * 4 * 16 * 4, 3 * 2 * 2 * 16 * 4] and sizes[-1] == info["kv_bytes_per_token"]
    assert cli.main(["info", str(MODEL), *SMALL]) == 0
    printed = capfd.readouterr().out
    assert "max_model_len" in printed and "grouped-query attention" in printed


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["serve", str(MODEL), "--host", "0.0.0.0"], "not a loopback address"),
        (["serve", "/no/such/model"], "'/no/such/model' does not exist"),
        (["serve", __file__], "test_cli.py' is not a directory"),
        (["serve", ""], "MODEL is empty"),
        (["serve", str(MODEL), "--served-model-name", ""], "served_model_name='' is empty"),
        (["serve", str(MODEL), "--max-connection-age-s", "inf"], "max_connection_age_s=inf must be at most 2000000"),
        (["serve", str(MODEL), "--max-concurrent-streams", "99999999999"], "=99999999999 must be at most 65536"),
        (["serve", str(MODEL), "--dtype", "int3"], "choose from"),
        (["serve", str(MODEL), "--page-size", "0"], "page_size=0"),
        (["generate", str(MODEL)], "at least one --prompt, --token-ids, --chat or --messages is needed"),
        (["generate", str(MODEL), "--prompt", "\udcff"], r"argument --prompt: '\udcff' is not valid Unicode"),
        (["generate", str(MODEL), "--token-ids", "1", "--stop", "\udcff"], r"--stop: '\udcff' is not valid Unicode"),
        (["generate", str(MODEL), "--token-ids", "1,x"], "'1,x' is not a list of token ids"),
        (["generate", str(MODEL), "--token-ids", "1", "--top-p", "0"], "top_p"),
        (["generate", str(MODEL), "--token-ids", "1", "--logit-bias", "3"], "ID=BIAS"),
        (["generate", str(MODEL), "--token-ids", "1", "--max-tokens", "few"], "'few' is neither"),
        (["generate", str(MODEL), "--prompt", "text"], "no tokenizer"),
        (["generate", str(MODEL), "--token-ids", "999999"], "outside the vocabulary"),
        (["demo", "--clients", "0"], "clients=0"),
        (["info", "--kernels", "--device", "v9"], "device 'v9' is not one of v5e"),
        (["info", "--device", "v6e"], "--device v6e needs --kernels"),
        (["info", "--kernels", "--device", ""], "device '' is not one of v5e"),
        (["info", "--kernels", "--kv-dtype", "int8"], "leave out MODEL and the engine's options"),
        (["info", "--kernels", str(MODEL)], "leave out MODEL and the engine's options"),
        (["generate", "--prompt", "x", "--matmul-backend", "mosaic_tpu"], "matmul_backend=mosaic_tpu: "),
        (["generate", "--prompt", "x", "--attention-backend", "triton"], "it is for cuda and rocm, the device is cpu"),
        (["frobnicate"], "invalid choice"),
    ],
)
def test_bad_arguments_are_told_in_a_line(arguments, part, capfd):
    try:
        code = cli.main(arguments)
    except SystemExit as exit:  # argparse found it
        code = exit.code
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    assert part in err and "Traceback" not in err


def test_a_directory_that_is_no_model_fails(capfd, tmp_path):
    assert cli.main(["generate", str(tmp_path), "--token-ids", "1"]) in (1, 2)
    out, err = capfd.readouterr()
    assert out == "" and "config.json" in err and "Traceback" not in err


@pytest.mark.parametrize(("error", "code"), [(ConfigError("told"), 2), (OSError("told"), 1)])
def test_debug_shows_the_traceback_and_changes_nothing_else(error, code, capfd, monkeypatch):
    monkeypatch.setattr(cli, "_info", Mock(side_effect=error))
    for arguments in (["info"], ["info", "--debug"]):
        assert cli.main(arguments) == code
        out, err = capfd.readouterr()
        assert out == "" and err.endswith("jaxinfer info: error: told\n")
        assert ("Traceback" in err) == ("--debug" in arguments)


def test_a_taken_port_is_told(capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["serve", str(MODEL), "--port", str(taken.getsockname()[1])]) == 2
    assert "port in use" in capfd.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "v6e", "h100", "a100"])
def test_info_kernels_says_what_serves_each_case(capfd, device):
    assert cli.main(["info", "--kernels", "--device", device, "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["device"] == device
    answers = document["kernels"]
    assert {answer["op"] for answer in answers} == {"attention", "matmul", "grouped_matmul"}
    assert all(answer["backend"] or answer["refusals"] for answer in answers)
    assert all(answer["backend"] != "reference" for answer in answers)
    if device == "v6e":
        assert any(answer["backend"] == "mosaic_tpu" for answer in answers)


def test_info_kernels_prints_a_table(capfd):
    assert cli.main(["info", "--kernels"]) == 0
    printed = capfd.readouterr().out
    assert "kernels on cpu" in printed and "llvm_cpu" in printed
