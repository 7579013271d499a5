"""The handlers of `jaxinfer.v1.Inference` over an `AsyncEngine` or a set of replicas.

Hides how a message becomes a request, the names that `Abort` knows, time limits, and that every exception leaves as a
typed status. Leaving a handler in any way (answered, cancelled, deadline, error) frees the request's slot.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
import json
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import Message

from jaxinfer.request import Request, RequestError, TokenLogprobs
from serving import errors, wire
from serving.async_engine import TokenStream
from serving.protos.jaxinfer.v1 import inference_pb2 as pb
from serving.protos.jaxinfer.v1 import inference_pb2_grpc
from serving.replicas import AnyEngine, ReplicaSet
from serving.tokenizing import TokenizerPool

Context = grpc.aio.ServicerContext

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["Inference"].full_name


def _answers[Answer: Message | None](
    handler: Callable[..., Awaitable[Answer]],
) -> Callable[..., Awaitable[Answer]]:
    """Run a handler within the server's limits: time where the caller set none, open calls, size of the answer.

    Its exceptions become statuses.
    """

    @functools.wraps(handler)
    async def answer(self: InferenceServicer, request: Message, context: Context) -> Answer:
        limit_s = self.request_timeout_s if context.time_remaining() is None else None
        timer = asyncio.timeout(limit_s)
        try:
            # Abort is what frees calls, so that it is never one too many.
            with contextlib.nullcontext() if isinstance(request, pb.AbortRequest) else self.counted(context.peer()):
                async with timer:
                    message = await handler(self, request, context)
            if message is not None and message.ByteSize() > self.max_answer_bytes:
                raise errors.AnswerTooLargeError(message.ByteSize(), self.max_answer_bytes)
            return message
        except Exception as error:
            if limit_s is not None and timer.expired():
                await errors.abort(context, errors.RequestTimeoutError(limit_s))
            await errors.abort(context, error)

    return answer


class _Running:
    """A request under the name that `Abort` knows; it may be aborted before it reached the engine."""

    def __init__(self, name: str):
        self.name = name
        self.aborted = False
        self.stream: TokenStream | None = None

    @property
    def finished(self) -> bool:
        return self.stream is not None and self.stream.finished


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """One served model. `request_timeout_s` limits calls that bring no deadline of their own.

    `max_open_calls` is per connection; `max_answer_bytes` is the largest message that may be sent.
    """

    def __init__(
        self,
        engine: AnyEngine,
        tokenizing: TokenizerPool,
        *,
        model_name: str,
        request_timeout_s: float,
        max_open_calls: int,
        max_answer_bytes: int,
    ):
        self._engine = engine
        self._tokenizing = tokenizing
        self._model_name = model_name
        self.request_timeout_s = request_timeout_s
        self.max_answer_bytes = max_answer_bytes
        self._max_open_calls = max_open_calls
        self._open_calls: Counter[str] = Counter()  # by connection
        self._running: dict[str, _Running] = {}
        self._info: dict[str, Any] | None = None

    # ---- the service ----

    @_answers
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        """Collect the stream of every completion into one answer."""
        async with self._submitted(request, one_answer=True) as (running, stream, num_completions):
            tally = wire.Tally(num_completions)
            parts = [_Parts() for _ in range(num_completions)]
            prompt_logprobs = None
            async for event in stream:
                tally.count(event)
                prompt_logprobs = prompt_logprobs or event.prompt_logprobs
                parts[event.index].add(event)
            if tally.failure is not None:
                raise errors.CompletionFailedError(tally.failure)
        completions = [part.message(index) for index, part in enumerate(parts)]
        return pb.GenerateResponse(
            request_id=running.name,
            completions=completions,
            usage=tally.usage(),
            prompt_logprobs=wire.prompt_logprobs_to_proto(prompt_logprobs),
        )

    @_answers
    async def GenerateStream(self, request: pb.GenerateRequest, context: Context) -> None:
        """Write each event as it comes; the first message has the prompt's numbers, the last the usage."""
        async with self._submitted(request) as (running, stream, num_completions):
            tally = wire.Tally(num_completions)
            first = True
            async for event in stream:
                tally.count(event)
                message = wire.chunk_to_proto(running.name, event)
                if first:
                    message.prompt.CopyFrom(tally.prompt())
                    first = False
                if tally.finished:
                    message.usage.CopyFrom(tally.usage())
                await context.write(message)
            if tally.failure is not None:
                raise errors.CompletionFailedError(tally.failure)

    @_answers
    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """Token ids of a text."""
        self._check_model(request)
        ids = await self._tokenizing.encode(
            self._engine.engine.tokenizer,
            request.text,
            add_special_tokens=not request.HasField("add_special_tokens") or request.add_special_tokens,
        )
        return pb.TokenizeResponse(token_ids=ids)

    @_answers
    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        """Text of token ids."""
        self._check_model(request)
        text = await self._tokenizing.decode(
            self._engine.engine.tokenizer,
            list(request.token_ids),
            vocab_size=self._engine.engine.model.vocab_size,
            skip_special_tokens=not request.HasField("skip_special_tokens") or request.skip_special_tokens,
        )
        return pb.DetokenizeResponse(text=text)

    @_answers
    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        """What is served."""
        self._check_model(request)
        engine = self._engine.engine
        if isinstance(self._engine, ReplicaSet):
            self._info = await self._engine.info()  # anew: how each replica does
        elif self._info is None:
            self._info = await self._engine.call(lambda e: e.info())
        return pb.GetModelInfoResponse(
            model=self._model_name,
            architecture=engine.model.architecture,
            vocab_size=engine.model.vocab_size,
            max_model_len=engine.max_model_len,
            has_tokenizer=engine.tokenizer is not None,
            bos_token_id=engine.model.bos_token_id,
            eos_token_ids=engine.model.eos_token_ids,
            dtype=engine.config.dtype,
            server_version=_version(),
            engine_json=json.dumps(self._info),
            chat_templates=() if engine.chat_template is None else engine.chat_template.names,
        )

    @_answers
    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        """End a running request by name; also while the server drains."""
        running = self._running.get(request.request_id)
        if running is None or running.finished:
            return pb.AbortResponse(aborted=False)
        running.aborted = True
        if running.stream is not None:
            self._engine.abort(running.stream.request_id)
        return pb.AbortResponse(aborted=True)

    # ---- shared by the handlers ----

    @contextlib.contextmanager
    def counted(self, connection: str) -> Iterator[None]:
        """One open call more on `connection`; TooManyCallsError when that is one too many."""
        if self._open_calls[connection] >= self._max_open_calls:
            raise errors.TooManyCallsError(self._max_open_calls)
        self._open_calls[connection] += 1
        try:
            yield
        finally:
            self._open_calls[connection] -= 1
            if not self._open_calls[connection]:
                del self._open_calls[connection]

    @contextlib.asynccontextmanager
    async def _submitted(
        self, message: pb.GenerateRequest, *, one_answer: bool = False
    ) -> AsyncIterator[tuple[_Running, TokenStream, int]]:
        """The message's request in the engine; however this is left, the request ends and its name is free.

        AnswerTooLargeError when `one_answer` must hold all of it, or one message of a stream the prompt's
        log-probabilities, and that could not be sent.
        """
        self._check_model(message)
        wire.check_names(message)
        name = message.request_id or uuid.uuid4().hex
        if name in self._running and not self._running[name].finished:
            raise errors.DuplicateRequestError(name)
        running = self._running[name] = _Running(name)
        try:
            request = await self._request(name, message)
            limit = self._engine.engine.max_model_len
            num_bytes = wire.min_answer_bytes(request, limit) if one_answer else wire.min_prompt_bytes(request)
            if num_bytes > self.max_answer_bytes:
                raise errors.AnswerTooLargeError(num_bytes, self.max_answer_bytes)
            async with self._engine.submit(request) as stream:
                running.stream = stream
                if running.aborted:
                    self._engine.abort(stream.request_id)
                yield running, stream, request.sampling.n
        finally:
            if self._running.get(name) is running:
                del self._running[name]

    async def _request(self, name: str, message: pb.GenerateRequest) -> Request:
        sampling = wire.sampling_from_proto(message.sampling)
        priority = wire.priority_from_proto(message)
        match message.WhichOneof("prompt"):
            case "text":
                special = not message.HasField("add_special_tokens") or message.add_special_tokens
                tokenizer = self._engine.engine.tokenizer
                prompt = await self._tokenizing.encode(tokenizer, message.text, add_special_tokens=special)
            case "token_ids":
                if message.HasField("add_special_tokens"):
                    raise RequestError("add_special_tokens", "is for a text prompt; token_ids are taken as they are")
                prompt = tuple(message.token_ids.ids)
            case "chat":
                if message.HasField("add_special_tokens"):
                    raise RequestError("add_special_tokens", "is for a text prompt; a chat template writes them itself")
                engine = self._engine.engine
                prompt = await self._tokenizing.encode_chat(engine.tokenizer, engine.chat_template, message.chat)
            case _:
                raise RequestError("prompt", "is missing; set text, token_ids or chat")
        return Request(name, prompt, sampling, priority, message.cache_salt)

    def _check_model(
        self, message: pb.GenerateRequest | pb.TokenizeRequest | pb.DetokenizeRequest | pb.GetModelInfoRequest
    ) -> None:
        self._engine.require_ready()
        if message.model and message.model != self._model_name:
            raise errors.ModelNotFoundError(message.model, self._model_name)


def _version() -> str:
    try:
        return importlib.metadata.version("jaxinfer")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


class _Parts:
    """The pieces of one completion, put together for a unary answer."""

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._finish_reason: pb.FinishReason = pb.FINISH_REASON_UNSPECIFIED
        self._error = ""

    def add(self, event: Any) -> None:
        self._token_ids.extend(event.token_ids)
        self._texts.append(event.text)
        self._logprobs.extend(event.logprobs or ())
        if event.finish_reason is not None:
            self._finish_reason = wire.finish_to_proto(event.finish_reason)
            self._error = event.error or ""

    def message(self, index: int) -> pb.Completion:
        return pb.Completion(
            index=index,
            token_ids=self._token_ids,
            text="".join(self._texts),
            logprobs=wire.logprobs_to_proto(self._logprobs),
            finish_reason=self._finish_reason,
            error=self._error,
        )
