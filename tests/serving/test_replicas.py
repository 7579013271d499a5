"""Replicas: which one runs a request, the state of all, one that fails; and the shipped model twice in one server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jaxinfer.config import ConfigError, EngineConfig
from jaxinfer.engine import Engine
from jaxinfer.llm import LLM
from jaxinfer.request import EngineDeadError, FinishReason, QueueFullError, Request, RequestError, SamplingParams
from serving import client as api
from serving.async_engine import NotReadyError, State, TokenStream
from serving.client import AsyncClient, Client
from serving.grpc_server import GrpcServer, ServerConfig
from serving.replicas import BLOCK_TOKENS, PrefixIndex, ReplicaSet, block_keys, replica_devices

REPOSITORY = Path(__file__).parents[2]
MODEL = Path(__file__).parents[1] / "goldens" / "llama"
SMALL = EngineConfig(
    dtype="float32", max_num_seqs=2, max_model_len=64, max_num_batched_tokens=32, min_prefill_bucket=32, page_size=8
)
STATS = SimpleNamespace(num_running=1, num_waiting=0, generation_tokens=7, prompt_tokens=5, cached_prompt_tokens=2)
SYSTEM = tuple(range(64))  # a prompt that several requests begin with: four blocks


def _request(*prompt: int, max_tokens: int = 4, salt: str = "") -> Request:
    return Request("name", tuple(prompt) or (1, 2, 3), SamplingParams(max_tokens=max_tokens), cache_salt=salt)


def _engines(fakes, count: int = 2, **options):
    """Fake engines that have a page size and statistics, as the real one does."""
    engines = [fakes.Engine(**options) for _ in range(count)]
    for engine in engines:
        engine.config = dataclasses.replace(engine.config, page_size=BLOCK_TOKENS)
        engine.stats = lambda: STATS
    return engines


def _maker(outcome):
    """Makes the engine `outcome`, or raises it."""

    def make(progress):
        progress("a tensor")
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return make


@contextlib.asynccontextmanager
async def _running(engines, *, wait_ready: bool = True) -> AsyncIterator[ReplicaSet]:
    replicas = ReplicaSet([_maker(engine) for engine in engines])
    replicas.start()
    try:
        if wait_ready:
            await replicas.until_ready()
        yield replicas
    finally:
        for engine in engines:
            if not isinstance(engine, BaseException):
                engine.warm.set()
                engine.go.set()
        await replicas.stop()


async def _until(condition, *, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


async def _tokens(stream: TokenStream) -> list[int]:
    return [token async for event in stream for token in event.token_ids]


def _loads(replicas: ReplicaSet) -> list[int]:
    return [replica.num_open for replica in replicas._replicas]


def _hold(engines) -> None:
    """Steps wait from now on, so that requests stay open."""
    for engine in engines:
        engine.go.clear()


# ---- prefixes ----


def test_a_block_stands_for_everything_before_it():
    a, b = block_keys(range(64), "", 16), block_keys([99, *range(1, 64)], "", 16)
    assert len(a) == 4 and not set(a) & set(b)  # only the first token differs
    assert block_keys(range(79), "", 16) == a  # the last block is not full
    assert block_keys(range(64), "tenant", 16)[0] != a[0]
    assert block_keys(range(15), "", 16) == []


def test_the_longest_known_prefix_is_counted_in_blocks():
    index = PrefixIndex()
    index.add(block_keys(range(64), "", 16))
    assert index.match(block_keys(range(200), "", 16)) == 4
    assert index.match(block_keys([*range(40), 0, 0, *range(30)], "", 16)) == 2
    assert index.match(block_keys(range(1, 65), "", 16)) == 0
    assert index.match([]) == 0


def test_the_index_is_bounded_and_forgets_ends_before_beginnings():
    index = PrefixIndex(max_blocks=6)
    old, new = block_keys(range(64), "", 16), block_keys(range(100, 164), "", 16)
    index.add(old)
    index.add(new)
    assert len(index._blocks) == 6
    assert (index.match(old), index.match(new)) == (2, 4)


# ---- routing ----


@pytest.mark.asyncio
async def test_requests_without_a_known_prefix_are_spread(fakes):
    engines = _engines(fakes, 3)
    _hold(engines)
    async with _running(engines) as replicas:
        for i in range(9):
            replicas.submit(_request(i, i, max_tokens=1))
            assert max(_loads(replicas)) - min(_loads(replicas)) <= 1
        assert _loads(replicas) == [3, 3, 3]


@pytest.mark.asyncio
async def test_idle_replicas_take_turns(fakes):
    async with _running(_engines(fakes, 2)) as replicas:
        for i in range(4):
            await _tokens(replicas.submit(_request(i)))
        assert [replica.num_submitted for replica in replicas._replicas] == [2, 2]


@pytest.mark.asyncio
async def test_a_prompt_goes_where_its_beginning_went(fakes):
    engines = _engines(fakes, 2, slots=16)
    async with _running(engines) as replicas:
        first, second = replicas._replicas
        await _tokens(replicas.submit(_request(*SYSTEM, 1)))
        await _tokens(replicas.submit(_request(*reversed(SYSTEM), 1)))
        assert (first.num_submitted, second.num_submitted) == (1, 1)
        for i in range(5):
            await _tokens(replicas.submit(_request(*SYSTEM, i, i)))
        assert (first.num_submitted, second.num_submitted) == (6, 1)
        for i in range(5):
            await _tokens(replicas.submit(_request(*reversed(SYSTEM), i, i)))
        assert (first.num_submitted, second.num_submitted) == (6, 6)


@pytest.mark.asyncio
async def test_the_longer_prefix_wins(fakes):
    async with _running(_engines(fakes, 2, slots=16)) as replicas:
        first, second = replicas._replicas
        await _tokens(replicas.submit(_request(*SYSTEM)))
        second.prefixes.add(block_keys((*SYSTEM, *SYSTEM), "", BLOCK_TOKENS))
        await _tokens(replicas.submit(_request(*SYSTEM, *SYSTEM, 1)))
        assert (first.num_submitted, second.num_submitted) == (1, 1)


@pytest.mark.asyncio
async def test_another_salt_is_another_prefix(fakes):
    async with _running(_engines(fakes, 2)) as replicas:
        await _tokens(replicas.submit(_request(*SYSTEM, salt="a")))
        await _tokens(replicas.submit(_request(*SYSTEM, salt="b")))
        assert [replica.num_submitted for replica in replicas._replicas] == [1, 1]


@pytest.mark.asyncio
async def test_a_prefix_makes_no_replica_much_busier_than_the_others(fakes):
    engines = _engines(fakes, 2, slots=16)  # a quarter of the slots: four requests
    _hold(engines)
    async with _running(engines) as replicas:
        for i in range(40):
            replicas.submit(_request(*SYSTEM, i, max_tokens=1))
            assert abs(_loads(replicas)[0] - _loads(replicas)[1]) <= 5
        assert sum(_loads(replicas)) == 40 and min(_loads(replicas)) >= 17


@pytest.mark.asyncio
async def test_a_replica_whose_call_hangs_is_described_by_what_is_known(fakes, monkeypatch):
    monkeypatch.setattr("serving.replicas.INFO_S", 2.0)
    engines = _engines(fakes, 2)
    async with _running(engines) as replicas:
        engines[0].go.clear()
        engines[0].stepping.clear()
        stream = replicas._replicas[0].submit(_request(), [])
        assert await asyncio.to_thread(engines[0].stepping.wait, 10)
        found = await replicas.info()
        assert [entry.get("error") for entry in found["replicas"]] == ["no answer within 2 s", None]
        assert found["replicas"][0]["num_open"] == 1 and found["model"] == "fake"
        engines[0].go.set()
        await _tokens(stream)
        assert all("error" not in entry for entry in (await replicas.info())["replicas"])


@pytest.mark.asyncio
async def test_a_stuck_replica_gets_nothing_while_another_can(fakes):
    engines = _engines(fakes, 2)
    async with _running(engines) as replicas:
        engines[0].is_stuck = True
        for i in range(3):
            await _tokens(replicas.submit(_request(i)))
        assert [replica.num_submitted for replica in replicas._replicas] == [0, 3]
        assert not replicas.is_stuck
        engines[1].is_stuck = True
        assert replicas.is_stuck
        await _tokens(replicas.submit(_request()))


@pytest.mark.asyncio
async def test_a_full_replica_passes_requests_on(fakes):
    engines = _engines(fakes, 2, slots=1, max_queue=1)
    _hold(engines)
    async with _running(engines) as replicas:
        for i in range(4):
            replicas.submit(_request(i, max_tokens=1))
        assert _loads(replicas) == [2, 2]
        with pytest.raises(QueueFullError):
            replicas.submit(_request())


@pytest.mark.asyncio
async def test_a_request_that_no_replica_can_run_is_refused(fakes):
    async with _running(_engines(fakes, 2)) as replicas:
        with pytest.raises(RequestError, match="prompt"):
            replicas.submit(_request(fakes.VOCAB_SIZE))
        assert _loads(replicas) == [0, 0]


@pytest.mark.asyncio
async def test_answers_and_aborts_are_each_streams_own(fakes):
    engines = _engines(fakes, 2, pace_s=0.001)
    async with _running(engines) as replicas:
        requests = [_request(i, i + 1, max_tokens=3 + i) for i in range(8)]
        answers = await asyncio.gather(*(_tokens(replicas.submit(request)) for request in requests))
        assert answers == [fakes.expected_tokens(r, 0, r.sampling.max_tokens) for r in requests]
        _hold(engines)
        streams = [replicas.submit(_request(i, max_tokens=2)) for i in range(4)]
        replicas.abort(streams[1].request_id)
        replicas.abort("nobody")
        streams[2].close()
        for engine in engines:
            engine.go.set()
        reasons = [[event.finish_reason async for event in stream][-1:] for stream in streams]
        assert reasons == [[FinishReason.LENGTH], [FinishReason.ABORT], [], [FinishReason.LENGTH]]
        await _until(lambda: _loads(replicas) == [0, 0])
        await replicas.call(lambda engine: engine.check())


# ---- states ----


@pytest.mark.asyncio
async def test_ready_when_all_replicas_are(fakes):
    engines = _engines(fakes, 2)
    engines[1].warm.clear()
    async with _running(engines, wait_ready=False) as replicas:
        await _until(lambda: [r.engine.state for r in replicas._replicas] == [State.READY, State.WARMING])
        await _until(lambda: replicas.state is State.WARMING)
        with pytest.raises(NotReadyError):
            replicas.submit(_request())
        engines[1].warm.set()
        await replicas.until_ready()
        assert replicas.state is State.READY and replicas.error is None


@pytest.mark.asyncio
async def test_a_replica_that_cannot_be_made_fails_the_set(fakes):
    (engine,) = _engines(fakes, 1)
    async with _running([engine, ConfigError("too few devices")], wait_ready=False) as replicas:
        with pytest.raises(EngineDeadError, match="ConfigError"):
            await replicas.until_ready()
        assert replicas.state is State.DEAD and str(replicas.error) == "too few devices"
    assert replicas.state is State.DEAD  # also when the others have stopped


@pytest.mark.asyncio
async def test_one_dead_replica_ends_its_own_requests_only(fakes, caplog):
    engines = _engines(fakes, 2)
    _hold(engines)
    async with _running(engines) as replicas:
        streams = [replicas.submit(_request(i, max_tokens=3)) for i in range(4)]
        engines[0].step_error = ZeroDivisionError("found by the test")
        engines[0].go.set()
        outcomes = await asyncio.gather(_tokens(streams[0]), _tokens(streams[2]), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [EngineDeadError] * 2
        await _until(lambda: "1 of 2 go on" in caplog.text)
        assert replicas.state is State.READY and replicas.error is None
        engines[1].go.set()
        assert [len(await _tokens(stream)) for stream in (streams[1], streams[3])] == [3, 3]
        for i in range(3):
            assert len(await _tokens(replicas.submit(_request(i)))) == 4
        info = await replicas.info()
        assert [replica["state"] for replica in info["replicas"]] == ["dead", "ready"]
        assert info["replicas"][0]["error"] == "ZeroDivisionError" and info["model"] == "fake"


@pytest.mark.asyncio
async def test_dead_when_no_replica_is_left(fakes):
    engines = _engines(fakes, 2)
    async with _running(engines) as replicas:
        for engine in engines:
            engine.step_error = ZeroDivisionError("found by the test")
        for i in range(2):
            with pytest.raises(EngineDeadError):
                await _tokens(replicas.submit(_request(i)))
            await asyncio.sleep(0.01)
        await _until(lambda: replicas.state is State.DEAD)
        assert isinstance(replicas.error, ZeroDivisionError)
        with pytest.raises(EngineDeadError):
            replicas.submit(_request())
        with pytest.raises(EngineDeadError):
            await replicas.call(lambda engine: None)


@pytest.mark.asyncio
async def test_drain_lets_every_replica_finish_and_counts_what_was_aborted(fakes):
    engines = _engines(fakes, 2, pace_s=0.001)
    async with _running(engines) as replicas:
        short, endless = replicas.submit(_request(1, max_tokens=20)), replicas.submit(_request(2, max_tokens=1 << 20))
        draining = asyncio.create_task(replicas.drain(0.5))
        await replicas.next_state(State.READY)
        assert replicas.state is State.DRAINING
        with pytest.raises(NotReadyError):
            replicas.submit(_request())
        assert len(await _tokens(short)) == 20
        assert [event.finish_reason async for event in endless][-1] is FinishReason.ABORT
        assert await draining == 1
        assert await replicas.stop()
        assert replicas.state is State.STOPPED
        assert all(engine.closed.is_set() for engine in engines)


@pytest.mark.asyncio
async def test_info_says_how_each_replica_does(fakes):
    async with _running(_engines(fakes, 2)) as replicas:
        info = await replicas.info()
    assert info["model"] == "fake"
    assert [(r["state"], r["num_open"], r["cached_prompt_tokens"]) for r in info["replicas"]] == [("ready", 0, 2)] * 2


# ---- devices ----


def test_replicas_have_devices_of_their_own():
    taken = [replica_devices(i, 4, 2) for i in range(4)]
    assert [device for devices in taken for device in devices] == jax.devices()


@pytest.mark.parametrize(
    ("replicas", "size", "parts"),
    [(9, 1, ("replicas=9", "need 9 devices", "there are 8, enough for 8")),
     (3, 4, ("a mesh of 4 devices", "need 12", "there are 8, enough for 2")),
     (2, 16, ("need 32", "enough for none"))],
)  # fmt: skip
def test_too_few_devices_are_counted(replicas, size, parts):
    with pytest.raises(ConfigError) as caught:
        replica_devices(0, replicas, size)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_replicas_are_counted_from_one():
    with pytest.raises(ConfigError, match="replicas=0"):
        ServerConfig(replicas=0)


# ---- over the wire ----


@pytest.mark.asyncio
async def test_the_server_over_replicas(fakes):
    engines = _engines(fakes, 2)
    async with _running(engines) as replicas:
        server = GrpcServer(replicas, ServerConfig(port=0), model_name="fake")
        await server.start()
        async with AsyncClient(server.address) as client:
            await client.wait_ready(10)
            sampling = SamplingParams(max_tokens=5, temperature=0)
            results = await asyncio.gather(*(client.generate([i, i + 1], sampling) for i in range(8)))
            expected = [fakes.expected_tokens(_request(i, i + 1), 0, 5) for i in range(8)]
            assert [list(result.completions[0].token_ids) for result in results] == expected
            assert {replica.num_submitted for replica in replicas._replicas} == {4}
            engines[0].step_error = ZeroDivisionError("found by the test")
            calls = (client.generate([i], sampling) for i in range(4))
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            failed = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
            assert failed and all(isinstance(error, api.InternalError) for error in failed)
            assert {error.reason for error in failed} == {"ENGINE_DEAD"}
            assert (await client.generate([1], sampling)).usage.completion_tokens == 5
            await client.wait_ready(10)  # health: one replica is enough
            info = await client.model_info()
            assert [replica["state"] for replica in info.engine["replicas"]] == ["dead", "ready"]
        await server.stop()


@pytest.mark.asyncio
@pytest.mark.parametrize("mesh", ["", pytest.param("tensor=2", marks=pytest.mark.slow)])
async def test_two_replicas_of_a_real_engine_answer_as_one(mesh):
    config = dataclasses.replace(SMALL, mesh=mesh)
    size = config.mesh_sizes.num_devices
    makers = [lambda progress, i=i: Engine(MODEL, config, devices=replica_devices(i, 2, size)) for i in range(2)]
    prompts = [[i + 3, *range(5, 5 + 3 * i)] for i in range(8)]
    sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    replicas = ReplicaSet(makers)
    server = GrpcServer(replicas, ServerConfig(port=0), model_name="llama")
    await server.start()
    replicas.start()
    await replicas.until_ready()
    async with AsyncClient(server.address) as client:
        results = await asyncio.gather(*(client.generate(prompt, sampling) for prompt in prompts))
        info = await client.model_info()
    assert await replicas.drain(10) == 0
    await replicas.call(lambda engine: engine.check())
    assert await replicas.stop()
    await server.stop()
    first, second = info.engine["replicas"]
    assert first["generation_tokens"] == second["generation_tokens"] == 4 * 12
    assert first["device"] != second["device"]
    alone = LLM(MODEL, **dataclasses.asdict(SMALL)).generate(prompts, sampling, progress=False)
    answers = [list(result.completions[0].token_ids) for result in results]
    assert answers == [result.outputs[0].token_ids for result in alone]


@contextlib.contextmanager
def _server(*arguments: str, devices: int = 2):
    """`jaxinfer serve` of the shipped model on virtual devices, as a process; yields (process, what it printed)."""
    program = "import sys; from serving.cli import main; sys.exit(main(sys.argv[1:]))"
    flags = ["serve", "--port=0", "--json", "--dtype=float32", "--max-num-seqs=4", "--max-model-len=128"]
    flags += ["--max-num-batched-tokens=64", "--min-prefill-bucket=64"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-c", program, *flags, *arguments]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process, json.loads(process.stdout.readline() or '{"address": "127.0.0.1:1"}')
    finally:
        process.kill()
        process.communicate()


def _greedy(address: str) -> tuple[list[list[int]], dict]:
    """Tokens of a few prompts, asked at once, and what the server says of itself."""
    sampling = SamplingParams(max_tokens=24, temperature=0)
    prompts = ["def main():\n", "class Stack:\n", "import os\n", "for i in range(", "return None\n", "x = 1\n"]

    async def ask() -> list[api.GenerateResult]:
        async with AsyncClient(address) as client:
            await client.wait_ready(240)
            return await asyncio.gather(*(client.generate(prompt, sampling) for prompt in prompts))

    results = asyncio.run(ask())
    with Client(address) as client:
        info = client.model_info().engine
    return [list(result.completions[0].token_ids) for result in results], info


@pytest.mark.slow
def test_two_replicas_of_the_shipped_model_answer_as_one():
    with _server() as (_, alone):
        expected, info = _greedy(alone["address"])
    assert "replicas" not in info
    with _server("--replicas", "2") as (process, pair):
        answers, info = _greedy(pair["address"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, process.stderr.read()
    assert answers == expected and len(answers[0]) == 24
    first, second = info["replicas"]
    assert first["device"] != second["device"]
    assert first["generation_tokens"] and second["generation_tokens"]
    assert first["generation_tokens"] + second["generation_tokens"] == sum(map(len, answers))


def test_too_few_devices_end_the_server_with_the_numbers():
    with _server("--replicas", "3") as (process, _):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2, errors
        assert "replicas=3" in errors and "there are 2, enough for 2" in errors
