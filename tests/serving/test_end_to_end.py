"""The real engine behind the real wire, in this process: many streams, cancel storms, deadlines, nothing leaked."""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytest_asyncio

from jaxinfer.config import EngineConfig
from jaxinfer.engine import Engine
from jaxinfer.request import FinishReason, Request, SamplingParams
from serving import client as api
from serving.async_engine import AsyncEngine
from serving.client import AsyncClient
from serving.grpc_server import GrpcServer, ServerConfig

pytestmark = pytest.mark.asyncio(loop_scope="module")
MODEL = Path(__file__).parents[1] / "goldens" / "llama"
LONG = 200
CONFIG = EngineConfig(
    dtype="float32",
    max_num_seqs=8,
    max_model_len=256,
    max_num_batched_tokens=64,
    min_prefill_bucket=64,
    page_size=8,
    loop_steps=8,
    max_queue=256,
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server():
    engine = AsyncEngine(lambda progress: Engine(MODEL, CONFIG))
    front = GrpcServer(engine, ServerConfig(port=0), model_name="llama")
    await front.start()
    engine.start()
    await engine.until_ready()
    yield SimpleNamespace(engine=engine, address=front.address)
    await engine.drain(30)
    assert await engine.stop()
    await front.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def client(server):
    async with AsyncClient(server.address) as client:
        yield client
    await _until_idle(server.engine)
    await server.engine.call(lambda engine: engine.check())  # after every test: no page, no slot, no sequence is left


async def _until_idle(engine: AsyncEngine) -> None:
    async with asyncio.timeout(60):
        while engine._streams or await engine.call(lambda e: e.has_work()):
            await asyncio.sleep(0.005)


def _prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(3, 100) for _ in range(rng.randint(1, 60))]


def _mixed(rng: random.Random) -> SamplingParams:
    greedy = rng.random() < 0.5
    return SamplingParams(
        max_tokens=rng.randint(1, 24),
        temperature=0.0 if greedy else 0.8,
        top_p=1.0 if greedy else rng.choice([1.0, 0.9]),
        seed=rng.randrange(1000),
        n=rng.choice([1, 1, 1, 2]),
        ignore_eos=True,
        logprobs=rng.random() < 0.3,
    )


async def _collect(client: AsyncClient, prompt, sampling, **options) -> dict[int, tuple]:
    """Tokens, finish reason and log-probabilities of each completion of a stream."""
    tokens: dict[int, list[int]] = {}
    logprobs: dict[int, list[float]] = {}
    reasons: dict[int, FinishReason] = {}
    usage = None
    async for chunk in client.stream(prompt, sampling, **options):
        assert usage is None, "the message with usage is the last"
        tokens.setdefault(chunk.index, []).extend(chunk.token_ids)
        logprobs.setdefault(chunk.index, []).extend(item.logprob for item in chunk.logprobs or ())
        if chunk.finish_reason is not None:
            reasons[chunk.index] = chunk.finish_reason
        usage = chunk.usage
    assert usage.completion_tokens == sum(map(len, tokens.values())) and usage.prompt_tokens == len(prompt)
    return {index: (tokens[index], reasons[index], logprobs[index]) for index in tokens}


async def test_64_concurrent_streams_equal_the_same_requests_alone(client, server):
    rng = random.Random(0)
    requests = [(_prompt(rng), _mixed(rng)) for _ in range(64)]
    together = await asyncio.gather(*(_collect(client, *request) for request in requests))
    for (prompt, sampling), got in zip(requests, together, strict=True):
        alone = await _collect(client, prompt, sampling)
        assert {i: one[:2] for i, one in alone.items()} == {i: one[:2] for i, one in got.items()}
        for index, (_, _, logprobs) in alone.items():
            assert logprobs == got[index][2]
        assert {index: len(tokens) for index, (tokens, _, _) in got.items()} == dict.fromkeys(
            range(sampling.n), sampling.max_tokens
        )
    assert (await server.engine.call(lambda e: e.stats())).compiles_after_warmup == 0


async def test_the_wire_gives_what_the_engine_gives(client, server):
    sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)

    def alone(engine: Engine) -> list[int]:
        engine.add(Request("direct", (5, 6, 7), sampling))
        tokens = []
        while engine.has_work():
            tokens += [token for event in engine.step() for token in event.token_ids]
        return tokens

    direct = await server.engine.call(alone)
    assert (await client.generate([5, 6, 7], sampling)).completions[0].token_ids == tuple(direct)


