"""How many pages an engine gets, by hand-computed numbers."""

from __future__ import annotations

import pytest

from jaxinfer.config import ConfigError, EngineConfig, LayerSpec, ModelConfig
from jaxinfer.memory import max_model_len, pages_per_group
from jaxinfer.programs import prefill_buckets, slot_buckets

# 2 KV heads x 8 x (K, V) x 4 bytes = 128 bytes per token and layer; a page of 16 tokens is 2048 bytes per layer
MODEL = ModelConfig("t", 10, 8, 8, 2, 2, 8, 1e-5, True, 1024, (LayerSpec(), LayerSpec(window=64), LayerSpec()))
CONFIG = EngineConfig(dtype="float32", max_num_seqs=4, page_size=16, max_model_len=512, kv_memory_bytes=10**9)


def test_every_slot_can_reach_the_longest_sequence() -> None:
    full = 4 * 512 // 16
    windowed = 4 * (min(512, 64 + 2 * 512) // 16 + 2)
    assert pages_per_group(MODEL, CONFIG, 512) == (full + 2, windowed + 2)


def test_a_small_budget_is_shared_between_groups_and_too_small_a_one_refused() -> None:
    wanted = 128 * 2 * 2048 + 136 * 2048
    small = EngineConfig(dtype="float32", max_num_seqs=4, page_size=16, kv_memory_bytes=wanted // 2)
    assert pages_per_group(MODEL, small, 512) == (64 + 2, 68 + 2)
    tiny = EngineConfig(dtype="float32", max_num_seqs=4, page_size=16, kv_memory_bytes=wanted // 5)
    with pytest.raises(ConfigError, match="one sequence of max_model_len=512 needs 32"):
        pages_per_group(MODEL, tiny, 512)


def test_longest_sequence() -> None:
    assert max_model_len(MODEL, CONFIG) == 512
    assert max_model_len(MODEL, EngineConfig()) == 1024
    with pytest.raises(ConfigError, match="max_model_len=2000 is over the model's 1024 positions"):
        max_model_len(MODEL, EngineConfig(max_model_len=2000))


@pytest.mark.parametrize(
    ("slots", "buckets"), [(2, [2]), (4, [4]), (8, [2, 8]), (16, [4, 16]), (256, [4, 16, 64, 256]), (100, [])]
)
def test_slot_buckets(slots: int, buckets: list[int]) -> None:
    got = slot_buckets(slots)
    assert got[-1] == slots and got[0] <= 6 and got == sorted(got)
    if buckets:
        assert got == buckets


def test_prefill_buckets_cover_the_budget() -> None:
    assert prefill_buckets(EngineConfig(min_prefill_bucket=32, max_num_batched_tokens=200)) == [32, 64, 128, 256]
