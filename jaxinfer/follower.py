"""What a host other than the first does: the device calls that host 0 tells it to, until host 0 says stop.

Hides how far it may run ahead, and that a call which fails here alone must not leave the others waiting for ever.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from sharding.control import HostLostError, Kind, Message

log = logging.getLogger(__name__)

MAX_IN_FLIGHT = 2
LOOK_S = 0.5  # without a message, after which the calls in flight are waited for
RESET_WAIT_S = 10.0  # host 0 meets the same failure, or it never will


class Leading(Protocol):
    """The group, as a follower sees it."""

    def receive(self, timeout_s: float | None = None) -> Message | None: ...

    def prepare(self, message: Message, work: Callable[[], Any]) -> Any: ...

    def fail(self, reason: str) -> None: ...

    def check(self) -> None: ...


class Following(Protocol):
    """The engine, as its follower sees it."""

    def follow(self, message: Message) -> Any:
        """Dispatch the call of a CALL; compile that of a PREPARE; allocate the state anew for a RESET.

        Returns arrays that are there when a CALL is done, as a pytree.
        """


class Follower:
    """Runs `engine` as host 0 says. `run` returns at the orderly end.

    At most MAX_IN_FLIGHT calls are dispatched and not done, so that host 0 is never far ahead of this host's device.
    """

    def __init__(self, engine: Following, group: Leading):
        self._engine = engine
        self._group = group
        self._in_flight: deque[Any] = deque()
        self._failure: Exception | None = None  # of a call; then only RESET helps, until `_deadline_s`
        self._deadline_s = 0.0
        self.num_calls = 0

    def run(self) -> None:
        """Follow until STOP.

        Raises HostLostError when a host is lost, and what a device call raised when it failed on this host alone: then
        the others were told.
        """
        while (message := self._next()).kind is not Kind.STOP:
            if self._failure is not None and message.kind is Kind.CALL:
                continue  # it is of the state that is lost
            if message.kind is Kind.RESET:
                self._failure = None
                self._end_in_flight()
            try:
                self._do(message)
            except HostLostError:
                raise
            except Exception as error:
                self._note(error)
        if self._failure is None:
            try:
                self._wait_until_done()
            except Exception as error:  # host 0 did not want to know how this call ends
                log.warning("the last device call failed: %s", error)

    def _next(self) -> Message:
        """The next message. While none comes, see how the calls in flight end: host 0 may wait for one that failed."""
        while True:
            limit_s = LOOK_S if self._in_flight else None
            if self._failure is not None:
                limit_s = max(0.0, self._deadline_s - time.monotonic())
            message = self._group.receive(limit_s)
            if message is not None:
                return message
            if self._failure is not None:
                failure = f"{type(self._failure).__name__}: {self._failure}"
                self._group.fail(f"its device call failed, and host 0's did not: {failure}")
                raise self._failure
            try:
                self._wait_until_done()
            except Exception as error:
                self._note(error)

    def _do(self, message: Message) -> None:
        if message.kind is Kind.PREPARE:
            try:
                self._group.prepare(message, lambda: self._engine.follow(message))
            finally:  # compiling took its time, and host 0 was busy with it too
                self._deadline_s = time.monotonic() + RESET_WAIT_S
            return
        while len(self._in_flight) >= MAX_IN_FLIGHT:
            _wait(self._in_flight.popleft())
        done = self._engine.follow(message)
        if message.kind is Kind.CALL:
            self.num_calls += 1
            self._in_flight.append(done)

    def _end_in_flight(self) -> None:
        """See calls on the lost state to their ends: host 0's next would meet them. Host 0 does not wait for ever."""
        calls, self._in_flight = list(self._in_flight), deque()
        ended = threading.Event()

        def wait() -> None:
            for arrays in calls:
                with contextlib.suppress(Exception):  # as host 0's did
                    _wait(arrays)
            ended.set()

        threading.Thread(target=wait, name="jaxinfer-reset", daemon=True).start()
        while not ended.wait(LOOK_S):
            self._group.check()

    def _note(self, error: Exception) -> None:
        """A call failed. Host 0, for which it fails too, says RESET soon; if not, this host alone failed."""
        log.error("device call failed, waiting for host 0 to start anew: %s", error)
        self._failure, self._deadline_s = error, time.monotonic() + RESET_WAIT_S

    def _wait_until_done(self) -> None:
        while self._in_flight:
            _wait(self._in_flight.popleft())


def _wait(arrays: Any) -> None:
    import jax

    jax.block_until_ready(arrays)
