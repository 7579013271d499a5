"""Which architectures exist, and how a Hugging Face directory becomes a ModelConfig.

An architecture is one file with a config function and a `WEIGHTS` name table, and one line here. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxinfer.config import ConfigError, ModelConfig
from jaxinfer.models.hugging_face import Fields, without_duplicates

# Hugging Face architecture name -> "module:config function"; the module's WEIGHTS maps our names to theirs.
ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "jaxinfer.models.llama:config",
    "MistralForCausalLM": "jaxinfer.models.mistral:config",
    "MinistralForCausalLM": "jaxinfer.models.mistral:ministral_config",
}


def load_config(model_dir: str | Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory: config.json, and generation_config.json's further end tokens.

    Raises ConfigError naming the file, the field, its value and what is supported.
    """
    directory = Path(model_dir)
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise ConfigError(f"model directory {directory} {what}; give a Hugging Face directory with config.json")
    path = directory / "config.json"
    hf = _read_object(path)
    try:
        config = _config_function(hf)(hf)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return _with_generation_config(config, directory / "generation_config.json")


def weight_name(architecture: str, name: str) -> str:
    """Hugging Face's name of our parameter `name` (`layers.3.mlp.up.weight` -> `model.layers.3.mlp.up_proj.weight`)."""
    weights: Mapping[str, str] = importlib.import_module(ARCHITECTURES[architecture].partition(":")[0]).WEIGHTS
    layer = re.match(r"layers\.(\d+)\.", name)
    if layer is None:
        return weights[name]
    return weights["layers.{i}." + name[layer.end() :]].format(i=layer[1])


def _config_function(hf: Mapping[str, Any]) -> Any:
    names = hf.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise ConfigError(f"architectures={names!r} must name one architecture; supported: {', '.join(ARCHITECTURES)}")
    if not isinstance(names[0], str) or names[0] not in ARCHITECTURES:
        raise ConfigError(f"architecture {names[0]!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    module, _, attribute = ARCHITECTURES[names[0]].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _with_generation_config(config: ModelConfig, path: Path) -> ModelConfig:
    """Chat models list their end-of-turn tokens there; sampling defaults are the caller's and not taken from a file."""
    if not path.exists():
        return config
    fields = Fields(_read_object(path))
    try:
        end_tokens = fields.token_ids("eos_token_id", config.vocab_size, config.eos_token_ids)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return dataclasses.replace(config, eos_token_ids=end_tokens)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=without_duplicates)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; a Hugging Face model directory holds one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value
