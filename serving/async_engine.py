"""`AsyncEngine`: the one thread that owns an `Engine`, and asyncio's way to it.

Hides the thread, the inbox into it, the hand-over of events (one call into the loop per step, not per token) and
what happens when a consumer leaves, the server drains, or the engine dies. All methods run in the event loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import logging
import threading
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from jaxinfer.request import EngineDeadError, QueueFullError, Request, RequestError, TokenEvent
from sharding.control import HostLostError

if TYPE_CHECKING:  # importing the engine imports jax
    from jaxinfer.engine import Engine

log = logging.getLogger(__name__)
Progress = Callable[[str], None]

RETRY_BUSY_S = 1.0  # when no slot is known to free sooner
RETRY_LOADING_S = 2.0
ABORT_GRACE_S = 10.0  # aborted requests end within two loop calls; past this the engine hangs
JOIN_S = 10.0
ABANDON_S = 0.5  # for an engine thread that loads, or waits for a host that is gone


class State(enum.StrEnum):
    """What the engine is doing; only READY takes requests."""

    LOADING = "loading"
    WARMING = "warming"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    DEAD = "dead"


class NotReadyError(RuntimeError):
    """The engine is loading, warming up or going away; `retry_after_s` says when to come back."""

    def __init__(self, state: State):
        super().__init__(f"the engine is {state}; retry in {RETRY_LOADING_S:.0f} s")
        self.state = state
        self.retry_after_s = RETRY_LOADING_S


class TokenStream(AsyncIterator[TokenEvent]):
    """The events of one submitted request; ends when every completion has finished.

    A reader that falls behind gets one event per completion for all that came meanwhile, so nothing piles up.
    Leaving early (`close`, the end of `async with`, cancelling the task that waits for the next event) aborts the
    request. Raises QueueFullError, RequestError or EngineDeadError where the events would have come.
    """

    def __init__(self, request: Request, abort: Callable[[str], None]):
        self.request_id = request.request_id
        self._abort = abort
        self._num_open = request.sampling.n
        self._pending: dict[int, list[TokenEvent]] = {}  # by completion, in order of arrival
        self._error: Exception | None = None
        self._arrived = asyncio.Event()
        self._closed = False

    @property
    def finished(self) -> bool:
        """Whether the engine is done with the request (its last events may still wait to be read)."""
        return self._num_open == 0

    def close(self) -> None:
        """Abort what still runs and drop what was not read. Idempotent."""
        if not self._closed:
            self._closed = True
            self._pending.clear()
            self._arrived.set()
            if not self.finished:
                self._abort(self.request_id)

    async def aclose(self) -> None:
        """`close`, under the name that async generators have."""
        self.close()

    async def __aenter__(self) -> TokenStream:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    async def __anext__(self) -> TokenEvent:
        while not self._pending:
            if self._error is not None and not self._closed:
                raise self._error
            if self._closed or self.finished:
                raise StopAsyncIteration
            self._arrived.clear()
            try:
                await self._arrived.wait()
            except asyncio.CancelledError:
                self.close()
                raise
        return _merge(self._pending.pop(next(iter(self._pending))))

    def put(self, item: TokenEvent | Exception) -> None:
        """Take one event, or the error that ends the request."""
        if isinstance(item, Exception):
            self._num_open, self._error = 0, item
        else:
            self._num_open -= item.finish_reason is not None
            if not self._closed:
                self._pending.setdefault(item.index, []).append(item)
        self._arrived.set()


class AsyncEngine:
    """An `Engine` in its own thread, for the event loop that called `start`.

    `make_engine(progress)` runs in that thread and loads the model; warm-up follows; then the state is READY.
    """

    def __init__(self, make_engine: Callable[[Progress], Engine], *, progress: Progress | None = None):
        self._make_engine = make_engine
        self._progress = progress or log.info
        self._state = State.LOADING
        self._state_changed = asyncio.Event()
        self._error: BaseException | None = None
        self._engine: Engine | None = None
        self._streams: dict[str, TokenStream] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._inbox: deque[Callable[[Engine], None]] = deque()
        self._wake = threading.Event()
        self._calls: set[asyncio.Future[Any]] = set()
        self._stopping = False
        self._serving = False  # the engine thread looks at the inbox
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="jaxinfer-engine", daemon=True)

    # ---- life ----

    @property
    def state(self) -> State:
        return self._state

    @property
    def error(self) -> BaseException | None:
        """What killed the engine, when the state is DEAD."""
        return self._error

    @property
    def engine(self) -> Engine:
        """The engine, for its constant attributes and `check_request`; NotReadyError until it is loaded."""
        if self._engine is None:
            raise NotReadyError(self._state)
        return self._engine

    def start(self) -> None:
        """Start the engine thread. Call once, in the event loop that will be served."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def is_stuck(self) -> bool:
        """Whether a device call takes longer than `watchdog_s` right now."""
        return self._engine is not None and self._engine.is_stuck

    async def next_state(self, seen: State) -> State:
        """The state, once it differs from `seen`."""
        while self._state is seen:
            await self._state_changed.wait()
        return self._state

    async def until_ready(self) -> None:
        """Return when requests are taken; raise EngineDeadError or NotReadyError when that will not happen."""
        while self._state in (State.LOADING, State.WARMING):
            await self.next_state(self._state)
        self.require_ready()

    def require_ready(self) -> None:
        """Raise NotReadyError or EngineDeadError unless requests are taken now."""
        if self._state is State.DEAD:
            raise self._death()
        if self._state is not State.READY:
            raise NotReadyError(self._state)

    def fail(self, error: Exception) -> None:
        """The engine cannot go on: those who wait hear so now, whatever its thread is stuck in. Any thread may call it.

        Nothing happens where the engine failed, or has ended, already.
        """
        self._post(self._die, error)

    async def drain(self, timeout_s: float) -> int:
        """Take no more requests, let the running ones end, abort those left after `timeout_s`; returns how many."""
        if self._state in (State.LOADING, State.WARMING, State.READY):
            self._set_state(State.DRAINING)
        if await self._wait_idle(timeout_s):
            return 0
        left = [stream.request_id for stream in self._streams.values()]
        for request_id in left:
            self.abort(request_id)
        if not await self._wait_idle(ABORT_GRACE_S):
            self._fail_waiting(EngineDeadError(f"the engine did not abort the request within {ABORT_GRACE_S:.0f} s"))
        return len(left)

    async def stop(self) -> bool:
        """End the engine thread; False when it is stuck in a device call or a compile and was left behind."""
        self._stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            answers = self._serving and not isinstance(self._error, HostLostError)
            await asyncio.to_thread(self._thread.join, JOIN_S if answers else ABANDON_S)
        if self._state is not State.DEAD:
            self._set_state(State.STOPPED)
        self._fail_waiting(EngineDeadError("the engine was stopped"))
        return not self._thread.is_alive()

    # ---- requests ----

    def submit(self, request: Request) -> TokenStream:
        """Queue a request under an id of our own (the stream's `request_id`); its events come from the stream.

        Raises RequestError (the model cannot run it), QueueFullError, NotReadyError or EngineDeadError.
        """
        self.require_ready()
        engine = self.engine
        request = dataclasses.replace(request, request_id=uuid.uuid4().hex)
        engine.check_request(request)
        # The engine counts its queue exactly; this bound only keeps the inbox finite while a step runs long.
        if len(self._streams) >= engine.config.max_queue + engine.config.max_num_seqs:
            raise QueueFullError(engine.config.max_queue, RETRY_BUSY_S)
        stream = TokenStream(request, self.abort)
        self._streams[request.request_id] = stream
        self._idle.clear()
        self._send(partial(self._add, request=request))
        return stream

    def abort(self, request_id: str) -> None:
        """End a request by its stream's id: its open completions finish with ABORT. Unknown ids are ignored."""
        if request_id in self._streams:
            self._send(lambda engine: engine.abort(request_id))

    async def call[Result](self, function: Callable[[Engine], Result]) -> Result:
        """`function(engine)` in the engine thread between two steps, for example `Engine.stats`."""
        if self._state is State.DEAD:
            raise self._death()
        if self._state is State.STOPPED:
            raise EngineDeadError("the engine was stopped")
        assert self._loop is not None, "start() comes first"
        future: asyncio.Future[Any] = self._loop.create_future()
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        self._send(lambda engine: self._post(_settle, future, *_outcome(function, engine)))
        return await future

    # ---- in the event loop ----

    def _set_state(self, state: State) -> None:
        self._state = state
        self._state_changed.set()
        self._state_changed = asyncio.Event()

    def _advance(self, state: State) -> None:
        """The engine thread reached `state`; a drain that began meanwhile stands."""
        if self._state in (State.LOADING, State.WARMING):
            self._set_state(state)

    def _deliver(self, items: Sequence[tuple[str, TokenEvent | Exception]]) -> None:
        for request_id, item in items:
            stream = self._streams.get(request_id)
            if stream is None:
                log.warning("event for a request that was given up: %s", request_id)
                continue
            stream.put(item)
            if stream.finished:
                del self._streams[request_id]
        if not self._streams:
            self._idle.set()

    def _die(self, error: BaseException) -> None:
        if self._state in (State.DEAD, State.STOPPED):  # the first reason stands
            return
        self._stopping = True
        self._wake.set()
        if self._serving and not isinstance(error, HostLostError):  # else whoever started this reports it
            log.critical("the engine failed", exc_info=error)
        self._error = error
        self._set_state(State.DEAD)
        self._fail_waiting(self._death())

    def _death(self) -> Exception:
        """What those are told who wait for an engine that is DEAD."""
        if isinstance(self._error, HostLostError):
            return self._error
        return EngineDeadError(f"the engine failed: {type(self._error).__name__}")

    def _fail_waiting(self, error: Exception) -> None:
        self._deliver([(request_id, error) for request_id in list(self._streams)])
        for future in list(self._calls):
            _settle(future, None, error)

    async def _wait_idle(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _send(self, message: Callable[[Engine], None]) -> None:
        self._inbox.append(message)
        self._wake.set()

    # ---- in the engine thread ----

    def _run(self) -> None:
        try:
            self._engine = engine = self._make_engine(self._progress)
            self._post(self._advance, State.WARMING)
            if not self._stopping:
                engine.warm_up(self._progress)
                self._post(self._advance, State.READY)
                self._serve(engine)
        except BaseException as error:  # whatever it is, those who wait must hear of it
            self._post(self._die, error)

    def _serve(self, engine: Engine) -> None:
        self._serving = True
        while not self._stopping:
            self._wake.clear()  # before reading the inbox: a message that comes later sets it again
            while self._inbox:
                self._inbox.popleft()(engine)
            if not engine.has_work():
                self._wake.wait()
            elif not self._wake.wait(engine.idle_s()):  # a message may end the wait for a fuller batch
                events = engine.step()
                if events:
                    self._post(self._deliver, [(event.request_id, event) for event in events])
        engine.close()

    def _add(self, engine: Engine, request: Request) -> None:
        """Hand a request to the engine; whatever is wrong with it ends this request alone."""
        try:
            engine.add(request)
        except (RequestError, QueueFullError) as error:
            self._post(self._deliver, [(request.request_id, error)])
        except Exception as error:
            log.exception("the engine could not take a request")
            self._post(self._deliver, [(request.request_id, error)])

    def _post(self, function: Callable[..., None], *args: Any) -> None:
        """Run `function(*args)` in the event loop; nobody is left to tell when the loop has closed."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            if not self._loop.is_closed():
                raise


def _merge(events: list[TokenEvent]) -> TokenEvent:
    """One event that says what these consecutive events of a completion say."""
    if len(events) == 1:
        return events[0]
    logprobs = [item for event in events for item in event.logprobs or ()]
    return dataclasses.replace(
        events[-1],
        token_ids=tuple(token for event in events for token in event.token_ids),
        text="".join(event.text for event in events),
        logprobs=tuple(logprobs) if any(event.logprobs is not None for event in events) else None,
        prompt_logprobs=next((event.prompt_logprobs for event in events if event.prompt_logprobs is not None), None),
    )


def _outcome(function: Callable[[Any], Any], engine: Any) -> tuple[Any, Exception | None]:
    try:
        return function(engine), None
    except Exception as error:
        return None, error


def _settle(future: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    if future.done():  # the caller was cancelled
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
