"""Peak memory of loading a few hundred megabytes, and the script that writes random models of any size."""

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models import load_config
from jaxinfer.models.checkpoint import load_parameters, num_threads
from jaxinfer.models.transformer import abstract_parameters
from pallas_kernels.tensors import QuantizedTensor, dequantize

F32 = jnp.dtype(jnp.float32)
MEASURE = """
import sys
import jax, jax.numpy as jnp
from jaxinfer.models import load_config
from jaxinfer.models.checkpoint import load_parameters, num_threads
from jaxinfer.models.transformer import abstract_parameters
from pallas_kernels.tensors import QuantizedTensor, dequantize

def status_bytes(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) * 1024

directory, dtype = sys.argv[1], jnp.dtype(sys.argv[2])
config = load_config(directory)
abstract_parameters(config, dtype)
jnp.zeros(8).block_until_ready()
before = status_bytes("VmRSS")
parameters = load_parameters(directory, config, dtype)
sizes = [sum(array.nbytes for array in jax.tree.leaves(parameter)) for parameter in parameters]
print(status_bytes("VmHWM") - before, sum(sizes), max(sizes))
"""


@pytest.fixture(scope="module")
def make_random_model(repository: Path) -> Callable[[str], int]:
    """The script's command line, run in this process: starting another one would import jax again."""
    main = runpy.run_path(str(repository / "scripts" / "make_random_model.py"))["main"]
    return lambda arguments: main(arguments.split())


@pytest.fixture(scope="module")
def random_model(make_random_model: Callable[[str], int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """~300 MB in float32, sharded, written by the script."""
    out = tmp_path_factory.mktemp("random") / "model"
    shape = "--hidden-size 1024 --layers 4 --heads 16 --kv-heads 4 --intermediate-size 2816 --vocab-size 16000"
    options = "--sliding-window 64 --dtype float32 --shard-bytes 100000000"
    assert make_random_model(f"--arch mistral {shape} {options} --out {out}") == 0
    yield out
    shutil.rmtree(out)  # pytest keeps the directories of its last three runs


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_is_the_model_and_one_tensor(repository: Path, random_model: Path, dtype: str) -> None:
    peak_bytes, model_bytes, largest_bytes = measure(repository, random_model, dtype)
    assert model_bytes > 150e6
    assert 0.9 * model_bytes < peak_bytes <= 1.3 * model_bytes + largest_bytes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_of_a_quantized_model_is_one_weight_per_thread_more(
    repository: Path, make_random_model: Callable[[str], int], tmp_path: Path
) -> None:
    (tmp_path / "gptq.json").write_text('{"quant_method": "gptq", "bits": 4, "group_size": 128}')
    shape = "--hidden-size 2048 --layers 4 --heads 16 --kv-heads 16 --intermediate-size 5632 --vocab-size 1000"
    options = f"--quantization {tmp_path / 'gptq.json'} --dtype float16"
    assert make_random_model(f"--arch llama {shape} {options} --out {tmp_path / 'model'}") == 0
    peak_bytes, model_bytes, largest_bytes = measure(repository, tmp_path / "model", "bfloat16")
    shutil.rmtree(tmp_path / "model")
    assert 100e6 < model_bytes < 130e6  # four bits, not sixteen
    assert 0.9 * model_bytes < peak_bytes <= 1.3 * model_bytes + num_threads() * largest_bytes


def measure(repository: Path, model: Path, dtype: str) -> tuple[int, int, int]:
    """Bytes that loading adds to a process at most, of the parameters, and of the largest of them."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, model, dtype],
        check=True,
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=240,
    )
    peak_bytes, model_bytes, largest_bytes = map(int, run.stdout.split())
    print(
        f"{dtype}: peak {peak_bytes / model_bytes:.3f} of the model's bytes, largest {largest_bytes / model_bytes:.3f}"
    )
    return peak_bytes, model_bytes, largest_bytes


def test_random_model_is_what_was_asked_for(random_model: Path) -> None:
    config = load_config(random_model)
    assert (config.architecture, config.layers[0].window, len(config.layers)) == ("MistralForCausalLM", 64, 4)
    assert len(list(random_model.glob("*.safetensors"))) == 4
    parameters = dict(zip(abstract_parameters(config, F32), load_parameters(random_model, config, F32), strict=True))
    np.testing.assert_allclose(np.asarray(parameters["embed.weight"]).std(), 0.02, rtol=0.01)
    assert (np.asarray(parameters["norm.weight"]) == 1).all()


QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "int4/g32/zp": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "int4/g32": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "fp8/g32": {"quant_method": "fp8", "weight_block_size": [32, 32]},
    "w8a8-int8": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {
            "all": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "strategy": "channel"},
                "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
            }
        },
    },
}


@pytest.mark.parametrize("format_name", QUANTIZATIONS)
def test_random_models_may_be_quantized(
    make_random_model: Callable[[str], int], tmp_path: Path, format_name: str
) -> None:
    (tmp_path / "quantization.json").write_text(json.dumps(QUANTIZATIONS[format_name]))
    shape = "--hidden-size 64 --layers 1 --heads 2 --kv-heads 1 --intermediate-size 96 --vocab-size 160"
    options = f"--quantization {tmp_path / 'quantization.json'} --shard-bytes 20000"
    assert make_random_model(f"--arch llama {shape} {options} --out {tmp_path / 'model'}") == 0
    config = load_config(tmp_path / "model")
    parameters = load_parameters(tmp_path / "model", config, F32)
    quantized = [parameter for parameter in parameters if isinstance(parameter, QuantizedTensor)]
    assert [weight.format for weight in quantized] == [format_name] * 7
    assert all(0.001 < np.asarray(dequantize(weight)).std() < 1 for weight in quantized)


def test_random_model_refuses_what_cannot_be(
    make_random_model: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    shape = "--hidden-size 8 --layers 1 --heads 4 --kv-heads 3 --intermediate-size 8 --vocab-size 16"
    assert make_random_model(f"--arch llama {shape} --out {out}") == 2
    assert "q_heads=4 must be a multiple of kv_heads=3" in capsys.readouterr().err
    assert list(out.iterdir()) == []
    (out / "mine.txt").write_text("keep")
    assert make_random_model(f"--arch llama {shape} --out {out}") == 2
    assert "is not an empty directory" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_random_model_is_the_same_for_a_seed(make_random_model: Callable[[str], int], tmp_path: Path) -> None:
    shape = "--hidden-size 8 --layers 1 --heads 2 --kv-heads 1 --intermediate-size 8 --vocab-size 16 --tie"
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert make_random_model(f"--arch llama {shape} --seed {seed} --out {tmp_path / name}") == 0
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b and a != c
