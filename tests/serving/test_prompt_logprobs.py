"""Prompt log-probabilities over the real wire: the engine's own values, once, in both calls and both clients."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
import pytest_asyncio
from oracle import Oracle

from jaxinfer.config import EngineConfig
from jaxinfer.engine import Engine
from jaxinfer.request import PromptLogprob, Request, SamplingParams, TokenEvent
from serving.async_engine import AsyncEngine, _merge
from serving.client import AsyncClient, Client, InvalidRequestError, MessageTooLargeError
from serving.grpc_server import GrpcServer, ServerConfig
from serving.protos.jaxinfer.v1 import inference_pb2 as pb
from serving.protos.jaxinfer.v1 import inference_pb2_grpc

pytestmark = pytest.mark.asyncio(loop_scope="module")
MODEL = Path(__file__).parents[1] / "goldens" / "llama"
CONFIG = EngineConfig(
    dtype="float32", max_num_seqs=4, max_model_len=256, max_num_batched_tokens=32, min_prefill_bucket=32, page_size=8
)
MAX_BYTES = 24_000  # of a message: what 80 tokens with 20 alternatives need, not what 200 do
PROMPT = np.random.default_rng(0).integers(3, 190, 80).tolist()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server():
    engine = AsyncEngine(lambda progress: Engine(MODEL, CONFIG))
    front = GrpcServer(engine, ServerConfig(port=0, max_message_bytes=MAX_BYTES), model_name="llama")
    await front.start()
    engine.start()
    await engine.until_ready()
    yield SimpleNamespace(engine=engine, address=front.address)
    assert await engine.stop()
    await front.stop()


def asking(num_top: int, **changes: object) -> SamplingParams:
    return SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, prompt_logprobs=num_top, **changes)


async def in_process(server: SimpleNamespace, params: SamplingParams):
    request = Request("mine", tuple(PROMPT), params)
    async with server.engine.submit(request) as stream:
        events = [event async for event in stream]
    return events[0].prompt_logprobs


async def test_the_wire_changes_nothing(server):
    params = asking(3)
    expected = await in_process(server, params)
    truth = Oracle(MODEL).logits(PROMPT).astype(np.float64)
    truth -= np.log(np.exp(truth).sum(axis=1, keepdims=True))
    assert [v.logprob for v in expected[1:]] == pytest.approx(truth[np.arange(79), PROMPT[1:]], abs=1e-4)
    async with AsyncClient(server.address) as client:
        result = await client.generate(PROMPT, params)
        assert result.prompt_logprobs == expected
        chunks = [chunk async for chunk in client.stream(PROMPT, params)]
        assert chunks[0].prompt_logprobs == expected
        assert [chunk.prompt_logprobs for chunk in chunks[1:]] == [None] * (len(chunks) - 1)
        plain = await client.generate(PROMPT, SamplingParams(max_tokens=2))
        assert plain.prompt_logprobs is None and plain.usage.cached_tokens > 0
        several = await client.generate(PROMPT, asking(3, n=2))
        assert several.prompt_logprobs == expected and len(several.completions) == 2


async def test_merged_events_keep_them():
    values = (None, PromptLogprob(-1.0, 2))
    events = [TokenEvent("r", 0, (7,), "a", prompt_logprobs=values), TokenEvent("r", 0, (8,), "b")]
    merged = _merge(events)
    assert merged.prompt_logprobs == values and merged.token_ids == (7, 8)


async def test_the_synchronous_client_has_them_too(server):
    expected = await in_process(server, asking(0))

    def call():
        with Client(server.address) as client:
            return client.generate(PROMPT, asking(0)), list(client.stream([7], asking(0)))

    result, chunks = await asyncio.to_thread(call)
    assert result.prompt_logprobs == expected
    assert chunks[0].prompt_logprobs == (None,)  # asked for, and nothing predicts the first token


@pytest.mark.parametrize("value", [-1, 21])
async def test_a_bad_number_is_refused_by_name(server, value):
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        message = pb.GenerateRequest(token_ids={"ids": [1, 2]}, sampling={"prompt_logprobs": value})
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(message)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "prompt_logprobs" in caught.value.details() and str(value) in caught.value.details()
    async with AsyncClient(server.address) as client:
        with pytest.raises(InvalidRequestError):
            await client.generate([300], asking(1))


@pytest.mark.parametrize("call", ["generate", "stream"])
async def test_what_one_message_cannot_hold_is_refused_before_any_work(server, call):
    before = (await server.engine.call(lambda engine: engine.stats())).prompt_tokens
    async with AsyncClient(server.address) as client:
        with pytest.raises(MessageTooLargeError):
            if call == "generate":
                await client.generate([5] * 200, asking(20))
            else:
                [chunk async for chunk in client.stream([5] * 200, asking(20))]
    assert (await server.engine.call(lambda engine: engine.stats())).prompt_tokens == before
