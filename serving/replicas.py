"""`ReplicaSet`: whole engines on devices of their own, behind the interface of one `AsyncEngine`.

Hides which replica runs a request (the one that was given the longest prefix of it before, unless it is busier than
the others) and that one may fail while the others go on. All methods run in the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from jaxinfer.config import ConfigError
from jaxinfer.request import EngineDeadError, QueueFullError, Request
from serving.async_engine import AsyncEngine, NotReadyError, Progress, State, TokenStream

if TYPE_CHECKING:  # importing the engine imports jax
    from jaxinfer.engine import Engine
    from jaxinfer.engine_stats import EngineStats

log = logging.getLogger(__name__)

MAX_BLOCKS = 100_000  # that are remembered per replica
BLOCK_TOKENS = 16  # where the engine's page size is left to its device
IMBALANCE = 0.25  # of a replica's slots: by how many requests a prefix may make it busier than the least busy one
INFO_S = 10.0  # for a replica to say how it does; a model of many layers takes seconds to describe, once
ORDER = (State.LOADING, State.WARMING, State.READY, State.DRAINING, State.STOPPED)

type AnyEngine = AsyncEngine | ReplicaSet


class PrefixIndex:
    """The prompts that a replica was given, as hashes of their blocks; the least recently used are forgotten.

    A guess of what its prefix cache holds, which lies in another thread and evicts by its own needs: a wrong guess
    costs time only. Routing by such an index: Preble (arXiv:2407.00023) and SGLang's router.
    """

    def __init__(self, max_blocks: int = MAX_BLOCKS):
        self._max_blocks = max_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def match(self, keys: Sequence[int]) -> int:
        """How many blocks from the first on were seen."""
        return next((count for count, key in enumerate(keys) if key not in self._blocks), len(keys))

    def add(self, keys: Sequence[int]) -> None:
        """Remember a prompt; its first block last, so that what others may share is kept longest."""
        for key in reversed(keys):
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)


def block_keys(tokens: Sequence[int], salt: str, block_tokens: int) -> list[int]:
    """A hash per full block of a prompt; each stands for all that comes before it, and for the salt, too."""
    keys, key = [], hash(salt)
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        key = hash((key, *tokens[start : start + block_tokens]))
        keys.append(key)
    return keys


class _Replica:
    """One engine, what it was given and what of that has not ended."""

    def __init__(self, engine: AsyncEngine):
        self.engine = engine
        self.prefixes = PrefixIndex()
        self.num_submitted = 0
        self._streams: list[TokenStream] = []
        self._info: dict[str, Any] | None = None  # it does not change

    async def describe(self) -> tuple[dict[str, Any], EngineStats]:
        """`Engine.info` and `Engine.stats`, when the engine has time for it."""
        if self._info is None:
            self._info = await self.engine.call(lambda engine: engine.info())
        return self._info, await self.engine.call(lambda engine: engine.stats())

    @property
    def num_open(self) -> int:
        """Requests that the engine is not done with."""
        self._streams = [stream for stream in self._streams if not stream.finished]
        return len(self._streams)

    def submit(self, request: Request, keys: Sequence[int]) -> TokenStream:
        stream = self.engine.submit(request)
        self._streams.append(stream)
        self.num_submitted += 1
        self.prefixes.add(keys)
        return stream


class ReplicaSet:
    """`makers` each make one replica's engine, in its own thread.

    READY when all replicas are; a replica that fails before that fails the set. Later the set is READY while one
    replica is, and DEAD when none is left. A replica that failed is not started again: that takes a new process.
    """

    def __init__(self, makers: Sequence[Callable[[Progress], Engine]], *, progress: Progress | None = None):
        report = progress or log.info
        self._replicas = [
            _Replica(AsyncEngine(make, progress=partial(_report, report, index))) for index, make in enumerate(makers)
        ]
        self._state = State.LOADING
        self._state_changed = asyncio.Event()
        self._was_ready = False
        self._draining = False
        self._watchers: list[asyncio.Task[None]] = []

    # ---- life ----

    @property
    def state(self) -> State:
        return self._state

    @property
    def error(self) -> BaseException | None:
        """What killed a replica (of several the first by number), when the state is DEAD."""
        errors = [replica.engine.error for replica in self._replicas if replica.engine.error is not None]
        return errors[0] if errors and self._state is State.DEAD else None

    @property
    def engine(self) -> Engine:
        """A replica's engine, for its constant attributes and `check_request`; NotReadyError until it is loaded."""
        return (self._live() or self._replicas)[0].engine.engine

    @property
    def is_stuck(self) -> bool:
        """Whether a device call of every replica takes longer than `watchdog_s` right now."""
        return all(replica.engine.is_stuck for replica in self._live())

    def start(self) -> None:
        """Start all engine threads. Call once, in the event loop that will be served."""
        for index, replica in enumerate(self._replicas):
            replica.engine.start()
            self._watchers.append(asyncio.create_task(self._watch(index, replica.engine)))

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
            raise EngineDeadError(f"the engine failed: {type(self.error).__name__}")
        if self._state is not State.READY:
            raise NotReadyError(self._state)

    async def drain(self, timeout_s: float) -> int:
        """Take no more requests, let the running ones end, abort those left after `timeout_s`; returns how many."""
        self._draining = True
        self._refresh()
        return sum(await asyncio.gather(*(replica.engine.drain(timeout_s) for replica in self._replicas)))

    async def stop(self) -> bool:
        """End all engine threads; False when one is stuck in a device call or a compile and was left behind."""
        ended = await asyncio.gather(*(replica.engine.stop() for replica in self._replicas))
        await asyncio.gather(*self._watchers)
        return all(ended)

    # ---- requests ----

    def submit(self, request: Request) -> TokenStream:
        """Queue a request with the replica that suits it best; see `AsyncEngine.submit`."""
        self.require_ready()
        self.engine.check_request(request)  # before its tokens are hashed
        block_tokens = self.engine.config.page_size or BLOCK_TOKENS
        keys = block_keys(request.prompt_token_ids, request.cache_salt, block_tokens)
        full: QueueFullError | None = None
        for replica in self._by_preference(keys):
            try:
                return replica.submit(request, keys)
            except QueueFullError as error:
                full = full or error
        raise full or NotReadyError(self._state)

    def abort(self, request_id: str) -> None:
        """End a request by its stream's id: its open completions finish with ABORT. Unknown ids are ignored."""
        for replica in self._replicas:
            replica.engine.abort(request_id)

    async def call[Result](self, function: Callable[[Engine], Result]) -> Result:
        """`function(engine)` in the thread of every replica that lives; the first one's result."""
        if not self._live():
            raise EngineDeadError(f"the engine is {self._state}")
        return (await asyncio.gather(*(replica.engine.call(function) for replica in self._live())))[0]

    async def info(self) -> dict[str, Any]:
        """What `Engine.info` says of one replica, and as `replicas` how each of them does; for JSON.

        One that does not answer within INFO_S, as its device call hangs, is not waited for.
        """
        asked = (asyncio.wait_for(replica.describe(), INFO_S) for replica in self._replicas)
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        first: dict[str, Any] = {}
        described = []
        for replica, outcome in zip(self._replicas, outcomes, strict=True):
            entry: dict[str, Any] = {"state": str(replica.engine.state), "num_open": replica.num_open}
            if isinstance(outcome, TimeoutError):
                entry["error"] = f"no answer within {INFO_S:g} s"
            elif isinstance(outcome, BaseException):  # it is dead, or died of this
                entry["error"] = type(replica.engine.error or outcome).__name__
            else:
                info, stats = outcome
                first = first or info
                entry |= {"device": info.get("device"), "num_running": stats.num_running}
                entry |= {"num_waiting": stats.num_waiting, "generation_tokens": stats.generation_tokens}
                entry |= {"prompt_tokens": stats.prompt_tokens, "cached_prompt_tokens": stats.cached_prompt_tokens}
            described.append(entry)
        return {**first, "replicas": described}

    # ---- in the event loop ----

    def _live(self) -> list[_Replica]:
        return [replica for replica in self._replicas if replica.engine.state is not State.DEAD]

    def _by_preference(self, keys: Sequence[int]) -> list[_Replica]:
        """Replicas that take requests, the best for a prompt first: the longest known prefix among those that are not
        much busier than the least busy one, then the less busy, then the one that had fewer requests so far.
        """
        ready = [replica for replica in self._replicas if replica.engine.state is State.READY]
        ready = [replica for replica in ready if not replica.engine.is_stuck] or ready
        least = min((replica.num_open for replica in ready), default=0)

        def badness(replica: _Replica) -> tuple[bool, int, int, int]:
            num_open = replica.num_open
            allowed = max(1.0, IMBALANCE * replica.engine.engine.config.max_num_seqs)
            is_busy = num_open > least + allowed
            known = 0 if is_busy else replica.prefixes.match(keys)
            return is_busy, -known, num_open, replica.num_submitted

        return sorted(ready, key=badness)

    async def _watch(self, index: int, engine: AsyncEngine) -> None:
        """Follow one replica's state until it ends."""
        seen = engine.state  # it may have gone on, or failed, before this task came to run
        self._refresh()
        while seen not in (State.STOPPED, State.DEAD):
            seen = await engine.next_state(seen)
            self._refresh()
        if seen is State.DEAD and self._state is not State.DEAD:
            log.error("replica %d failed; %d of %d go on", index, len(self._live()), len(self._replicas))

    def _refresh(self) -> None:
        """The state that follows from the replicas'; DEAD is for good."""
        if self._state is State.DEAD:
            return
        states = [replica.engine.state for replica in self._live()]
        if not states or (len(states) < len(self._replicas) and not self._was_ready):
            state = State.DEAD
        else:
            state = min(states, key=ORDER.index)
            if self._draining and state is not State.STOPPED:
                state = State.DRAINING
        self._was_ready = self._was_ready or state is State.READY
        if state is not self._state:
            self._state = state
            self._state_changed.set()
            self._state_changed = asyncio.Event()


def replica_devices(index: int, num_replicas: int, mesh_size: int) -> list[Any]:
    """The devices of replica `index`, `mesh_size` of them: the first take the first, and so on.

    ConfigError when there are too few for all `num_replicas`.
    """
    import jax

    devices = jax.devices()
    if num_replicas * mesh_size > len(devices):
        fitting = len(devices) // mesh_size
        each = "one device" if mesh_size == 1 else f"a mesh of {mesh_size} devices"
        raise ConfigError(
            f"replicas={num_replicas} with {each} each need {num_replicas * mesh_size} devices; there are "
            f"{len(devices)}, enough for {fitting or 'none'}"
        )
    return devices[index * mesh_size : (index + 1) * mesh_size]


def _report(report: Progress, index: int, text: str) -> None:
    report(f"replica {index}: {text}")
