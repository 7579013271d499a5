"""jaxinfer-mini: Llama's decoder built to hold little K/V, after Character.AI's "Optimizing AI Inference" (2024).

Grouped or multi-query attention, local windows with a few global layers, and groups of layers that share K/V.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxinfer.config import ConfigError, ModelConfig
from jaxinfer.models.decoder_fields import decoder_config, layer_windows
from jaxinfer.models.hugging_face import Fields
from jaxinfer.models.llama import WEIGHTS as WEIGHTS
from jaxinfer.models.mistral import window


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """JaxinferMiniForCausalLM's config.json -> ModelConfig. Raises ConfigError.

    Llama's fields, `layer_types` and `sliding_window`, and `kv_from`: for each layer null, or the index of the earlier
    layer of the same type whose K/V it reads instead of making its own.
    """
    fields = Fields(hf)
    size = window(fields)
    types = fields.layer_types(lambda index: "full_attention" if size is None else "sliding_attention")
    owners = fields.listed("kv_from", len(types), (int, type(None))) or [None] * len(types)
    made = decoder_config("JaxinferMiniForCausalLM", fields, layer_windows(types, size))
    for index, owner in enumerate(owners):
        if owner is not None and not (0 <= owner < index and types[owner] == types[index] and owners[owner] is None):
            raise ConfigError(
                f"kv_from[{index}]={owner} must be an earlier {types[index]} layer with K/V of its own, or null"
            )
    pairs = zip(made.layers, owners, strict=True)
    return dataclasses.replace(made, layers=tuple(dataclasses.replace(layer, kv_from=owner) for layer, owner in pairs))
