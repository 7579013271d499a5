"""The follower's loop against a group and an engine of the test: order, how far ahead, failures, the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from jaxinfer import follower
from jaxinfer.follower import MAX_IN_FLIGHT, Follower
from sharding.control import HostLostError, Kind, Message

FAILING: set[int] = set()  # calls that fail on the device
LOST = HostLostError(0, 2, "10.0.0.1:1", "no sign of life for 15 s")


class FakeGroup:
    """Gives the messages one after the other, an exception by raising it; then there are none."""

    def __init__(self, *messages: Message | Exception | None):
        self.messages = list(messages)
        self.failures: list[str] = []
        self.num_prepared = 0
        self.lost: HostLostError | None = None

    def receive(self, timeout_s: float | None = None) -> Message | None:
        if not self.messages:
            assert timeout_s is not None, "waits for ever"
            return None
        message = self.messages.pop(0)
        if isinstance(message, Exception):
            raise message
        return message

    def prepare(self, message: Message, work: Callable[[], Any]) -> Any:
        assert message.kind is Kind.PREPARE
        self.num_prepared += 1
        return work()

    def fail(self, reason: str) -> None:
        self.failures.append(reason)

    def check(self) -> None:
        if self.lost is not None:
            raise self.lost


class FakeEngine:
    """Notes what it is told; raises for calls of these numbers."""

    def __init__(self, log: list[Any], raises: tuple[int, ...] = ()):
        self.log, self.raises = log, raises

    def follow(self, message: Message) -> Any:
        self.log.append(message.call if message.kind is Kind.CALL else message.kind)
        if message.call in self.raises:
            raise RuntimeError(f"call {message.call} cannot be dispatched")
        return message.call


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What happens, in order: calls dispatched, ("done", call)."""
    found: list[Any] = []

    def wait(call: Any) -> None:
        if call in FAILING:
            raise ValueError(f"call {call} failed")
        found.append(("done", call))

    monkeypatch.setattr(follower, "_wait", wait)
    monkeypatch.setattr(follower, "RESET_WAIT_S", 0.05)
    yield found
    FAILING.clear()


def calls(*numbers: int) -> list[Message]:
    return [Message(Kind.CALL, 4, call=number, buffers=(np.zeros(1, np.int32),)) for number in numbers]


RESET, STOP = Message(Kind.RESET), Message(Kind.STOP)


def test_calls_are_run_in_order_and_never_more_than_two_ahead(log: list[Any]) -> None:
    found = Follower(FakeEngine(log), FakeGroup(*calls(1, 2, 3, 4), STOP))
    found.run()
    assert log == [1, 2, ("done", 1), 3, ("done", 2), 4, ("done", 3), ("done", 4)]
    assert found.num_calls == 4 and MAX_IN_FLIGHT == 2


def test_programs_are_compiled_together_without_waiting_for_calls(log: list[Any]) -> None:
    group = FakeGroup(*calls(1, 2), Message(Kind.PREPARE, 4), *calls(3), STOP)
    found = Follower(FakeEngine(log), group)
    found.run()
    assert log == [1, 2, Kind.PREPARE, ("done", 1), 3, ("done", 2), ("done", 3)]
    assert group.num_prepared == 1 and found.num_calls == 3


def test_a_failed_compile_waits_for_reset(log: list[Any]) -> None:
    engine = FakeEngine(log, raises=(9,))
    group = FakeGroup(Message(Kind.PREPARE, 4, call=9), *calls(1), RESET, *calls(2), STOP)
    Follower(engine, group).run()
    assert log == [Kind.PREPARE, Kind.RESET, 2, ("done", 2)]


def test_stop_at_once(log: list[Any]) -> None:
    Follower(FakeEngine(log), FakeGroup(STOP)).run()
    assert log == []


def test_a_lost_host_ends_it(log: list[Any]) -> None:
    group = FakeGroup(*calls(1), LOST)
    with pytest.raises(HostLostError, match="no sign of life"):
        Follower(FakeEngine(log), group).run()
    assert not group.failures, "nobody is left to be told"


@pytest.mark.parametrize("where", ["dispatch", "device"])
def test_a_failed_call_waits_for_reset_and_drops_what_was_of_the_lost_state(log: list[Any], where: str) -> None:
    if where == "device":
        FAILING.add(1)
    engine = FakeEngine(log, raises=(1,) if where == "dispatch" else ())
    group = FakeGroup(*calls(1, 2, 3, 4), RESET, *calls(5, 6), STOP)
    Follower(engine, group).run()
    before = [1] if where == "dispatch" else [1, 2, ("done", 2)]
    assert log == [*before, Kind.RESET, 5, 6, ("done", 5), ("done", 6)]
    assert not group.failures


def test_reset_comes_after_the_ends_of_calls_on_the_lost_state(log: list[Any]) -> None:
    FAILING.add(1)
    Follower(FakeEngine(log), FakeGroup(*calls(1, 2), RESET, *calls(3), STOP)).run()
    assert log == [1, 2, ("done", 2), Kind.RESET, 3, ("done", 3)]


def test_a_call_that_does_not_end_after_reset_ends_with_host_0(log: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the part of host 0, whose call failed alone; host 0 waits for a time and goes."""
    released = threading.Event()
    monkeypatch.setattr(follower, "_wait", lambda call: released.wait(30))
    monkeypatch.setattr(follower, "LOOK_S", 0.05)
    group = FakeGroup(*calls(1), RESET, *calls(2), STOP)
    group.lost = LOST
    with pytest.raises(HostLostError, match="no sign of life"):
        Follower(FakeEngine(log), group).run()
    released.set()
    assert log == [1]


def test_a_failure_on_this_host_alone_ends_the_group(log: list[Any]) -> None:
    """Host 0 waits for a call that can never end, and so says nothing: it must be told."""
    FAILING.add(2)
    group = FakeGroup(*calls(1, 2))
    with pytest.raises(ValueError, match="call 2 failed"):
        Follower(FakeEngine(log), group).run()
    assert group.failures == ["its device call failed, and host 0's did not: ValueError: call 2 failed"]
    assert log == [1, 2, ("done", 1)]


def test_a_reset_that_fails_is_a_failure(log: list[Any]) -> None:
    class NoMemory(FakeEngine):
        def follow(self, message: Message) -> Any:
            if message.kind is Kind.RESET:
                raise MemoryError("no room for pages")
            return super().follow(message)

    group = FakeGroup(*calls(1), RESET, *calls(2))
    with pytest.raises(MemoryError):
        Follower(NoMemory(log), group).run()
    assert group.failures == ["its device call failed, and host 0's did not: MemoryError: no room for pages"]


def test_a_last_call_that_fails_after_stop_is_nobodys_business(log: list[Any]) -> None:
    FAILING.add(1)
    Follower(FakeEngine(log), FakeGroup(*calls(1), STOP)).run()
    assert log == [1]
