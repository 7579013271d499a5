"""How many pages an engine gets, by hand-computed numbers."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import pytest

from jaxinfer.batch import empty_state, limits_of
from jaxinfer.config import ConfigError, EngineConfig, LayerSpec, ModelConfig, NormSpec
from jaxinfer.memory import kv_budget, max_model_len, pages_per_group
from jaxinfer.programs import slot_buckets

# 2 KV heads x 8 x (K, V) x 4 bytes = 128 bytes per token and layer; a page of 16 tokens is 2048 bytes per layer
LAYERS = (LayerSpec(), LayerSpec(window=64), LayerSpec())
MODEL = ModelConfig("t", 10, 8, 8, 2, 2, 8, NormSpec(1e-5), True, 1024, LAYERS)
CONFIG = EngineConfig(dtype="float32", max_num_seqs=4, page_size=16, max_model_len=512, kv_memory_bytes=10**9)


def test_every_slot_can_reach_the_longest_sequence() -> None:
    full = 4 * 512 // 16
    windowed = 4 * (min(512, 64 + 2 * 512) // 16 + 2)
    assert pages_per_group(MODEL, CONFIG, 512) == (full + 2, windowed + 2)


def page_bytes(pages: tuple[int, ...]) -> int:
    """Of all layers: the first group has two, the second has one."""
    return pages[0] * 2 * 2048 + pages[1] * 2048


LEAST = (32 + 2, 34 + 2)  # one sequence of 512 tokens in each group, a page to copy from and the trash page


def test_the_rest_of_a_small_budget_is_shared_between_groups() -> None:
    half = page_bytes(LEAST) + 3 * page_bytes((32, 34)) // 2
    small = replace(CONFIG, kv_memory_bytes=half)
    assert pages_per_group(MODEL, small, 512) == (34 + 48, 36 + 51)


@pytest.mark.parametrize("slots", [1, 3, 4])
def test_no_budget_is_exceeded_or_wasted(slots: int) -> None:
    most = page_bytes((slots * 32 + 2, slots * 34 + 2))
    for budget in range(page_bytes(LEAST), most + 20_000, 997):
        pages = pages_per_group(MODEL, replace(CONFIG, max_num_seqs=slots, kv_memory_bytes=budget), 512)
        assert min(budget, most) - 3 * 2048 < page_bytes(pages) <= budget
        assert pages[0] >= LEAST[0] and pages[1] >= LEAST[1]


def test_the_advice_of_a_refusal_is_the_least_that_is_accepted() -> None:
    with pytest.raises(ConfigError, match="kv_memory_bytes=1000 is too little: one sequence") as error:
        pages_per_group(MODEL, replace(CONFIG, kv_memory_bytes=1000), 512)
    advised = int(re.search(r"needs (\d+)", str(error.value))[1])  # type: ignore[index]
    assert advised == page_bytes(LEAST)
    assert pages_per_group(MODEL, replace(CONFIG, kv_memory_bytes=advised), 512) == LEAST
    for less in (1, 2048):
        with pytest.raises(ConfigError, match=f"needs {advised}"):
            pages_per_group(MODEL, replace(CONFIG, kv_memory_bytes=advised - less), 512)


def test_the_pages_are_what_is_allocated() -> None:
    budget = page_bytes(LEAST) + 50_000
    config = replace(CONFIG, kv_memory_bytes=budget)
    pages = pages_per_group(MODEL, config, 512)
    layers = empty_state(MODEL, config, limits_of(MODEL, config, 512, pages)).cache.layers
    assert sum(array.nbytes for array in jax.tree.leaves(layers)) == page_bytes(pages) <= budget


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
    assert EngineConfig(min_prefill_bucket=32, max_num_batched_tokens=200).prefill_buckets == (32, 64, 128, 256)


def test_devices_of_a_cpu_share_its_memory_between_engines_too() -> None:
    """Two replicas over two devices each budget for four."""
    assert kv_budget(4) == kv_budget(1) // 4
    assert kv_budget(1) > 1 << 28
