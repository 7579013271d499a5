"""The watchdog reports a wait that lasts too long, once, and leaves short ones alone."""

from __future__ import annotations

import threading

import pytest

from jaxinfer import watchdog
from jaxinfer.watchdog import Watchdog


def test_reports_a_call_that_does_not_return(monkeypatch: pytest.MonkeyPatch) -> None:
    reported = threading.Event()
    monkeypatch.setattr(watchdog.log, "error", lambda *_: reported.set())
    dog = Watchdog(0.02)
    with dog.watch("decode_loop"):
        assert reported.wait(30)
        reported.clear()
        assert not reported.wait(0.2), "the same call was reported twice"
        assert dog.is_overdue
    assert dog.num_reports == 1 and not dog.is_overdue
    dog.close()


def test_short_calls_are_not_reported() -> None:
    dog = Watchdog(60.0)
    for _ in range(100):
        with dog.watch("mixed_step"):
            pass
    assert dog.num_reports == 0
    dog.close()


def test_zero_turns_it_off() -> None:
    before = threading.active_count()
    with Watchdog(0.0).watch("anything"):
        assert threading.active_count() == before
