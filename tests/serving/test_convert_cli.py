"""`jaxinfer convert`: what it prints and refuses, and that commands and the engine take what it wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from ascii_model import ascii_model
from quantized_files import SCHEMES, write_model

from jaxinfer.llm import LLM
from jaxinfer.request import SamplingParams
from serving import cli

SMALL = {
    "max_num_seqs": 2,
    "max_num_batched_tokens": 64,
    "min_prefill_bucket": 64,
    "max_model_len": 64,
    "page_size": 8,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = ascii_model(tmp_path_factory.mktemp("model"))
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return directory


def run(capfd: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0) -> tuple[str, str]:
    assert cli.main([str(argument) for argument in arguments]) == code
    out, err = capfd.readouterr()
    return out, err


def test_what_is_written_is_generated_from(capfd: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    """The same tokens as from the Hugging Face directory, by prompt and by chat."""
    out = tmp_path / "out"
    report = json.loads(run(capfd, "convert", model, out, "--dtype", "float32", "--json")[0])
    num_bytes = (model / "model.safetensors").stat().st_size
    assert report.pop("seconds") > 0 and 1.9 * num_bytes < report.pop("num_bytes") <= 2 * num_bytes  # from bfloat16
    assert report == {"out": str(out), "dtype": "float32", "num_parameters": 29}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    command = ("--prompt=Call me", "--chat=Call me", "--max-tokens=8", "--temperature=0", "--json", *flags)
    direct, ours = (json.loads(run(capfd, "generate", directory, *command)[0]) for directory in (model, out))
    assert ours == direct and len(ours["outputs"]) == 2
    assert ours["usage"]["completion_tokens"] == 16


def test_quantized_models_are_served(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    write_model(source, SCHEMES["awq"].config, SCHEMES["awq"].write)
    assert "21 parameters, " in run(capfd, "convert", source, out)[0]
    texts = []
    for directory in (source, out):
        llm = LLM(directory, warm_up=False, **SMALL | {"max_model_len": 32})
        (result,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8, temperature=0.0, logprobs=True))
        texts.append([(output.token_ids, output.logprobs) for output in result.outputs])
        llm.engine.close()
    assert texts[0] == texts[1]


def test_what_is_refused(capfd: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").write_bytes(b"")
    for source, out, code, message in (
        (model, tmp_path / "there", 2, f"convert: error: {tmp_path}/there exists; name a directory that does not"),
        (tmp_path / "no", tmp_path / "out", 2, f"convert: error: model directory '{tmp_path}/no' does not exist"),
        (broken, tmp_path / "out", 1, "model.safetensors is truncated"),
    ):
        printed, error = run(capfd, "convert", source, out, code=code)
        assert printed == "" and message in error
    for arguments in ([], [str(model)], [str(model), str(tmp_path / "out"), "--dtype", "int8"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["convert", *arguments])
        assert ended.value.code == 2
    capfd.readouterr()
    assert {path.name for path in tmp_path.iterdir()} == {"there", "broken"}
