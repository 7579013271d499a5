"""How much K/V a sequence holds, and what each choice of its architecture saves of it.

The choices are those of "Optimizing AI Inference at Character.AI" (2024): fewer KV heads than query heads, K/V shared
by groups of layers, and local windows in most layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxinfer.config import KVShape, LayerSpec, ModelConfig


@dataclass(frozen=True)
class KVChoice:
    """K/V of one sequence with this choice and those before it."""

    choice: str
    bytes_per_token: float  # bytes at the context's end, over the context
    bytes_per_sequence: int


def kv_bytes(model: ModelConfig, context: int, row_bytes: Callable[[KVShape], int]) -> int:
    """Bytes that a sequence of `context` tokens needs; a windowed layer holds its window.

    row_bytes: K and V of one token in a layer of that shape.
    """
    return sum(
        min(context, layer.window or context) * row_bytes(model.kv_shape(index))
        for index, layer in enumerate(model.layers)
        if layer.kv_from is None
    )


def kv_choices(model: ModelConfig, context: int, row_bytes: Callable[[KVShape], int]) -> list[KVChoice]:
    """From multi-head attention over all tokens in every layer to the model as it is, one choice after the other.

    A choice that the model does not make is left out.
    """
    heads = dataclasses.replace(model, kv_heads=model.q_heads, layers=_changed(model, window=None, kv_from=None))
    heads = dataclasses.replace(heads, layers=_changed(heads, kv_heads=None))
    steps = [
        ("multi-head attention", heads),
        (_grouping(model), dataclasses.replace(model, layers=_changed(model, window=None, kv_from=None))),
        (_sharing(model), dataclasses.replace(model, layers=_changed(model, window=None))),
        (_windows(model), model),
    ]
    found: list[KVChoice] = []
    for name, variant in steps:
        total = kv_bytes(variant, context, row_bytes)
        if not found or total != found[-1].bytes_per_sequence:
            found.append(KVChoice(name, total / context, total))
    return found


def _changed(model: ModelConfig, **fields: Any) -> tuple[LayerSpec, ...]:
    return tuple(dataclasses.replace(layer, **fields) for layer in model.layers)


def _grouping(model: ModelConfig) -> str:
    counts = sorted({model.kv_shape(index).kv_heads for index in range(len(model.layers))})
    if counts == [1]:
        return f"multi-query attention (1 KV head for {model.q_heads})"
    return f"grouped-query attention ({', '.join(map(str, counts))} KV heads for {model.q_heads})"


def _sharing(model: ModelConfig) -> str:
    shared = sum(layer.kv_from is not None for layer in model.layers)
    return f"K/V shared by layers ({shared} of {len(model.layers)} have none of their own)"


def _windows(model: ModelConfig) -> str:
    windows = [layer.window for layer in model.layers if layer.window is not None]
    sizes = ", ".join(map(str, sorted(set(windows))))
    return f"local windows ({len(windows)} of {len(model.layers)} layers see {sizes} tokens)"
