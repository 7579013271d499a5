"""What the clients send and refuse by themselves: every option is honoured or an error, and errors are typed."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from jaxinfer.request import Priority, SamplingParams
from serving import client as api
from serving.client import AsyncClient, Client

pytestmark = pytest.mark.asyncio
ONE = SamplingParams(max_tokens=1)


@pytest.mark.parametrize(
    ("priority", "expected"), [(Priority.BATCH, 1), (1, 1), (0, 0), (Priority.ONLINE, 0), (None, None)]
)
async def test_priorities_are_sent(fakes, serving, priority, expected):
    engine = fakes.Engine()
    seen = []
    original = engine.add
    engine.add = lambda request: (seen.append(request.priority), original(request))[1]
    options = {} if priority is None else {"priority": priority}
    async with serving(engine) as server, AsyncClient(server.address) as client:
        await client.generate([1], ONE, **options)
    assert seen == [Priority(expected or 0)]


@pytest.mark.parametrize(
    ("prompt", "sampling", "options", "field"),
    [
        ("x", ONE, {"priority": 7}, "priority"),
        ("x", ONE, {"priority": "batch"}, "priority"),
        ("\ud800", ONE, {}, "text"),
        ("x", ONE, {"request_id": "\ud800"}, "request_id"),
        ([-1], ONE, {}, "token_ids"),
        ([2**40], ONE, {}, "token_ids"),
        ("x", SamplingParams(logit_bias={-1: 1}), {}, "sampling.logit_bias"),
        ("x", SamplingParams(stop_token_ids=(-1,)), {}, "sampling.stop_token_ids"),
        ("x", SamplingParams(allowed_token_ids=(2**32,)), {}, "sampling.allowed_token_ids"),
    ],
)
async def test_what_cannot_be_sent_is_an_invalid_request(prompt, sampling, options, field):
    async with AsyncClient("127.0.0.1:1") as client:
        for call in (client.generate(prompt, sampling, **options), anext(client.stream(prompt, sampling, **options))):
            with pytest.raises(api.InvalidRequestError) as caught:
                await call
            assert caught.value.violations[0].field == field
    with Client("127.0.0.1:1") as blocking, pytest.raises(api.InvalidRequestError, match=field.rpartition(".")[2]):
        blocking.generate(prompt, sampling, **options)


async def test_errors_name_choices_and_limits():
    with Client("127.0.0.1:1") as client:
        with pytest.raises(api.InvalidRequestError, match=r"'batch' is not one of ONLINE \(0\), BATCH \(1\)"):
            client.generate("x", priority="batch")
        with pytest.raises(api.InvalidRequestError, match="-1; token ids are from 0 to 4294967295"):
            client.generate([-1])
        for call in (
            lambda: client.tokenize("\ud800"),
            lambda: client.detokenize([-1]),
            lambda: client.abort("\ud800"),
        ):
            with pytest.raises(api.InvalidRequestError):
                call()


@pytest.mark.parametrize("prompt", [b"abc", bytearray(b"abc"), memoryview(b"abc"), None, 5, [1.5], ["a"]])
async def test_a_prompt_is_text_or_ids(prompt):
    with Client("127.0.0.1:1") as client, pytest.raises(TypeError):
        client.generate(prompt)


@pytest.mark.parametrize("option", ["modle", "cache_sallt"])
async def test_unknown_options_are_errors(option):
    message = f"'{option}'; the options are timeout_s, model, request_id, priority, cache_salt, add_special_tokens"
    with Client("127.0.0.1:1") as client:
        with pytest.raises(TypeError, match=message):
            client.generate("x", **{option: "a"})
        with pytest.raises(TypeError, match=message):
            next(client.stream("x", **{option: "a"}))


@pytest.mark.parametrize("timeout_s", [float("inf"), 1e10, 1e30])
async def test_a_very_long_limit_is_no_limit(fakes, serving, timeout_s):
    async with serving(fakes.Engine(), request_timeout_s=0.001) as server:  # the server's own, for calls without one
        async with AsyncClient(server.address) as client:
            await client.wait_ready(timeout_s)
            assert (await client.generate([1], ONE, timeout_s=timeout_s)).usage.total_tokens == 2
            assert [chunk.usage.total_tokens async for chunk in client.stream([1], ONE, timeout_s=timeout_s)] == [2]

        def blocking() -> None:
            with Client(server.address, timeout_s=timeout_s) as client:
                client.wait_ready(timeout_s)
                assert client.generate(np.array([1]), ONE).usage.total_tokens == 2

        await asyncio.to_thread(blocking)


async def test_a_closed_client_says_so():
    client, other = Client("127.0.0.1:1"), AsyncClient("127.0.0.1:1")
    client.close()
    await other.close()
    for call in (lambda: client.generate("x"), lambda: next(client.stream("x")), lambda: client.wait_ready(9)):
        with pytest.raises(api.RequestCancelledError, match="this client was closed"):
            call()
    for answer in (other.generate("x"), anext(other.stream("x")), other.wait_ready(9)):
        with pytest.raises(api.RequestCancelledError, match="this client was closed"):
            await answer
