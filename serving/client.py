"""Typed Python clients of `jaxinfer.v1.Inference`: `Client` (threads) and `AsyncClient` (asyncio).

Hides the stubs, the proto messages and gRPC's errors: calls take and return plain values and raise
`serving.errors.InferenceError`s. Imports no jax.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, TypedDict, Unpack

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxinfer.conversation import Conversation
from jaxinfer.request import FinishReason, Priority, RequestError, SamplingParams
from serving import wire
from serving.answers import Chunk, Completion, GenerateResult, ModelInfo, Usage, chunk_of, model_info_of, result_of
from serving.chat_wire import conversation_to_proto
from serving.errors import (
    AlreadyExistsError,
    BusyError,
    DeadlineError,
    FieldViolation,
    InferenceError,
    InternalError,
    InvalidRequestError,
    MessageTooLargeError,
    NotFoundError,
    RequestCancelledError,
    UnavailableError,
    exception_of,
    refusal_of,
)
from serving.protos.jaxinfer.v1 import inference_pb2 as pb
from serving.protos.jaxinfer.v1 import inference_pb2_grpc

__all__ = [
    "AlreadyExistsError",
    "AsyncClient",
    "BusyError",
    "Chunk",
    "Client",
    "Completion",
    "Conversation",
    "DeadlineError",
    "FieldViolation",
    "FinishReason",
    "GenerateResult",
    "InferenceError",
    "InternalError",
    "InvalidRequestError",
    "MessageTooLargeError",
    "ModelInfo",
    "NotFoundError",
    "Priority",
    "RequestCancelledError",
    "SamplingParams",
    "UnavailableError",
    "Usage",
]

DEFAULT_ADDRESS = "127.0.0.1:50051"
MAX_MESSAGE_BYTES = 16 * 2**20
RECONNECT_S = 0.1
LONGEST_S = 1e8  # three years; gRPC's clock overflows at a few hundred

Prompt = str | Sequence[int] | Conversation  # text, token ids, or messages for the model's chat template


class RequestOptions(TypedDict, total=False):
    """What `generate` and `stream` take beside prompt and sampling settings; the .proto says what each means."""

    model: str
    request_id: str
    priority: Priority
    cache_salt: str
    add_special_tokens: bool


class Client:
    """A synchronous client; safe to share between threads. A `timeout_s` of None leaves the limit to the server.

    Every method raises InferenceError when its call does not succeed; TypeError for what is no request at all.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, *, timeout_s: float | None = None):
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub: Any = inference_pb2_grpc.InferenceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls that run are cancelled."""
        self._channel.close()

    def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> GenerateResult:
        """Every completion of `prompt`, in full. `sampling=None` takes the server's defaults. Raises InferenceError."""
        request = _request(prompt, sampling, options)
        return result_of(self._call("Generate", request, timeout_s))

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Iterator[Chunk]:
        """Pieces of the completions as they are made; leaving the iterator cancels the request."""
        request = _request(prompt, sampling, options)
        call = self._begin(self._stub.GenerateStream, request, self._limit(timeout_s))
        try:
            for message in call:
                yield chunk_of(message)
        except grpc.RpcError as error:
            raise exception_of(error) from None
        finally:
            call.cancel()

    def tokenize(self, text: str, *, add_special_tokens: bool = True, timeout_s: float | None = None) -> list[int]:
        """Token ids of `text`."""
        request = _message(pb.TokenizeRequest, text=text, add_special_tokens=add_special_tokens)
        return list(self._call("Tokenize", request, timeout_s).token_ids)

    def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, timeout_s: float | None = None
    ) -> str:
        """Text of `token_ids`."""
        request = _message(pb.DetokenizeRequest, token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return self._call("Detokenize", request, timeout_s).text

    def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """What the server serves."""
        return model_info_of(self._call("GetModelInfo", pb.GetModelInfoRequest(), timeout_s))

    def abort(self, request_id: str, *, timeout_s: float | None = None) -> bool:
        """End a running request by its name; False when none has that name."""
        return self._call("Abort", _message(pb.AbortRequest, request_id=request_id), timeout_s).aborted

    def wait_ready(self, timeout_s: float = 120.0) -> None:
        """Return when the server takes requests; DeadlineError when it does not within `timeout_s`."""
        end = time.monotonic() + timeout_s
        while True:
            try:
                left_s = min(max(0.001, end - time.monotonic()), LONGEST_S)
                watch = self._begin(self._health.Watch, health_pb2.HealthCheckRequest(), left_s, wait_for_ready=True)
                if any(message.status == health_pb2.HealthCheckResponse.SERVING for message in watch):
                    watch.cancel()
                    return
            except grpc.RpcError as error:
                failure = exception_of(error)
                if not isinstance(failure, UnavailableError):
                    raise failure from None
            _require_time(end, timeout_s)
            time.sleep(RECONNECT_S)

    def _call(self, method: str, request: Any, timeout_s: float | None) -> Any:
        try:
            return self._begin(getattr(self._stub, method), request, self._limit(timeout_s))
        except grpc.RpcError as error:
            raise exception_of(error) from None

    def _begin(self, method: Callable[..., Any], request: Message, timeout_s: float | None, **options: Any) -> Any:
        try:
            return method(request, timeout=timeout_s, **options)
        except ValueError:
            raise _closed() from None

    def _limit(self, timeout_s: float | None) -> float | None:
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        return None if limit_s is None else min(limit_s, LONGEST_S)


class AsyncClient:
    """The same calls for asyncio. Cancelling the task that waits for a call cancels the request."""

    def __init__(self, address: str = DEFAULT_ADDRESS, *, timeout_s: float | None = None):
        self._timeout_s = timeout_s
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub: Any = inference_pb2_grpc.InferenceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls that run are cancelled."""
        await self._channel.close(None)

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> GenerateResult:
        """Every completion of `prompt`, in full. `sampling=None` takes the server's defaults. Raises InferenceError."""
        request = _request(prompt, sampling, options)
        return result_of(await self._call("Generate", request, timeout_s))

    async def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncIterator[Chunk]:
        """Pieces of the completions as they are made; closing the iterator cancels the request."""
        request = _request(prompt, sampling, options)
        call = self._begin(self._stub.GenerateStream, request, self._limit(timeout_s))
        try:
            async for message in call:
                yield chunk_of(message)
        except grpc.RpcError as error:
            raise exception_of(error) from None
        finally:
            call.cancel()

    async def tokenize(
        self, text: str, *, add_special_tokens: bool = True, timeout_s: float | None = None
    ) -> list[int]:
        """Token ids of `text`."""
        request = _message(pb.TokenizeRequest, text=text, add_special_tokens=add_special_tokens)
        return list((await self._call("Tokenize", request, timeout_s)).token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, timeout_s: float | None = None
    ) -> str:
        """Text of `token_ids`."""
        request = _message(pb.DetokenizeRequest, token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return (await self._call("Detokenize", request, timeout_s)).text

    async def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """What the server serves."""
        return model_info_of(await self._call("GetModelInfo", pb.GetModelInfoRequest(), timeout_s))

    async def abort(self, request_id: str, *, timeout_s: float | None = None) -> bool:
        """End a running request by its name; False when none has that name."""
        return (await self._call("Abort", _message(pb.AbortRequest, request_id=request_id), timeout_s)).aborted

    async def wait_ready(self, timeout_s: float = 120.0) -> None:
        """Return when the server takes requests; DeadlineError when it does not within `timeout_s`."""
        end = time.monotonic() + timeout_s
        while True:
            try:
                left_s = min(max(0.001, end - time.monotonic()), LONGEST_S)
                watch = self._begin(self._health.Watch, health_pb2.HealthCheckRequest(), left_s, wait_for_ready=True)
                async for message in watch:
                    if message.status == health_pb2.HealthCheckResponse.SERVING:
                        watch.cancel()
                        return
            except grpc.RpcError as error:
                failure = exception_of(error)
                if not isinstance(failure, UnavailableError):
                    raise failure from None
            _require_time(end, timeout_s)
            await asyncio.sleep(RECONNECT_S)

    async def _call(self, method: str, request: Any, timeout_s: float | None) -> Any:
        try:
            return await self._begin(getattr(self._stub, method), request, self._limit(timeout_s))
        except grpc.RpcError as error:
            raise exception_of(error) from None

    def _begin(self, method: Callable[..., Any], request: Message, timeout_s: float | None, **options: Any) -> Any:
        try:
            return method(request, timeout=timeout_s, **options)
        except grpc.aio.UsageError:
            raise _closed() from None

    def _limit(self, timeout_s: float | None) -> float | None:
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        return None if limit_s is None else min(limit_s, LONGEST_S)


_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),  # a connection per client
    ("grpc.max_reconnect_backoff_ms", 1000),
]


