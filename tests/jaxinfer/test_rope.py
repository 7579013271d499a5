"""Rotary embedding: its scalings' frequencies, and that a sequence's length picks them whatever the schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import Oracle

from jaxinfer.engine import Engine
from jaxinfer.llm import LLM
from jaxinfer.models import load_config
from jaxinfer.request import SamplingParams
from jaxinfer.rope import DynamicScaling, LengthRule, LongScaling, RopeSpec, YarnScaling, length_rule

GOLDENS = Path(__file__).parent.parent / "goldens"
ORIGINAL = 32  # the context that the golden models' scalings stretch
SMALL = {"dtype": "float32", "max_num_seqs": 4, "min_prefill_bucket": 32, "max_num_batched_tokens": 32, "page_size": 4}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def read(tmp_path: Path, golden: str, **fields: Any) -> Any:
    """The config of a golden model with other fields."""
    hf = json.loads((GOLDENS / golden / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(hf))
    return load_config(tmp_path)


@pytest.mark.parametrize(
    ("scaling", "reach"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 1024),
        ({"rope_type": "dynamic", "factor": 2.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "default"}, 256),
    ],
)
def test_scalings_stretch_the_context(tmp_path: Path, scaling: dict[str, Any], reach: int) -> None:
    config = read(tmp_path, "llama_linear", rope_scaling=scaling, max_position_embeddings=256)
    assert config.max_position == reach


def test_yarn_keeps_fast_pairs_and_slows_slow_ones() -> None:
    yarn = YarnScaling(8.0, 4096, attention_factor=1.2)
    plain, scaled = RopeSpec(1e4).frequencies(128)[0], RopeSpec(1e4, yarn).frequencies(128)[0]
    np.testing.assert_allclose(scaled[:20], plain[:20], rtol=1e-6)
    np.testing.assert_allclose(scaled[-10:], plain[-10:] / 8, rtol=1e-6)
    ratio = plain / scaled
    assert np.all(np.diff(ratio) >= -1e-5)
    assert RopeSpec(1e4, yarn).attention_factor == 1.2


def test_length_rules() -> None:
    dynamic, long = DynamicScaling(2.0, 32), LongScaling((1.0,), (2.0,), 32, 1.0)
    assert length_rule([None, RopeSpec(1e4)]) is None
    assert length_rule([RopeSpec(1e4, dynamic), None]) == LengthRule(32, whole=False)
    assert length_rule([RopeSpec(1e4, long)]) == LengthRule(32, whole=True)
    with pytest.raises(ValueError, match="layers disagree"):
        length_rule([RopeSpec(1e4, long), RopeSpec(1e4, dynamic)])
    assert [LengthRule(32, whole=True).resident_limit(n) for n in (1, 32, 33)] == [33, 33, None]
    assert LengthRule(32, whole=False).resident_limit(5) is None


@pytest.mark.parametrize("name", ["llama_longrope", "llama_dynamic"])
def test_generation_past_the_original_context_equals_the_whole_computed_anew(name: str) -> None:
    """Prompts that end before, at and after it; with neighbours, chunks, shared prefixes and a lost device."""
    oracle = Oracle(GOLDENS / name)
    rng = np.random.default_rng(0)
    base = rng.integers(3, 90, 60).tolist()
    prompts = [base[:length] for length in (20, 31, 32, 33, 50, 20)]
    llm = LLM(GOLDENS / name, warm_up=False, **SMALL)
    expected = [oracle.greedy(prompt, GREEDY.max_tokens) for prompt in prompts]
    for _ in range(2):  # the second time over what the first left in the prefix cache
        results = llm.generate(prompts, GREEDY, progress=False)
        assert [result.outputs[0].token_ids for result in results] == expected
    failing = fail_once(llm.engine, after_calls=6)
    results = llm.generate(prompts, GREEDY, progress=False)
    assert [result.outputs[0].token_ids for result in results] == expected
    assert failing == []  # it did fail
    llm.engine.check()
    llm.engine.close()


def fail_once(engine: Engine, after_calls: int) -> list[int]:
    """Make one later device call fail; the list is empty once it has."""
    left, dispatch = [after_calls], engine._dispatch

    def failing(plan: Any) -> Any:
        if left:
            left[0] -= 1
            if left[0] == 0:
                left.clear()
                raise RuntimeError("the device is lost")
        return dispatch(plan)

    engine._dispatch = failing  # type: ignore[method-assign]
    return left


def test_prefixes_of_other_lengths_are_not_shared() -> None:
    """Past the original context a prompt's K/V depend on its length: a longer prompt must not find a shorter one's."""
    rng = np.random.default_rng(1)
    base = rng.integers(3, 90, 60).tolist()
    llm = LLM(GOLDENS / "llama_dynamic", warm_up=False, **SMALL)
    one = SamplingParams(temperature=0, max_tokens=2)

    def cached(length: int) -> int:
        return llm.generate([base[:length]], one, progress=False)[0].num_cached_tokens

    assert [cached(40), cached(41), cached(40)] == [0, 0, 39]
    assert [cached(20), cached(24)] == [0, 20]  # within it, prefixes are prefixes
    llm.engine.close()
