"""What K/V costs, choice by choice, counted by hand."""

from __future__ import annotations

import dataclasses

from jaxinfer.config import KVShape, LayerSpec, ModelConfig, NormSpec
from jaxinfer.perf.kv_size import kv_bytes, kv_choices

LAYERS = (LayerSpec(), LayerSpec(window=10), LayerSpec(window=10, kv_from=1), LayerSpec(kv_from=0))
MODEL = ModelConfig("test", 10, 8, 8, 4, 2, 8, NormSpec(1e-5), True, 1024, LAYERS)


def row_bytes(shape: KVShape) -> int:
    return 2 * 2 * shape.kv_heads * shape.head_dim


def test_each_choice_saves_its_share() -> None:
    full = 4 * 100 * 2 * 2 * 4 * 8
    sizes = [(choice.choice.split(" (")[0], choice.bytes_per_sequence) for choice in kv_choices(MODEL, 100, row_bytes)]
    assert sizes == [
        ("multi-head attention", full),
        ("grouped-query attention", full // 2),
        ("K/V shared by layers", full // 4),
        ("local windows", (100 + 10) * 64),
    ]
    assert kv_choices(MODEL, 100, row_bytes)[-1].bytes_per_token == kv_bytes(MODEL, 100, row_bytes) / 100


def test_a_choice_not_made_is_left_out() -> None:
    plain = dataclasses.replace(MODEL, kv_heads=4, layers=(LayerSpec(),) * 2)
    assert [choice.choice for choice in kv_choices(plain, 50, row_bytes)] == ["multi-head attention"]
    multi_query = dataclasses.replace(MODEL, kv_heads=1, layers=(LayerSpec(),) * 2)
    assert "multi-query attention (1 KV head for 4)" in [c.choice for c in kv_choices(multi_query, 50, row_bytes)]


def test_layers_of_another_shape_count_as_they_are() -> None:
    mixed = dataclasses.replace(MODEL, layers=(LayerSpec(head_dim=16, kv_heads=1), LayerSpec(window=10)))
    assert kv_bytes(mixed, 100, row_bytes) == 100 * 2 * 2 * 16 + 10 * 2 * 2 * 2 * 8
    assert kv_choices(mixed, 100, row_bytes)[0].bytes_per_sequence == 100 * 2 * 2 * 4 * (16 + 8)