def _request(prompt: Prompt, sampling: SamplingParams | None, options: RequestOptions) -> pb.GenerateRequest:
    known = RequestOptions.__annotations__
    for name in options:
        if name not in known:
            raise TypeError(f"unknown option {name!r}; the options are timeout_s, {', '.join(known)}")
    if isinstance(prompt, (bytes, bytearray, memoryview)) or prompt is None:
        raise TypeError(f"a prompt is text, a sequence of token ids or a Conversation, not {type(prompt).__name__}")
    try:
        fields = _prompt_fields(prompt)
        priority = wire.priority_to_proto(options.get("priority", Priority.ONLINE))
        fields["sampling"] = None if sampling is None else wire.sampling_to_proto(sampling)
    except RequestError as error:
        raise refusal_of(error) from None
    return _message(pb.GenerateRequest, **{**options, **fields, "priority": priority})


def _prompt_fields(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, Conversation):
        return {"chat": conversation_to_proto(prompt)}
    return {"text": prompt} if isinstance(prompt, str) else {"token_ids": {"ids": prompt}}


def _message[Kind: Message](kind: type[Kind], **fields: Any) -> Kind:
    try:
        return wire.message_of(kind, **fields)
    except RequestError as error:
        raise refusal_of(error) from None


def _closed() -> RequestCancelledError:
    return RequestCancelledError("this client was closed", grpc.StatusCode.CANCELLED)


def _require_time(end: float, timeout_s: float) -> None:
    if time.monotonic() >= end:
        raise DeadlineError(f"the server was not ready within {timeout_s:g} s", grpc.StatusCode.DEADLINE_EXCEEDED)
