"""A model's config by name, without its weights: what well-known models are, and as what their weights could be stored.

The files in assets/configs hold the published sizes of each model. Imports no jax.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from jaxinfer.config import ConfigError, ModelConfig
from jaxinfer.models import load_config, model_config

_DIRECTORY = Path(__file__).parent / "assets" / "configs"
_KEPT = ["lm_head", r"re:.*\.(gate|router)$"]  # what quantizers leave as it is: the unembedding and routers
_TOKENS = {"dynamic": True, "num_bits": 8, "strategy": "token", "symmetric": True}


def _weights(kind: str, bits: int = 8, group_size: int | None = None) -> dict[str, Any]:
    shared = {"strategy": "channel"} if group_size is None else {"strategy": "group", "group_size": group_size}
    return {"type": kind, "num_bits": bits, "symmetric": True, **shared}


# name -> (format, weights, activations) of a compressed-tensors checkpoint
WEIGHTS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "int8": ("int-quantized", _weights("int"), None),
    "int4": ("pack-quantized", _weights("int", 4, 128), None),
    "fp8": ("float-quantized", _weights("float"), None),
    "w8a8-int8": ("int-quantized", _weights("int"), {"type": "int", **_TOKENS}),
    "w8a8-fp8": ("float-quantized", _weights("float"), {"type": "float", **_TOKENS}),
}


def presets() -> tuple[str, ...]:
    """Names of the models that are known."""
    return tuple(sorted(path.stem for path in _DIRECTORY.glob("*.json")))


def model_of(model: str, weights: str | None = None) -> tuple[str, ModelConfig]:
    """(name, config) of a directory with config.json, or of a name in `presets()`; weights: a key of WEIGHTS.

    Raises ConfigError for a name that is none, a weight format that is none, or a config that cannot be read.
    """
    directory, known = Path(model), _DIRECTORY / f"{model.lower()}.json"
    if directory.is_dir():
        config = load_config(directory)
        name, hf = directory.resolve().name, json.loads((directory / "config.json").read_text())
    elif model.lower() in presets():
        name, hf = model.lower(), json.loads(known.read_text())
        config = model_config(hf)
    else:
        raise ConfigError(f"model {model!r} is neither a directory nor one of {', '.join(presets())}")
    if weights is None:
        return name, config
    if config.quantization is not None:
        raise ConfigError(
            f"weights={weights!r}: {name} is stored as {config.quantization.method} already; leave it out"
        )
    return name, model_config({**hf, "quantization_config": quantization(weights)})


def quantization(weights: str) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint whose linear maps are stored so. ConfigError for an unknown format."""
    if weights not in WEIGHTS:
        raise ConfigError(f"weights={weights!r} is not one of {', '.join(WEIGHTS)}")
    name, stored, activations = copy.deepcopy(WEIGHTS[weights])
    group = {"targets": ["Linear"], "weights": stored, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "config_groups": {"group_0": group},
        "ignore": list(_KEPT),
    }
