"""Reports a device call that does not return: one log line and one count per such call, from a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


class Watchdog:
    """`with watchdog.watch("what"):` around a wait; 0 seconds turns it off."""

    def __init__(self, limit_s: float):
        self._limit_s = limit_s
        self._started: tuple[float, str] | None = None
        self._closed = threading.Event()
        self.num_reports = 0
        if limit_s > 0:
            threading.Thread(target=self._run, name="jaxinfer-watchdog", daemon=True).start()

    @contextmanager
    def watch(self, what: str) -> Iterator[None]:
        """Report when the body takes longer than the limit."""
        self._started = (time.monotonic(), what)
        try:
            yield
        finally:
            self._started = None

    @property
    def is_overdue(self) -> bool:
        """Whether the body of `watch` takes longer than the limit right now."""
        started = self._started
        return self._limit_s > 0 and started is not None and time.monotonic() - started[0] > self._limit_s

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        reported = None
        while not self._closed.wait(self._limit_s / 4):
            started = self._started
            if started is not None and started is not reported and self.is_overdue:
                reported = started
                self.num_reports += 1
                log.error("device call %s has not returned for %.0f s", started[1], time.monotonic() - started[0])
