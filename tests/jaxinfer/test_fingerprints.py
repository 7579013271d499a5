"""What hosts compare before they read weights: the same model in other files is the same, another fine-tune is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinfer import fingerprints
from jaxinfer.config import EngineConfig
from jaxinfer.engine import Engine
from jaxinfer.models.checkpoint import ORBAX_DIR, CheckpointError
from jaxinfer.models.safetensors_files import StoredTensor
from sharding.hosts import HostsError

GOLDEN = Path(__file__).parents[1] / "goldens" / "llama"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, tmp_path)
    return tmp_path


def tensors(model: Path) -> dict[str, np.ndarray]:
    return load_file(model / "model.safetensors")


def test_the_same_tensors_in_other_files_are_the_same_model(model: Path) -> None:
    before, found = fingerprints.of_weights(model), tensors(model)
    (model / "model.safetensors").unlink()
    names = sorted(found)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in files.items():
        save_file({name: found[name] for name in own}, model / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, own in files.items() for name in own}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "original.safetensors").write_bytes(b"not ours")
    assert fingerprints.of_weights(model) == before


@pytest.mark.parametrize("change", ["values", "shape", "dtype"])
def test_another_weight_is_another_model(model: Path, change: str) -> None:
    before, found = fingerprints.of_weights(model), tensors(model)
    name = next(name for name in found if name.endswith("q_proj.weight"))
    match change:
        case "values":
            found[name] = found[name] * 1.01
        case "shape":
            found[name] = np.ascontiguousarray(found[name].T).reshape(-1, found[name].shape[0] // 2)
        case "dtype":
            found[name] = found[name].astype(np.float16)
    save_file(found, model / "model.safetensors")
    assert fingerprints.of_weights(model) != before


def test_few_tensors_are_looked_into_where_there_are_many(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = StoredTensor.read_bytes_into
    monkeypatch.setattr(
        StoredTensor, "read_bytes_into", lambda self, view, first: reads.append(len(view)) or read(self, view, first)
    )
    monkeypatch.setattr(fingerprints, "MAX_SAMPLES", 3)
    fingerprints.of_weights(model)
    assert 0 < len(reads) <= 3 and max(reads) <= fingerprints.SAMPLE_BYTES


def test_options_and_files_are_named_and_paths_are_each_hosts_own(model: Path) -> None:
    config = EngineConfig(max_num_seqs=3, compilation_cache_dir=str(model))
    found = json.loads(json.dumps(fingerprints.facts(model, config)))
    assert found["max_num_seqs"] == 3 and "compilation_cache_dir" not in found
    assert found == fingerprints.facts(GOLDEN, EngineConfig(max_num_seqs=3))
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    assert fingerprints.facts(model, config)["config.json"] != found["config.json"]


def test_an_engine_compares_before_it_loads(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Group:
        size = 1

        def agree(self, said: dict[str, Any], advice: str = "") -> None:
            assert said == fingerprints.facts(model, config)
            raise HostsError("differs: weights")

    config = EngineConfig(max_num_seqs=3, dtype="float32")
    monkeypatch.setattr("jaxinfer.engine.load_parameters", lambda *args, **options: pytest.fail("it loads"))
    with pytest.raises(HostsError, match="differs: weights"):
        Engine(model, config, group=Group())


def test_weights_that_are_not_there_say_so_and_orbax_is_a_word(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        fingerprints.of_weights(model)
    (model / ORBAX_DIR).mkdir()
    assert fingerprints.of_weights(model) == "Orbax"
