"""The sockets between hosts, and the one thread that reads and writes them all.

Hides partial reads and writes, signs of life both ways, and every way in which a peer is found to be gone. Sending
never waits: what the socket does not take at once is written by the thread.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sharding.control import FrameReader, Kind, ProtocolError, frame

log = logging.getLogger(__name__)

BEATS_PER_LIMIT = 5  # signs of life sent within the time after which a silent peer is lost
MAX_UNSENT_BYTES = 1 << 30
READ_ROUNDS = 64  # frames of one peer before the others have a turn
HUNG_UP = "its connection was closed: the process ended"
WRITE_PARTS = 64  # buffers per system call, well below every system's limit

OnFrame = Callable[["Link", Kind, memoryview], None]
OnBroken = Callable[["Link", str], None]


class Link:
    """A connected peer. `send` may be called by any thread; the rest belongs to the Exchange's thread."""

    def __init__(self, connection: socket.socket, host_id: int, address: str, limits: Mapping[Kind, int]):
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.host_id = host_id
        self.address = address
        self.heard_s = time.monotonic()
        self._reader = FrameReader(limits)
        self._lock = threading.Lock()
        self._unsent: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._stuck_since_s: float | None = None  # the socket takes nothing
        self.broken = False

    def send(self, parts: Iterable[Any]) -> bool:
        """Queue a frame and write what the socket takes now; whether something is left."""
        with self._lock:
            if self.broken:
                return False
            for part in parts:
                view = memoryview(part)
                if view.nbytes:
                    self._unsent.append(view if view.format == "B" else view.cast("B"))
                    self._unsent_bytes += view.nbytes
            self._write()
            return bool(self._unsent)

    def flush(self) -> None:
        """Write on."""
        with self._lock:
            self._write()

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def _write(self) -> None:
        while self._unsent:
            parts = [self._unsent[i] for i in range(min(WRITE_PARTS, len(self._unsent)))]
            try:
                sent = self.connection.sendmsg(parts)
            except BlockingIOError:
                if self._stuck_since_s is None:
                    self._stuck_since_s = time.monotonic()
                return
            except OSError:
                return  # `read` meets it, too, after what the peer said last
            self._stuck_since_s = None
            self._unsent_bytes -= sent
            while sent:
                part = self._unsent.popleft()
                if len(part) > sent:
                    self._unsent.appendleft(part[sent:])
                sent -= min(sent, len(part))

    def read(self, on_frame: OnFrame) -> str | None:
        """Hand over the frames that are there; why the peer is gone, if it is. Raises ProtocolError."""
        for _ in range(READ_ROUNDS):
            try:
                count = self.connection.recv_into(self._reader.room())
            except BlockingIOError:
                return None
            except ConnectionResetError:  # what we sent last was never read
                return HUNG_UP
            except OSError as error:
                return f"its connection broke: {error.strerror or error}"
            if not count:
                return HUNG_UP
            self.heard_s = time.monotonic()
            done = self._reader.advance(count)
            if done is not None:
                on_frame(self, *done)
        return None

    def overdue(self, limit_s: float) -> str | None:
        """Why the peer counts as gone although its connection is open, if it does."""
        now = time.monotonic()
        if now - self.heard_s > limit_s:
            return f"no sign of life for {limit_s:g} s"
        stuck_since_s = self._stuck_since_s
        if stuck_since_s is not None and now - stuck_since_s > limit_s:
            return f"it has not read what it was sent for {limit_s:g} s"
        if self._unsent_bytes > MAX_UNSENT_BYTES:
            return f"it is {self._unsent_bytes:,} bytes behind"
        return None

    def close(self) -> None:
        with self._lock:
            self.broken = True
            self._unsent.clear()
        self.connection.close()


class Exchange:
    """Serves the links until `close`. Both callbacks run in its thread; a link is reported broken once."""

    def __init__(self, links: Iterable[Link], *, lost_after_s: float, on_frame: OnFrame, on_broken: OnBroken):
        self._links = list(links)
        self._lost_after_s = lost_after_s
        self._on_frame = on_frame
        self._on_broken = on_broken
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jaxinfer-hosts", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def send(self, link: Link, parts: Iterable[Any]) -> None:
        """Send one frame's parts; returns at once. Nothing happens when the peer is gone: the callback says so."""
        if link.send(parts):
            self._wake()

    def broadcast(self, parts: Iterable[Any]) -> None:
        """Send one frame's parts to every peer."""
        parts = list(parts)
        for link in self._links:
            self.send(link, parts)

    def close(self) -> None:
        """Close every connection and end the thread."""
        self._closing.set()
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: nothing is left to do
            self._waker.send(b"\0")

    def _run(self) -> None:
        self._selector.register(self._woken, selectors.EVENT_READ)
        for link in self._links:
            self._selector.register(link.connection, selectors.EVENT_READ, link)
        period_s = self._lost_after_s / BEATS_PER_LIMIT
        next_beat_s = time.monotonic()
        while not self._closing.is_set():
            if time.monotonic() >= next_beat_s:
                next_beat_s = time.monotonic() + period_s
                for link in self._open():
                    link.send(frame(Kind.BEAT))
            self._serve(max(0.0, next_beat_s - time.monotonic()))
            for link in self._open():
                reason = link.overdue(self._lost_after_s)
                if reason is not None:
                    self._break(link, reason)
        for link in self._open():
            link.close()
        self._selector.close()
        self._woken.close()
        self._waker.close()

    def _open(self) -> list[Link]:
        return [link for link in self._links if not link.broken]

    def _serve(self, timeout_s: float) -> None:
        for link in self._open():
            writes = selectors.EVENT_WRITE if link.has_unsent else 0
            self._selector.modify(link.connection, selectors.EVENT_READ | writes, link)
        for key, events in self._selector.select(timeout_s):
            if key.data is None:
                self._woken.recv(4096)
                continue
            reason = self._serve_one(key.data, events)
            if reason is not None:
                self._break(key.data, reason)

    def _serve_one(self, link: Link, events: int) -> str | None:
        """Read and write; why the link is broken, if it is."""
        try:
            if events & selectors.EVENT_WRITE:
                link.flush()
            return link.read(self._on_frame) if events & selectors.EVENT_READ else None
        except ProtocolError as error:
            return f"it sent {error}"
        except Exception as error:  # of a callback: this thread must go on, or nobody hears of anything
            log.exception("what host %d sent could not be handled", link.host_id)
            return f"what it sent could not be handled: {error}"

    def _break(self, link: Link, reason: str) -> None:
        self._selector.unregister(link.connection)
        link.close()
        self._on_broken(link, reason)
