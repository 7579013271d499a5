"""Which architectures exist, and how a Hugging Face directory becomes a ModelConfig.

An architecture is one file with a config function and a name table (`WEIGHTS`, or `weights(config)`), and one line
here. Imports no jax.
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
from jaxinfer.models.quantization_config import read_quantization
from jaxinfer.models.sources import Source
from jaxinfer.weight_formats import WeightFormat

# Hugging Face architecture name -> "module:config function"; the module's table maps our names to theirs.
ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "jaxinfer.models.llama:config",
    "MistralForCausalLM": "jaxinfer.models.mistral:config",
    "MinistralForCausalLM": "jaxinfer.models.mistral:ministral_config",
    "MixtralForCausalLM": "jaxinfer.models.mixtral:config",
    "Qwen2ForCausalLM": "jaxinfer.models.qwen2:config",
    "Qwen3ForCausalLM": "jaxinfer.models.qwen3:config",
    "Qwen3MoeForCausalLM": "jaxinfer.models.qwen3_moe:config",
    "GemmaForCausalLM": "jaxinfer.models.gemma:config",
    "Gemma2ForCausalLM": "jaxinfer.models.gemma:config2",
    "Gemma3ForCausalLM": "jaxinfer.models.gemma3:config",
    "Gemma3ForConditionalGeneration": "jaxinfer.models.gemma3:config",
    "Gemma3nForCausalLM": "jaxinfer.models.gemma3n:config",
    "Gemma3nForConditionalGeneration": "jaxinfer.models.gemma3n:config",
    "Gemma4ForCausalLM": "jaxinfer.models.gemma4:config",
    "Gemma4ForConditionalGeneration": "jaxinfer.models.gemma4:config",
    "Phi3ForCausalLM": "jaxinfer.models.phi3:config",
    "Starcoder2ForCausalLM": "jaxinfer.models.starcoder2:config",
    "Olmo2ForCausalLM": "jaxinfer.models.olmo2:config",
    "GptOssForCausalLM": "jaxinfer.models.gpt_oss:config",
    "JaxinferMiniForCausalLM": "jaxinfer.models.jaxinfer_mini:config",
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
        config = model_config(hf)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return _with_generation_config(config, directory / "generation_config.json")


def model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of the fields of a config.json. Raises ConfigError naming the field and what is supported."""
    return dataclasses.replace(_config_function(hf)(hf), quantization=read_quantization(hf))


def weight_source(config: ModelConfig, name: str) -> Source:
    """Where our parameter lies: `layers.3.mlp.up.weight` -> `Source("model.layers.3.mlp.up_proj.weight")`.

    The architecture's table holds it under its own name, or under that with `{i}` for the layer.
    """
    module = _module(config.architecture)
    weights = module.weights(config) if hasattr(module, "weights") else module.WEIGHTS
    layer = re.match(r"layers\.(\d+)\.", name)
    key = name if layer is None or name in weights else "layers.{i}." + name[layer.end() :]
    found: str | Source = weights[key]
    source = Source(found) if isinstance(found, str) else found
    return source if layer is None else source.in_layer(layer[1])


def weight_format(config: ModelConfig, name: str) -> WeightFormat | None:
    """What our parameter, a linear map's or experts' weight, is held as once loaded; None: a plain array."""
    if config.quantization is None:
        return None
    return config.quantization.format_of(weight_source(config, name).name)


def ignored_weights(config: ModelConfig) -> str | None:
    """Pattern of stored tensors that may be there and are not read (a vision tower); None: there are none."""
    module = _module(config.architecture)
    return module.ignored(config) if hasattr(module, "ignored") else getattr(module, "IGNORED", None)


def _module(architecture: str) -> Any:
    return importlib.import_module(ARCHITECTURES[architecture].partition(":")[0])


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
