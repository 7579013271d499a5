"""The wire against an engine whose steps the test releases: statuses, details, health, deadlines, cancellation."""

from __future__ import annotations

import asyncio
import threading

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxinfer.config import ConfigError
from jaxinfer.request import FinishReason, Priority, SamplingParams
from serving import client as api
from serving.async_engine import State
from serving.client import AsyncClient
from serving.grpc_server import ServerConfig
from serving.protos.jaxinfer.v1 import inference_pb2 as pb
from serving.protos.jaxinfer.v1 import inference_pb2_grpc

pytestmark = pytest.mark.asyncio
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE = "jaxinfer.v1.Inference"
SERVICES = (pb.DESCRIPTOR.services_by_name["Inference"], health_pb2.DESCRIPTOR.services_by_name["Health"])
PATHS = [f"{service.full_name}/{method.name}" for service in SERVICES for method in service.methods]


def _message(*ids: int, **sampling) -> pb.GenerateRequest:
    sampling.setdefault("max_tokens", 4)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids or (1, 2, 3)), sampling=pb.SamplingParams(**sampling))


def _stub(channel):
    return inference_pb2_grpc.InferenceStub(channel)


async def _failure(call) -> tuple[grpc.aio.AioRpcError, dict[str, object]]:
    """The error of a call that must fail, and its google.rpc details by message name."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    trailers = dict(caught.value.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b""))
    details: dict[str, object] = {"pushback": trailers.get("grpc-retry-pushback-ms")}
    for item in status.details:
        name = item.type_url.rsplit(".", 1)[1]
        detail = getattr(error_details_pb2, name)()
        assert item.Unpack(detail)
        details[name] = detail
    return caught.value, details


async def _until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


async def test_unary_and_stream_say_the_same(fakes, serving):
    async with serving(fakes.Engine()) as server, grpc.aio.insecure_channel(server.address) as channel:
        message = _message(4, 5, max_tokens=6, n=2, logprobs=True, top_logprobs=1)
        answer = await _stub(channel).Generate(message)
        chunks = [chunk async for chunk in _stub(channel).GenerateStream(message)]
    for index, completion in enumerate(answer.completions):
        mine = [c for c in chunks if c.index == index]
        assert completion.index == index
        assert [t for c in mine for t in c.token_ids] == list(completion.token_ids)
        assert len(completion.token_ids) == len(completion.logprobs) == 6
        assert "".join(c.text for c in mine) == completion.text
        assert mine[-1].finish_reason == completion.finish_reason == pb.FINISH_REASON_LENGTH
        assert completion.logprobs[0].top[0].token_id == completion.token_ids[0]
    assert [c.HasField("prompt") for c in chunks] == [True] + [False] * (len(chunks) - 1)
    assert [c.HasField("usage") for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage == answer.usage == pb.Usage(prompt_tokens=2, completion_tokens=12, total_tokens=14)
    assert chunks[0].prompt.num_tokens == 2
    assert len({c.request_id for c in chunks}) == 1 and chunks[0].request_id != answer.request_id != ""


async def test_unset_fields_mean_our_defaults(fakes, serving):
    engine = fakes.Engine()
    seen = []
    original = engine.add
    engine.add = lambda request: (seen.append(request), original(request))[1]
    async with serving(engine) as server, grpc.aio.insecure_channel(server.address) as channel:
        await _stub(channel).Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[9])))
        await _stub(channel).Generate(pb.GenerateRequest(text="ab"))
        await _stub(channel).Generate(
            pb.GenerateRequest(text="ab", add_special_tokens=False, priority=pb.PRIORITY_BATCH)
        )
    assert [r.sampling for r in seen] == [SamplingParams()] * 3
    assert [r.prompt_token_ids for r in seen] == [(9,), (1, 97, 98), (97, 98)]
    assert [r.priority for r in seen] == [Priority.ONLINE, Priority.ONLINE, Priority.BATCH]


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.GenerateRequest(), "prompt"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "prompt"),
        (_message(128), "token_ids"),
        (_message(2**32 - 1), "token_ids"),
        (_message(*range(64)), "prompt"),
        (_message(top_p=0.0), "sampling.top_p"),
        (_message(top_p=float("nan")), "sampling.top_p"),
        (_message(temperature=-1.0), "sampling.temperature"),
        (_message(max_tokens=0), "sampling.max_tokens"),
        (_message(max_tokens=-1), "sampling.max_tokens"),
        (_message(max_tokens=4, no_max_tokens=True), "sampling.no_max_tokens"),
        (_message(n=10_000_000), "sampling.n"),
        (_message(logprobs=True, top_logprobs=10_000), "sampling.top_logprobs"),
        (_message(top_logprobs=1), "sampling.top_logprobs"),
        (_message(stop=["x"] * 1000), "sampling.stop"),
        (_message(stop=["\N{SNOWMAN}" * 100_000]), "sampling.stop"),
        (_message(stop_token_ids=[4000]), "sampling.stop_token_ids"),
        (_message(logit_bias={5000: 1.0}), "sampling.logit_bias"),
        (_message(logit_bias={5: 1e9}), "sampling.logit_bias[5]"),
        (_message(allowed_token_ids=pb.TokenIds()), "sampling.allowed_token_ids"),
        (_message(seed=-5), "sampling.seed"),
        (pb.GenerateRequest(text="x" * 2000), "text"),
        (pb.GenerateRequest(text="x", priority=7), "priority"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), add_special_tokens=True), "add_special_tokens"),
        (pb.GenerateRequest(text="x", request_id="r" * 1000), "request_id"),
        (pb.GenerateRequest(text="x", cache_salt="r" * 5000), "cache_salt"),
    ],
)
async def test_bad_requests_name_their_field(fakes, serving, message, field):
    engine = fakes.Engine(max_model_len=64)
    async with serving(engine, max_prompt_chars=1000) as server, grpc.aio.insecure_channel(server.address) as channel:
        for call in (_stub(channel).Generate(message), _stub(channel).GenerateStream(message).read()):
            error, details = await _failure(call)
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            (violation,) = details["BadRequest"].field_violations
            assert violation.field == field
            assert violation.description and violation.description in error.details()
        good = await _stub(channel).Generate(_message())
    assert len(good.completions[0].token_ids) == 4


async def test_queue_full_says_when_to_retry(fakes, serving):
    engine = fakes.Engine(slots=1, max_queue=1)
    async with serving(engine) as server, AsyncClient(server.address) as client:
        engine.go.clear()
        first = asyncio.create_task(client.generate([1], SamplingParams(max_tokens=2)))
        await asyncio.to_thread(engine.stepping.wait, 10)
        second = asyncio.create_task(client.generate([1], SamplingParams(max_tokens=2)))
        await _until(lambda: len(server.engine._streams) == 2)
        async with grpc.aio.insecure_channel(server.address) as channel:
            error, details = await _failure(_stub(channel).Generate(_message()))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details["RetryInfo"].retry_delay.ToMilliseconds() == int(details["pushback"]) == 1000
        with pytest.raises(api.BusyError) as caught:
            await client.generate([1])
        assert caught.value.retry_after_s == 1.0
        engine.go.set()
        assert [len((await task).completions[0].token_ids) for task in (first, second)] == [2, 2]


async def test_while_loading_the_port_is_open_and_calls_are_unavailable(fakes, serving):
    engine = fakes.Engine()
    engine.warm.clear()
    async with serving(engine, wait_ready=False) as server, grpc.aio.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            assert (await health.Check(health_pb2.HealthCheckRequest(service=service))).status == NOT_SERVING
        calls = [
            _stub(channel).Generate(_message()),
            _stub(channel).GenerateStream(_message()).read(),
            _stub(channel).Tokenize(pb.TokenizeRequest(text="x")),
            _stub(channel).Detokenize(pb.DetokenizeRequest(token_ids=[1])),
            _stub(channel).GetModelInfo(pb.GetModelInfoRequest()),
        ]
        for call in calls:
            error, details = await _failure(call)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert details["RetryInfo"].retry_delay.ToMilliseconds() > 0
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == NOT_SERVING
        async with AsyncClient(server.address) as client:
            ready = asyncio.create_task(client.wait_ready(30))
            await asyncio.sleep(0)
            assert not ready.done()
            engine.warm.set()
            assert (await watch.read()).status == SERVING
            await ready
            assert (await client.generate([1], SamplingParams(max_tokens=3))).usage.completion_tokens == 3
        draining = asyncio.create_task(server.engine.drain(10))
        assert (await watch.read()).status == NOT_SERVING
        await draining
        error, details = await _failure(_stub(channel).Generate(_message()))
        assert error.code() is grpc.StatusCode.UNAVAILABLE and details["RetryInfo"].retry_delay.ToMilliseconds() > 0
        await server.engine.stop()
        assert await watch.read() is grpc.aio.EOF


async def test_unknown_health_services(fakes, serving):
    async with serving(fakes.Engine()) as server, grpc.aio.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        error, _ = await _failure(health.Check(health_pb2.HealthCheckRequest(service="other")))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        unknown = await health.Watch(health_pb2.HealthCheckRequest(service="other")).read()
        assert unknown.status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def test_a_watcher_that_leaves_does_not_silence_the_others(fakes, serving):
    async with serving(fakes.Engine()) as server, grpc.aio.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
        for watch in watches:
            assert (await watch.read()).status == SERVING
        watches[0].cancel()
        await server.engine.drain(10)
        for watch in watches[1:]:
            assert (await watch.read()).status == NOT_SERVING


async def test_another_model_is_not_found(fakes, serving):
    async with serving(fakes.Engine()) as server, AsyncClient(server.address) as client:
        with pytest.raises(api.NotFoundError, match="'other' is not served here; the served model is 'fake'"):
            await client.generate([1], model="other")
        assert (await client.generate([1], SamplingParams(max_tokens=1), model="fake")).usage.total_tokens == 2


async def test_the_callers_deadline_frees_the_slot(fakes, serving):
    engine = fakes.Engine(max_model_len=1 << 30)
    async with serving(engine) as server, AsyncClient(server.address) as client:
        with pytest.raises(api.DeadlineError):
            await client.generate([1], SamplingParams(max_tokens=None), timeout_s=0.2)
        await _until(lambda: not server.engine._streams)
        await server.engine.call(lambda e: e.check())


async def test_the_servers_limit_holds_for_calls_without_a_deadline(fakes, serving):
    engine = fakes.Engine(max_model_len=1 << 30)
    async with serving(engine, request_timeout_s=0.2) as server, AsyncClient(server.address) as client:
        with pytest.raises(api.DeadlineError, match=r"limit of 0\.2 s"):
            await client.generate([1], SamplingParams(max_tokens=None))
        chunks = []
        with pytest.raises(api.DeadlineError, match=r"limit of 0\.2 s"):
            async for chunk in client.stream([1], SamplingParams(max_tokens=None)):
                chunks.append(chunk)
        assert chunks
        await _until(lambda: not server.engine._streams)
        await server.engine.call(lambda e: e.check())


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_cancelling_frees_the_slot(fakes, serving, method):
    engine = fakes.Engine(max_model_len=1 << 30)
    async with serving(engine) as server, grpc.aio.insecure_channel(server.address) as channel:
        message = _message()
        message.sampling.ClearField("max_tokens")
        message.sampling.no_max_tokens = True
        call = getattr(_stub(channel), method)(message)
        await _until(lambda: engine.num_steps > 0)
        call.cancel()
        await _until(lambda: not server.engine._streams)
        assert len(engine.aborted) == 1
        await server.engine.call(lambda e: e.check())


async def test_cancelling_while_the_prompt_is_tokenized_reaches_no_engine(fakes, serving):
    engine = fakes.Engine()
    started, release = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def encode(text, *, add_special_tokens):
        loop.call_soon_threadsafe(started.set)
        assert release.wait(10)
        return [1]

    engine.tokenizer.encode = encode
    async with serving(engine) as server, grpc.aio.insecure_channel(server.address) as channel:
        call = _stub(channel).Generate(pb.GenerateRequest(text="x", request_id="name"))
        await started.wait()
        other = await _stub(channel).Generate(_message())  # the event loop and the engine are free meanwhile
        assert len(other.completions[0].token_ids) == 4
        call.cancel()
        await _name_is_free(channel, "name")  # the handler has ended, although the tokenizer has not
        release.set()
        assert not server.engine._streams and engine.aborted == []


async def _name_is_free(channel, name: str) -> None:
    message = _message()
    message.request_id = name
    async with asyncio.timeout(10):
        while True:
            try:
                await _stub(channel).Generate(message)
                return
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.ALREADY_EXISTS


async def test_abort_by_name(fakes, serving):
    engine = fakes.Engine(max_model_len=1 << 30)
    async with serving(engine) as server, AsyncClient(server.address) as client:
        assert not await client.abort("mine")
        chunks = []
        async for chunk in client.stream([1], SamplingParams(max_tokens=None, n=2), request_id="mine"):
            if not chunks:
                with pytest.raises(api.AlreadyExistsError, match="'mine'"):
                    await client.generate([2], request_id="mine")
                assert await client.abort("mine")
            chunks.append(chunk)
        assert {c.request_id for c in chunks} == {"mine"}
        assert [c.finish_reason for c in chunks[-2:]] == [FinishReason.ABORT] * 2
        assert chunks[-1].usage is not None
        assert not await client.abort("mine")
        again = await client.generate([2], SamplingParams(max_tokens=1), request_id="mine")
        assert again.request_id == "mine"


async def test_a_request_named_by_the_server_can_be_aborted(fakes, serving):
    async with serving(fakes.Engine(max_model_len=1 << 30)) as server, AsyncClient(server.address) as client:
        reasons = []
        async for chunk in client.stream([1], SamplingParams(max_tokens=None)):
            if not reasons:
                assert await client.abort(chunk.request_id)
            reasons.append(chunk.finish_reason)
        assert reasons[-1] is FinishReason.ABORT


async def test_a_dead_engine_answers_and_is_not_serving(fakes, serving):
    engine = fakes.Engine()
    async with serving(engine) as server, grpc.aio.insecure_channel(server.address) as channel:
        engine.step_error = RuntimeError("/secret/path")
        for _ in range(2):  # the request in flight, and one that comes later
            error, details = await _failure(_stub(channel).Generate(_message()))
            assert error.code() is grpc.StatusCode.INTERNAL
            assert (details["ErrorInfo"].reason, details["ErrorInfo"].domain) == ("ENGINE_DEAD", "jaxinfer")
            assert "secret" not in error.details()
        check = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert check.status == NOT_SERVING and server.engine.state is State.DEAD


async def test_an_unforeseen_error_is_internal_and_tells_nothing(fakes, serving, caplog):
    engine = fakes.Engine()
    async with serving(engine) as server, grpc.aio.insecure_channel(server.address) as channel:
        engine.add_error = KeyError("/secret/path")
        error, details = await _failure(_stub(channel).Generate(_message()))
        assert error.code() is grpc.StatusCode.INTERNAL
        incident = details["ErrorInfo"].metadata["incident"]
        assert incident in error.details() and "secret" not in error.details()
        assert incident in caplog.text and "KeyError" in caplog.text
        engine.add_error = None
        assert (await _stub(channel).Generate(_message())).usage.completion_tokens == 4


async def test_failed_completions_end_the_call_with_internal(fakes, serving):
    engine = fakes.Engine()
    engine.completion_error = "NaN logits"
    async with serving(engine) as server, AsyncClient(server.address) as client:
        with pytest.raises(api.InternalError, match="NaN logits") as caught:
            await client.generate([1])
        assert caught.value.reason == "COMPLETION_FAILED"
        chunks = []
        with pytest.raises(api.InternalError, match="NaN logits"):
            async for chunk in client.stream([1]):
                chunks.append(chunk)
        assert (chunks[-1].finish_reason, chunks[-1].error) == (FinishReason.ERROR, "NaN logits")


async def test_messages_over_the_limit_are_refused(fakes, serving):
    async with serving(fakes.Engine(), max_message_bytes=4096) as server, AsyncClient(server.address) as client:
        with pytest.raises(api.MessageTooLargeError, match="larger than max"):
            await client.generate("x" * 5000)
        assert (await client.generate("x", SamplingParams(max_tokens=1))).usage.completion_tokens == 1


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(max_tokens=4000, n=2), SamplingParams(max_tokens=40, n=2, logprobs=True, top_logprobs=20)],
)
async def test_an_answer_that_cannot_fit_is_refused_before_any_work(fakes, serving, sampling):
    engine = fakes.Engine()
    async with serving(engine, max_message_bytes=4096) as server, AsyncClient(server.address) as client:
        with pytest.raises(api.MessageTooLargeError, match="over the limit of 4096 per message; use Gen") as caught:
            await client.generate([1, 2], sampling)
        assert caught.value.retry_after_s is None and engine.num_steps == 0
        num_tokens = [len(chunk.token_ids) async for chunk in client.stream([1, 2], sampling)]
        assert sum(num_tokens) == 2 * sampling.max_tokens


async def test_an_answer_that_does_not_fit_is_told_as_such(fakes, serving):
    engine = fakes.Engine()
    engine.tokenizer.encode = lambda text, *, add_special_tokens: [100] * 5000
    async with serving(engine, max_message_bytes=4096) as server, AsyncClient(server.address) as client:
        with pytest.raises(api.MessageTooLargeError, match="limit of 4096") as caught:
            await client.tokenize("x")
        assert caught.value.reason == "MESSAGE_TOO_LARGE"


async def test_calls_over_the_limit_of_a_connection_are_told_when_to_retry(fakes, serving):
    engine = fakes.Engine(max_model_len=1 << 30)
    engine.go.clear()
    sampling = SamplingParams(max_tokens=1)
    async with serving(engine, max_concurrent_streams=3) as server, AsyncClient(server.address) as client:
        calls = [
            asyncio.create_task(client.generate([1], sampling, request_id=f"{i}")) for i in range(1600)
        ]  # more than gRPC lets wait by itself
        await _until(lambda: sum(call.done() for call in calls) == 1597)
        for call in calls:
            if call.done():
                assert isinstance(call.exception(), api.BusyError) and call.exception().retry_after_s == 1.0
        with pytest.raises(api.BusyError, match="3 open calls"):
            await client.model_info()
        await client.wait_ready(10)  # health and Abort have no such limit
        assert await client.abort(next(str(i) for i, call in enumerate(calls) if not call.done()))
        async with AsyncClient(server.address) as other:
            assert await other.tokenize("a") == [1, 97]
        engine.go.set()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [isinstance(outcome, api.GenerateResult) for outcome in outcomes].count(True) == 3
        await client.generate([1], sampling)


@pytest.mark.parametrize("path", PATHS)
async def test_bytes_that_are_no_message_are_invalid(fakes, serving, path, caplog):
    async with serving(fakes.Engine()) as server, grpc.aio.insecure_channel(server.address) as channel:
        error, details = await _failure(channel.unary_unary(f"/{path}")(b"\xff\xff"))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and "2 bytes are no" in error.details()
    assert details["BadRequest"].field_violations[0].field == "message"
    assert not caplog.records


async def test_tokenize_detokenize_and_model_info(fakes, serving):
    async with serving(fakes.Engine()) as server, AsyncClient(server.address) as client:
        assert await client.tokenize("ab") == [1, 97, 98]
        assert await client.tokenize("ab", add_special_tokens=False) == [97, 98]
        assert await client.detokenize([97, 98]) == "ab"
        with pytest.raises(api.InvalidRequestError, match="vocabulary"):
            await client.detokenize([fakes.VOCAB_SIZE])
        info = await client.model_info()
        assert (info.model, info.vocab_size, info.has_tokenizer, info.dtype) == ("fake", 128, True, "float32")
        assert info.engine == {"model": "fake", "vocab_size": 128}


async def test_a_model_without_a_tokenizer_takes_ids_alone(fakes, serving):
    async with serving(fakes.Engine(tokenizer=False)) as server, AsyncClient(server.address) as client:
        assert (await client.generate([1], SamplingParams(max_tokens=2))).usage.completion_tokens == 2
        for call in (client.generate("text"), client.tokenize("text"), client.detokenize([1])):
            with pytest.raises(api.InvalidRequestError, match="no tokenizer"):
                await call
        assert not (await client.model_info()).has_tokenizer


async def test_tokenization_has_a_bound(fakes, serving):
    engine = fakes.Engine()
    release = threading.Event()
    engine.tokenizer.encode = lambda text, *, add_special_tokens: [1] if release.wait(10) else []
    options = {"tokenizer_threads": 1, "max_concurrent_streams": 2}
    async with serving(engine, **options) as server, AsyncClient(server.address) as client:
        waiting = [asyncio.create_task(client.tokenize("x")) for _ in range(2)]
        await _until(lambda: server.server._tokenizing._num_pending == 2)
        async with AsyncClient(server.address) as other:
            with pytest.raises(api.BusyError):
                await other.tokenize("x")
        release.set()
        assert await asyncio.gather(*waiting) == [[1], [1]]


async def test_reflection_is_behind_a_flag(fakes, serving):
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async def services(address: str) -> list[str]:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
            return [s.name for s in (await call.read()).list_services_response.service]

    async with serving(fakes.Engine(), reflection=True) as server:
        assert SERVICE in await services(server.address)
    async with serving(fakes.Engine()) as server:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services(server.address)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_taken_port_is_a_clear_error(fakes, serving):
    async with serving(fakes.Engine()) as server:
        with pytest.raises(ConfigError, match="port in use"):
            async with serving(fakes.Engine(), port=server.server.port):
                pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org", ""])
async def test_only_loopback_addresses_are_bound(host):
    with pytest.raises(ConfigError, match=r"loopback.*--insecure"):
        ServerConfig(host=host)


async def test_an_empty_host_is_refused_all_the_same():
    with pytest.raises(ConfigError, match="host=''"):
        ServerConfig(host="", insecure=True)


async def test_insecure_binds_any_address_and_says_so(fakes, serving, caplog):
    async with serving(fakes.Engine(), host="0.0.0.0", insecure=True) as server:
        assert server.address == f"0.0.0.0:{server.server.port}"
        (warning,) = [record.getMessage() for record in caplog.records]
        assert "host=0.0.0.0" in warning and "without TLS and authentication" in warning
        async with AsyncClient(f"127.0.0.1:{server.server.port}") as client:
            assert await client.tokenize("a") == [1, 97]


async def test_insecure_on_loopback_is_no_reason_to_warn(fakes, serving, caplog):
    async with serving(fakes.Engine(), insecure=True):
        assert not caplog.records


@pytest.mark.parametrize(
    "options",
    [
        {"port": -1},
        {"port": 70000},
        {"max_message_bytes": 2**30},
        {"request_timeout_s": 0.0},
        {"drain_s": float("nan")},
        {"max_concurrent_streams": 0},
        {"max_concurrent_streams": 99_999_999_999},
        {"max_connection_age_s": -1.0},
        {"max_connection_age_s": float("inf")},
        {"max_connection_age_s": 1e30},
        {"served_model_name": ""},
    ],
)
async def test_server_options_are_checked(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        ServerConfig(**options)
