"""The language model inside a multimodal Hugging Face directory: its part of config.json and of the tensors' names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from jaxinfer.config import ConfigError
from jaxinfer.models.hugging_face import Fields
from jaxinfer.models.sources import Source

# What the outer config.json says of the other parts and of how images and sounds become tokens.
OTHER_PARTS = frozenset(
    {
        "vision_config",
        "audio_config",
        "mm_tokens_per_image",
        "vision_soft_tokens_per_image",
        "audio_soft_tokens_per_image",
        "audio_ms_per_token",
        "boi_token_index",
        "eoi_token_index",
        "image_token_index",
        "boi_token_id",
        "eoi_token_id",
        "image_token_id",
        "boa_token_id",
        "eoa_token_id",
        "eoa_token_index",
        "audio_token_id",
        "video_token_id",
    }
)
OUTER = ("tie_word_embeddings", "bos_token_id")  # count where text_config has none of its own


def is_multimodal(architecture: str) -> bool:
    """Whether the language model is a part of it, under names of its own."""
    return architecture.endswith("ForConditionalGeneration")


def language_model(hf: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[str, Fields]:
    """The architecture, and the fields of its language model: config.json's own, or those of `text_fields`."""
    [architecture] = hf["architectures"]
    return architecture, text_fields(hf, defaults) if is_multimodal(architecture) else Fields(hf)


def text_fields(hf: Mapping[str, Any], defaults: Mapping[str, Any]) -> Fields:
    """The fields of `text_config`, with `defaults` for absent ones. Raises ConfigError for unknown fields around it.

    End tokens of both count: chat models name their end of turn in the outer one only.
    """
    outer = Fields(hf)
    text = outer.get("text_config")
    if not isinstance(text, dict):
        raise ConfigError(f"text_config={text!r} must be an object")
    inherited = {name: value for name in OUTER if (value := outer.get(name)) is not None}
    ends = [*_listed(outer.get("eos_token_id")), *_listed(text.get("eos_token_id"))]
    outer.skip(*OTHER_PARTS)
    outer.finish()
    return Fields(dict(defaults) | inherited | text | {"eos_token_id": ends}, prefix="text_config.")


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def renamed(weights: Mapping[str, str | Source], rename: Callable[[str], str]) -> dict[str, str | Source]:
    """The same table with every stored name changed."""
    return {
        name: rename(stored) if isinstance(stored, str) else replace(stored, name=rename(stored.name))
        for name, stored in weights.items()
    }
