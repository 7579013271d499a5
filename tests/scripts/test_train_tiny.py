"""scripts/train_tiny.py on a very small setting: killed, resumed, ended early, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

pytest.importorskip("optax")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import train_tiny
from tiny_corpus import crops, is_held_out
from tiny_model import attention
from tiny_trainer import StepClock, schedule

VOCAB_SIZE = 384
TEXTS = (
    "",
    "def f(self):\n        return 'self'\n",
    "naïve café — 日本語 🎉\u200d",
    "\t\r\n \n\n   x  ",
    "<|endoftext|>",
)
LAYER_SHAPES = {  # of the draft model: hidden 128, 4 query and 2 key/value heads of 32, feed-forward 344
    "input_layernorm": (128,),
    "self_attn.q_proj": (128, 128),
    "self_attn.k_proj": (64, 128),
    "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128),
    "post_attention_layernorm": (128,),
    "mlp.gate_proj": (344, 128),
    "mlp.up_proj": (344, 128),
    "mlp.down_proj": (128, 344),
}


def start(folder: Path) -> subprocess.Popen:
    flags = ["--size", "draft", "--max-files", "24", "--vocab-size", str(VOCAB_SIZE), "--batch-tokens", "256"]
    flags += ["--minutes", "60", "--max-steps", "400", "--log-every", "4", "--save-every-s", "0.5"]
    flags += ["--work-dir", str(folder / "work"), "--out", str(folder / "out")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, train_tiny.__file__, *flags]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )


def wait_for_checkpoint(process: subprocess.Popen, work_dir: Path) -> int:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        steps = [int(path.name) for path in (work_dir / "checkpoints").glob("*") if path.name.isdigit()]
        if steps:
            return max(steps)
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint; the script wrote: {process.communicate(timeout=10)[0]}")


@pytest.mark.timeout(600)  # 30 s on two idle cores
def test_killed_resumed_and_ended_early(tmp_path):
    first = start(tmp_path)
    try:
        saved_step = wait_for_checkpoint(first, tmp_path / "work")
    finally:
        first.kill()
        first.communicate()

    second = start(tmp_path)
    lines = []
    try:
        for line in second.stdout:
            lines.append(line)
            if line.startswith("step ") and int(line.split()[1].rstrip(":")) >= saved_step + 16:
                second.send_signal(signal.SIGTERM)
                break
        lines.append(second.communicate(timeout=120)[0])
    finally:
        second.kill()
    output = "".join(lines)
    assert second.returncode == 0, output
    resumed = next(line for line in lines if line.startswith("continuing from step "))
    assert int(resumed.split()[3].rstrip(",")) >= saved_step
    assert "exported to" in output

    rows = [json.loads(line) for line in (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    check_export(tmp_path / "out")


def check_export(out: Path) -> None:
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
        "README.md",
        "learning_curve.png",
    }
    expected = {"model.embed_tokens.weight": (VOCAB_SIZE, 128), "model.norm.weight": (128,)}
    for layer in range(4):
        expected |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LAYER_SHAPES.items()}
    with safe_open(out / "model.safetensors", "numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {name: tuple(part.get_shape()) for name, part in slices.items()} == expected
        assert {part.get_dtype() for part in slices.values()} == {"BF16"}
        assert np.isfinite(file.get_tensor("model.embed_tokens.weight").astype(np.float32)).all()
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["MinistralForCausalLM"]
    assert config["layer_types"] == ["sliding_attention"] * 3 + ["full_attention"]
    assert "bits per byte" in (out / "README.md").read_text()
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "huge"], "invalid choice: 'huge'"),
        (["--size", "draft"], "needs --out"),
        (["--minutes", "0"], "must be over 0"),
        (["--batch-tokens", "many"], "invalid positive int value: 'many'"),
    ],
)
def test_bad_flags(capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        train_tiny.main(flags)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_work_directory_belongs_to_one_setting(capsys, tmp_path):
    (tmp_path / "run.json").write_text('{"size": "tiny", "vocab_size": 4096, "seed": 3}')
    assert train_tiny.main(["--work-dir", str(tmp_path), "--vocab-size", "512"]) == 2
    assert "--vocab-size 4096, not 512" in capsys.readouterr().err


def test_more_vocabulary_than_the_text_supports(capsys, tmp_path):
    flags = ["--work-dir", str(tmp_path), "--out", str(tmp_path / "out"), "--max-files", "24"]
    assert train_tiny.main([*flags, "--vocab-size", "200000"]) == 2
    assert "--vocab-size 200000: the corpus supports only" in capsys.readouterr().err


@pytest.mark.parametrize(("tokens", "window"), [(20, None), (20, 8), (24, 8), (32, 8), (32, 40)])
def test_attention_sees_its_window(tokens, window):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, tokens, heads, 4)).astype(np.float32) for heads in (4, 2, 2))
    got = attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), window)
    for i in range(tokens):
        first = 0 if window is None else max(0, i - window + 1)
        for head in range(4):
            scores = np.einsum("bh,bsh->bs", q[:, i, head], k[:, first : i + 1, head // 2]) / 2
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            expected = np.einsum("bs,bsh->bh", weights, v[:, first : i + 1, head // 2])
            np.testing.assert_allclose(got[:, i, head], expected, atol=1e-5)


def test_pauses_do_not_count():
    clock = StepClock()
    assert clock.counted(30.0) == 0.0  # compiles
    assert [clock.counted(seconds) for seconds in (1.0, 2.0, 3600.0, 1.0)] == [1.0, 2.0, 7.5, 1.0]


def test_the_learning_rate_falls_to_a_hundredth():
    factors = [schedule(progress) for progress in np.linspace(0.0, 1.0, 101)]
    assert max(factors) == pytest.approx(1.0, abs=1e-3)
    assert factors[-1] == pytest.approx(0.01)
    assert factors[2:] == sorted(factors[2:], reverse=True)


def test_crops_follow_from_seed_and_step():
    stream = np.arange(5000, dtype=np.uint16)
    seven, again, eight = (crops(stream, seed=1, step=step, num_tokens=1024, context=256) for step in (7, 7, 8))
    assert seven.shape == (4, 257)
    assert (np.diff(seven) == 1).all()
    np.testing.assert_array_equal(seven, again)
    assert (seven != eight).any()


def test_held_out_files_are_a_small_share_of_the_library():
    files = [Path(f"package{i % 7}/module{i}.py") for i in range(2000)]
    assert 60 <= sum(map(is_held_out, files)) <= 140