async def test_a_cancel_storm_leaves_nothing_behind(client, server):
    rng = random.Random(1)
    long = SamplingParams(max_tokens=LONG, temperature=0, ignore_eos=True)

    async def one(i: int) -> str:
        how = rng.choice(["leave", "cancel", "deadline", "abort", "unread"])
        prompt, after = _prompt(rng), rng.randint(0, 3)
        stream = client.stream(prompt, long, request_id=f"storm-{i}", timeout_s=0.05 if how == "deadline" else 60)
        if how == "unread":
            task = asyncio.create_task(anext(stream))
            await asyncio.sleep(rng.random() * 0.02)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        elif how == "cancel":
            task = asyncio.create_task(_exhaust(stream))
            await asyncio.sleep(rng.random() * 0.1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        else:
            with contextlib.suppress(api.DeadlineError):
                async for _ in stream:
                    if after == 0 and how == "leave":
                        break
                    if after == 0 and how == "abort":
                        await client.abort(f"storm-{i}")
                    after -= 1
        await stream.aclose()
        return how

    ways = await asyncio.gather(*(one(i) for i in range(150)))
    assert set(ways) == {"leave", "cancel", "deadline", "abort", "unread"}
    await _until_idle(server.engine)
    stats = await server.engine.call(lambda e: e.stats())
    assert stats.num_running == stats.num_waiting == 0 and not any(stats.pages_used)
    calm = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    assert len((await client.generate([1, 2, 3], calm)).completions[0].token_ids) == 8


async def _exhaust(stream) -> None:
    async for _ in stream:
        pass


@pytest.mark.parametrize("how", ["cancel", "abort"])
async def test_a_slot_is_free_within_two_loop_calls(client, server, how):
    sampling = SamplingParams(max_tokens=LONG, temperature=0, ignore_eos=True)
    stream = client.stream([1, 2, 3], sampling, request_id="two loops")
    await anext(stream)
    seen: dict[str, int] = {}
    engine = await server.engine.call(lambda e: e)
    original = engine.abort

    def abort(request_id: str) -> None:
        seen["calls"] = engine.stats().num_calls
        original(request_id)
        seen["running"] = engine.stats().num_running

    engine.abort = abort
    if how == "cancel":
        await stream.aclose()
    else:
        assert await client.abort("two loops")
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].finish_reason is FinishReason.ABORT
    await _until_idle(server.engine)
    engine.abort = original
    assert seen["running"] == 0
    assert (await server.engine.call(lambda e: e.stats())).num_calls <= seen["calls"] + 2


async def test_deadlines_end_calls_with_their_status(client, server):
    sampling = SamplingParams(max_tokens=LONG, temperature=0, ignore_eos=True)
    outcomes = await asyncio.gather(
        *(client.generate([i + 1], sampling, timeout_s=0.02) for i in range(40)), return_exceptions=True
    )
    kinds = {type(outcome) for outcome in outcomes}
    assert api.DeadlineError in kinds and kinds <= {api.DeadlineError, api.GenerateResult}


async def test_a_prefix_of_another_salt_is_not_shared(client):
    prompt = [(7 * i) % 90 + 3 for i in range(40)]
    sampling = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    first = await client.generate(prompt, sampling, cache_salt="a")
    again = await client.generate(prompt, sampling, cache_salt="a")
    other = await client.generate(prompt, sampling, cache_salt="b")
    assert (first.usage.cached_tokens, other.usage.cached_tokens) == (0, 0)
    assert again.usage.cached_tokens > 0
    assert first.completions[0].token_ids == again.completions[0].token_ids == other.completions[0].token_ids


async def test_limits_of_the_model_are_told(client, server):
    info = await client.model_info()
    assert info.max_model_len == CONFIG.max_model_len and not info.has_tokenizer
    with pytest.raises(api.InvalidRequestError, match="vocabulary") as caught:
        await client.generate([info.vocab_size])
    assert caught.value.violations[0].field == "token_ids"
    with pytest.raises(api.InvalidRequestError, match="max_model_len is 256"):
        await client.generate([1] * 256)
    longest = await client.generate([1] * 250, SamplingParams(max_tokens=None, ignore_eos=True, temperature=0))
    assert longest.usage.completion_tokens == 6
    assert longest.completions[0].finish_reason is FinishReason.LENGTH
