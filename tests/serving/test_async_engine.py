"""AsyncEngine against an engine whose steps the test releases."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from jaxinfer.request import EngineDeadError, FinishReason, QueueFullError, Request, RequestError, SamplingParams
from serving.async_engine import AsyncEngine, NotReadyError, State

pytestmark = pytest.mark.asyncio


def _request(*prompt: int, max_tokens: int = 4, **options) -> Request:
    return Request("client-name", tuple(prompt) or (1, 2, 3), SamplingParams(max_tokens=max_tokens, **options))


@contextlib.asynccontextmanager
async def _running(engine):
    async_engine = AsyncEngine(lambda progress: engine)
    async_engine.start()
    await async_engine.until_ready()
    try:
        yield async_engine
    finally:
        engine.go.set()
        await async_engine.stop()


async def _until(condition, *, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


async def test_events_arrive_in_order_and_the_stream_ends(fakes):
    engine = fakes.Engine()
    async with _running(engine) as async_engine:
        request = _request(5, 6, max_tokens=6)
        events = [event async for event in async_engine.submit(request)]
    assert [t for e in events for t in e.token_ids] == fakes.expected_tokens(request, 0, 6)
    assert [e.finish_reason for e in events] == [None] * (len(events) - 1) + [FinishReason.LENGTH]
    assert events[-1].num_generated_tokens == 6
    assert engine.closed.is_set()


async def test_ids_are_made_here_not_taken_from_the_client(fakes):
    async with _running(fakes.Engine()) as async_engine:
        first, second = async_engine.submit(_request()), async_engine.submit(_request())
        assert len({first.request_id, second.request_id, "client-name"}) == 3
        for stream in (first, second):
            async for event in stream:
                assert event.request_id == stream.request_id


async def test_n_completions_end_together(fakes):
    async with _running(fakes.Engine()) as async_engine:
        request = _request(n=3, max_tokens=2)
        tokens = {0: [], 1: [], 2: []}
        async for event in async_engine.submit(request):
            tokens[event.index].extend(event.token_ids)
    assert tokens == {i: fakes.expected_tokens(request, i, 2) for i in range(3)}


async def test_a_reader_that_falls_behind_gets_one_event_per_completion(fakes):
    async with _running(fakes.Engine()) as async_engine:
        request = _request(n=2, max_tokens=5, logprobs=True)
        stream = async_engine.submit(request)
        await _until(lambda: stream.finished)
        events = [event async for event in stream]
    assert [event.index for event in events] == [0, 1]
    for index, event in enumerate(events):
        assert list(event.token_ids) == fakes.expected_tokens(request, index, 5)
        assert event.text == "".join(map(chr, event.token_ids))
        assert len(event.logprobs) == 5
        assert (event.finish_reason, event.num_generated_tokens) == (FinishReason.LENGTH, 5)


async def test_one_call_into_the_loop_per_step(fakes, monkeypatch):
    engine = fakes.Engine(slots=8)
    async with _running(engine) as async_engine:
        engine.go.clear()
        streams = [async_engine.submit(_request(i + 1, max_tokens=10)) for i in range(8)]
        await asyncio.to_thread(engine.stepping.wait, 10)
        loop = asyncio.get_running_loop()
        calls = []
        original = loop.call_soon_threadsafe
        monkeypatch.setattr(
            loop, "call_soon_threadsafe", lambda f, *args, **kw: (calls.append(f), original(f, *args, **kw))[1]
        )
        engine.go.set()
        counts = await asyncio.gather(*(_count(stream) for stream in streams))
        monkeypatch.undo()
    assert counts == [10] * 8
    deliveries = [f for f in calls if getattr(f, "__name__", "") == "_deliver"]
    assert len(deliveries) <= engine.num_steps < sum(counts)


async def _count(stream) -> int:
    return sum([len(event.token_ids) async for event in stream])


async def test_a_request_that_cannot_run_is_refused_before_it_is_queued(fakes):
    engine = fakes.Engine()
    async with _running(engine) as async_engine:
        with pytest.raises(RequestError, match="vocabulary") as caught:
            async_engine.submit(_request(fakes.VOCAB_SIZE))
        assert caught.value.field_name == "prompt_token_ids"
        assert engine.num_steps == 0


async def test_queue_full_comes_as_an_error_of_that_stream_alone(fakes):
    engine = fakes.Engine(slots=1, max_queue=2)
    async with _running(engine) as async_engine:
        engine.go.clear()
        first = async_engine.submit(_request(max_tokens=3))
        await asyncio.to_thread(engine.stepping.wait, 10)  # the first is in the engine's queue, not yet in a slot
        second = async_engine.submit(_request(max_tokens=3))
        third = async_engine.submit(_request(max_tokens=3))
        with pytest.raises(QueueFullError):  # what the inbox may hold at all
            async_engine.submit(_request())
        engine.go.set()
        assert [await _count(s) for s in (first, second, third)] == [3, 3, 3]
        engine.config = type(engine.config)(max_num_seqs=64, max_queue=2, dtype="float32")
        engine.stepping.clear()
        engine.go.clear()
        blocker = async_engine.submit(_request(max_tokens=2))
        await asyncio.to_thread(engine.stepping.wait, 10)
        late = [async_engine.submit(_request(max_tokens=2)) for _ in range(5)]
        engine.go.set()
        outcomes = await asyncio.gather(_count(blocker), *(_count(s) for s in late), return_exceptions=True)
    assert outcomes[0] == 2
    refused = [o for o in outcomes if isinstance(o, QueueFullError)]
    assert refused and all(o.retry_after_s == 2.5 for o in refused)
    assert sum(o == 2 for o in outcomes) == len(outcomes) - len(refused)


@pytest.mark.parametrize("how", ["close", "async with", "cancel"])
async def test_a_consumer_that_leaves_aborts_its_request(fakes, how):
    engine = fakes.Engine(max_model_len=1 << 20)
    async with _running(engine) as async_engine:
        stream = async_engine.submit(_request(max_tokens=None))
        if how == "close":
            await anext(stream)
            stream.close()
        elif how == "async with":
            async with stream:
                await anext(stream)
        else:
            engine.go.clear()
            engine.stepping.clear()
            await asyncio.to_thread(engine.stepping.wait, 10)
            stream._pending.clear()
            task = asyncio.create_task(anext(stream))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            engine.go.set()
        await _until(lambda: stream.finished)
        assert engine.aborted == [stream.request_id]
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        await async_engine.call(lambda e: e.check())


async def test_closing_a_finished_stream_aborts_nothing(fakes):
    engine = fakes.Engine()
    async with _running(engine) as async_engine:
        async with async_engine.submit(_request()) as stream:
            assert await _count(stream) == 4
        assert engine.aborted == []


async def test_abort_delivers_the_abort_event(fakes):
    engine = fakes.Engine(max_model_len=1 << 20)
    async with _running(engine) as async_engine:
        stream = async_engine.submit(_request(max_tokens=None))
        await anext(stream)
        async_engine.abort(stream.request_id)
        async_engine.abort("no such request")
        last = [event async for event in stream][-1]
        assert last.finish_reason is FinishReason.ABORT
        assert engine.aborted == [stream.request_id]


async def test_a_failing_step_fails_every_pending_request_and_the_engine(fakes, caplog):
    engine = fakes.Engine(slots=2)
    async with _running(engine) as async_engine:
        engine.go.clear()
        streams = [async_engine.submit(_request(max_tokens=None)) for _ in range(5)]
        await asyncio.to_thread(engine.stepping.wait, 10)
        asked = asyncio.create_task(async_engine.call(lambda e: e.info()))
        await asyncio.sleep(0)
        engine.step_error = ZeroDivisionError("secret detail")
        engine.go.set()
        outcomes = await asyncio.gather(*(_count(s) for s in streams), asked, return_exceptions=True)
        assert all(isinstance(o, EngineDeadError) for o in outcomes)
        assert "secret" not in str(outcomes[0])
        assert async_engine.state is State.DEAD
        assert isinstance(async_engine.error, ZeroDivisionError)
        with pytest.raises(EngineDeadError):
            async_engine.submit(_request())
        with pytest.raises(EngineDeadError):
            await async_engine.call(lambda e: e.info())
    assert "the engine failed" in caplog.text


async def test_a_failing_add_fails_that_request_alone(fakes, caplog):
    engine = fakes.Engine()
    async with _running(engine) as async_engine:
        engine.add_error = KeyError("odd")
        with pytest.raises(KeyError):
            await _count(async_engine.submit(_request()))
        engine.add_error = None
        assert await _count(async_engine.submit(_request())) == 4
        assert async_engine.state is State.READY
    assert "could not take a request" in caplog.text


async def test_a_failing_load_is_reported(fakes):
    def load(progress):
        raise FileNotFoundError("no model there")

    async_engine = AsyncEngine(load)
    async_engine.start()
    with pytest.raises(EngineDeadError):
        await async_engine.until_ready()
    assert str(async_engine.error) == "no model there"
    assert await async_engine.stop()


async def test_nothing_is_taken_before_ready(fakes):
    engine = fakes.Engine()
    engine.warm.clear()
    async_engine = AsyncEngine(lambda progress: engine)
    async_engine.start()
    assert await async_engine.next_state(State.LOADING) is State.WARMING
    with pytest.raises(NotReadyError):
        async_engine.submit(_request())
    engine.warm.set()
    await async_engine.until_ready()
    assert await _count(async_engine.submit(_request())) == 4
    await async_engine.stop()
    assert async_engine.state is State.STOPPED
    with pytest.raises(NotReadyError):
        async_engine.submit(_request())


async def test_drain_lets_running_requests_end(fakes):
    engine = fakes.Engine()
    async with _running(engine) as async_engine:
        engine.go.clear()
        streams = [async_engine.submit(_request(max_tokens=5)) for _ in range(6)]
        drain = asyncio.create_task(async_engine.drain(30.0))
        await asyncio.sleep(0)
        assert async_engine.state is State.DRAINING
        with pytest.raises(NotReadyError):
            async_engine.submit(_request())
        engine.go.set()
        assert await drain == 0
        assert [await _count(s) for s in streams] == [5] * 6


async def test_drain_aborts_what_is_left_with_an_event(fakes):
    engine = fakes.Engine(slots=1, max_model_len=1 << 30)
    async with _running(engine) as async_engine:
        streams = [async_engine.submit(_request(max_tokens=None)) for _ in range(3)]
        await anext(streams[0])
        assert await async_engine.drain(0.0) == 3
        for stream in streams:
            assert [event async for event in stream][-1].finish_reason is FinishReason.ABORT


async def test_a_message_ends_the_wait_for_a_fuller_batch(fakes):
    engine = fakes.Engine()
    engine.idle = 3600.0
    async with _running(engine) as async_engine:
        first = async_engine.submit(_request())
        assert await async_engine.call(lambda e: e.has_work())
        engine.idle = 0.0
        second = async_engine.submit(_request())
        assert await _count(first) + await _count(second) == 8


async def test_call_hands_back_results_and_errors(fakes):
    async with _running(fakes.Engine()) as async_engine:
        assert (await async_engine.call(lambda e: e.info()))["model"] == "fake"
        with pytest.raises(ValueError, match="bad"):
            await async_engine.call(lambda e: (_ for _ in ()).throw(ValueError("bad")))
