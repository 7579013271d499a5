"""What a request and an engine's options may hold; whatever they may not is refused with its value and the limit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from jaxinfer.config import ConfigError, EngineConfig
from jaxinfer.request import Request, RequestError, SamplingParams, check_token_ids

LIMITS: dict[str, Any] = {"vocab_size": 100, "max_model_len": 32, "eos_token_ids": (0,), "has_tokenizer": True}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": math.nan}, "temperature: nan must be a number from 0 to 100"),
        ({"temperature": 10**400}, "temperature: 1000"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty: 1e-40 must be a number from 0.01 to 100"),
        ({"logprobs": 5}, "logprobs: 5 must be true or false; top_logprobs is how many"),
        ({"ignore_eos": "no"}, "ignore_eos: 'no' must be true or false"),
        ({"stop": None}, "stop: None must be a sequence"),
        ({"stop_token_ids": 5}, "stop_token_ids: 5 must be a sequence"),
        ({"logit_bias": None}, "logit_bias: None must map"),
    ],
)
def test_sampling_params_refuse(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request("a", (1.5, 2)), "1.5 is outside the vocabulary"),  # type: ignore[arg-type]
        (Request("a", (True,)), "True is outside the vocabulary"),
        (Request("a", (1,), cache_salt="\ud800"), "cache_salt: .* is not valid Unicode"),
        (
            Request("a", (1,), SamplingParams(allowed_token_ids=(7,) * 101)),
            "allowed_token_ids: 101 ids, where 1 to 100",
        ),
        (Request("a", (1,), SamplingParams(allowed_token_ids=())), "allowed_token_ids: 0 ids"),
        (Request("a", (1,), SamplingParams(allowed_token_ids=(0,), min_tokens=1)), "min_tokens: 1 cannot be reached"),
        (
            Request("a", (1,), SamplingParams(allowed_token_ids=(7,), stop_token_ids=(7,), min_tokens=1)),
            "every one of allowed_token_ids ends the text",
        ),
        (Request("a", (1,) * 20, SamplingParams(min_tokens=13)), "13 after a prompt of 20 go over max_model_len=32"),
    ],
)
def test_requests_refuse(request_: Request, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        request_.check(**LIMITS)


def test_what_can_be_reached_is_taken() -> None:
    for params in (
        SamplingParams(allowed_token_ids=(0,)),
        SamplingParams(allowed_token_ids=(0,), min_tokens=1, ignore_eos=True),
        SamplingParams(allowed_token_ids=(0, 1), min_tokens=1),
        SamplingParams(min_tokens=12),
    ):
        Request("a", (1,) * 20, params).check(**LIMITS)


def test_numpy_integers_are_token_ids() -> None:
    ids = check_token_ids(np.array([3, 4], np.int64))
    assert ids == (3, 4) and all(type(token) is int for token in ids)
    with pytest.raises(RequestError, match=r"1\.0 is not a whole number"):
        check_token_ids([1.0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stream_interval_s": math.inf}, "stream_interval_s=inf must be from 0 to 3,600"),
        ({"watchdog_s": math.inf}, "watchdog_s=inf"),
        ({"max_batch_wait_s": math.nan}, "max_batch_wait_s=nan"),
        ({"max_num_seqs": 2.5}, "max_num_seqs=2.5 must be of type int"),
        ({"max_num_seqs": 10**9}, "max_num_seqs=1000000000 must be from 1 to 16,384"),
        ({"loop_steps": 10**8}, "loop_steps=100000000 must be from 1 to 1,024"),
        ({"prefix_caching": "no"}, "prefix_caching='no' must be of type bool"),
        ({"max_model_len": 1}, "max_model_len=1 must be from 2"),
        ({"page_size": 0}, "page_size=0 must be from 1"),
        ({"batching": "often"}, "batching='often' is not one of continuous, dynamic, static"),
    ],
)
def test_engine_options_refuse(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineConfig(**options)
