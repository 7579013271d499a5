"""A fake engine whose steps the test releases one by one, and an in-process server around it or around a real one."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxinfer.config import EngineConfig, LayerSpec, ModelConfig, NormSpec
from jaxinfer.request import FinishReason, QueueFullError, Request, TokenEvent, TokenLogprobs
from serving.async_engine import AsyncEngine
from serving.grpc_server import GrpcServer, ServerConfig

VOCAB_SIZE = 128
MODEL = ModelConfig("fake", VOCAB_SIZE, 8, 8, 2, 1, 4, NormSpec(1e-5), True, 1 << 20, (LayerSpec(),), None, ())


class FakeTokenizer:
    """One token per ASCII character."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return ([1] if add_special_tokens else []) + [ord(c) % VOCAB_SIZE for c in text]

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(i) for i in ids)


def expected_tokens(request: Request, index: int, count: int) -> list[int]:
    """What FakeEngine generates."""
    start = sum(request.prompt_token_ids) + 7 * index
    return [(start + 3 * i) % VOCAB_SIZE for i in range(count)]


class FakeEngine:
    """`Engine`'s interface: `slots` requests run, each step gives each one token. `go` cleared holds steps back."""

    def __init__(
        self,
        *,
        slots: int = 4,
        max_queue: int = 1024,
        max_model_len: int = 4096,
        tokenizer: bool = True,
        pace_s: float = 0.0,
    ):
        self.config = EngineConfig(max_num_seqs=slots, max_queue=max_queue, dtype="float32")
        self.model = MODEL
        self.model_dir = Path("fake")
        self.tokenizer = FakeTokenizer() if tokenizer else None
        self.chat_template = None
        self.max_model_len = max_model_len
        self.warm = threading.Event()
        self.warm.set()
        self.go = threading.Event()
        self.go.set()
        self.stepping = threading.Event()  # a step has begun
        self.step_error: BaseException | None = None
        self.add_error: Exception | None = None
        self.completion_error: str | None = None
        self.idle = 0.0
        self.is_stuck = False
        self.pace_s = pace_s  # how long a step takes
        self.num_steps = 0
        self.aborted: list[str] = []
        self.closed = threading.Event()
        self._waiting: deque[Request] = deque()
        self._running: dict[str, tuple[Request, int]] = {}
        self._ended: list[TokenEvent] = []

    def warm_up(self, progress: Any = None) -> None:
        assert self.warm.wait(30)

    def check_request(self, request: Request) -> None:
        request.check(
            vocab_size=VOCAB_SIZE,
            max_model_len=self.max_model_len,
            eos_token_ids=(),
            has_tokenizer=self.tokenizer is not None,
        )

    def add(self, request: Request) -> None:
        if self.add_error is not None:
            raise self.add_error
        self.check_request(request)
        if len(self._waiting) >= self.config.max_queue:
            raise QueueFullError(self.config.max_queue, 2.5)
        self._waiting.append(request)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        found = [r for r in self._waiting if r.request_id == request_id]
        for request in found:
            self._waiting.remove(request)
        running = self._running.pop(request_id, None)
        requests = [(r, 0) for r in found] + ([running] if running else [])
        for request, count in requests:
            for index in range(request.sampling.n):
                self._ended.append(self._event(request, index, (), count, FinishReason.ABORT))

    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._ended)

    def idle_s(self) -> float:
        return self.idle

    def step(self) -> list[TokenEvent]:
        self.stepping.set()
        assert self.go.wait(30)
        if self.step_error is not None:
            raise self.step_error
        time.sleep(self.pace_s)
        self.num_steps += 1
        events, self._ended = self._ended, []
        while self._waiting and len(self._running) < self.config.max_num_seqs:
            request = self._waiting.popleft()
            self._running[request.request_id] = (request, 0)
        for key, (request, count) in list(self._running.items()):
            count += 1
            last = count >= (request.sampling.max_tokens or self.max_model_len)
            reason = FinishReason.LENGTH if last else None
            if self.completion_error is not None:
                reason = FinishReason.ERROR
            for index in range(request.sampling.n):
                token = expected_tokens(request, index, count)[-1]
                events.append(self._event(request, index, (token,), count, reason))
            if reason is None:
                self._running[key] = (request, count)
            else:
                del self._running[key]
        return events

    def check(self) -> None:
        assert not self.has_work(), f"leaked: {self._waiting} {self._running}"

    def info(self) -> dict[str, Any]:
        return {"model": "fake", "vocab_size": VOCAB_SIZE}

    def close(self) -> None:
        self.closed.set()

    def _event(
        self, request: Request, index: int, ids: tuple[int, ...], count: int, reason: FinishReason | None
    ) -> TokenEvent:
        return TokenEvent(
            request_id=request.request_id,
            index=index,
            token_ids=ids,
            text="".join(chr(i) for i in ids),
            logprobs=tuple(TokenLogprobs(-0.5, ((i, -0.5),)) for i in ids) if request.sampling.logprobs else None,
            finish_reason=reason,
            error=self.completion_error if reason is FinishReason.ERROR else None,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_cached_tokens=0,
            num_generated_tokens=count,
        )


@pytest.fixture
def fakes() -> SimpleNamespace:
    """FakeEngine and what belongs to it."""
    return SimpleNamespace(Engine=FakeEngine, expected_tokens=expected_tokens, VOCAB_SIZE=VOCAB_SIZE)


Serving = Callable[..., contextlib.AbstractAsyncContextManager[SimpleNamespace]]


@pytest.fixture
def serving() -> Serving:
    """`async with serving(engine, port=0, ...) as s`: an in-process server; `s.address`, `s.engine` (AsyncEngine)."""

    @contextlib.asynccontextmanager
    async def run(engine: Any, *, wait_ready: bool = True, **options: Any) -> AsyncIterator[SimpleNamespace]:
        async_engine = AsyncEngine(lambda progress: engine)
        server = GrpcServer(async_engine, ServerConfig(**{"port": 0, **options}), model_name="fake")
        await server.start()
        async_engine.start()
        try:
            if wait_ready:
                await async_engine.until_ready()
            yield SimpleNamespace(address=server.address, engine=async_engine, server=server)
        finally:
            if isinstance(engine, FakeEngine):  # whatever the test held back, let the thread end
                engine.warm.set()
                engine.go.set()
            await async_engine.stop()
            await server.stop()

    return run
