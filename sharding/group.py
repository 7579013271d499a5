"""The hosts that run one engine: host 0 leads, the others follow, and all of them end when one is lost.

Hides who tells whom that a host is gone, and that an orderly end closes connections too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from sharding.control import (
    MAX_FACTS_BYTES,
    MAX_TEXT_BYTES,
    HostLostError,
    Kind,
    Message,
    ProtocolError,
    clip,
    decode_loss,
    decode_text,
    encode_loss,
    frame,
)
from sharding.hosts import HostsError, Place
from sharding.links import Exchange, Link

log = logging.getLogger(__name__)

LOST_S = 2.0  # for a failed device call to turn out to be a lost host
RESTART_S = 10.0  # for device calls to end after one of host 0 failed
SAID_CHARS = 80  # of what a host says, in a message
CLOSE_S = 10.0  # for followers to end after STOP
MAX_WAITING_BYTES = 1 << 30  # of calls that this host has not begun yet
SAME_EVERYWHERE = "all hosts need the same options, model and versions"
OnLost = Callable[[HostLostError], None]


class Group:
    """This process among the group's. Thread-safe, but for `receive`, which one thread calls.

    `broadcast` and `close` are the leader's; `receive` and `leave` the followers'; the rest is everybody's.
    """

    def __init__(self, place: Place, links: list[Link], *, lost_after_s: float):
        self.rank = place.host_id
        self.size = place.num_hosts
        self._place = place
        self._links = links
        self._lock = threading.Lock()
        self._lost: HostLostError | None = None
        self._lost_event = threading.Event()
        self._callbacks: list[OnLost] = []
        self._leave_callbacks: list[Callable[[str], object]] = []
        self._failed = False  # here, and the others were told
        self._stopped = threading.Event()
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()  # None: look at `lost`
        self._waiting_bytes = 0
        self._verdicts: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()  # of AGREE: host id, JSON
        self._all_gone = threading.Event()
        self._num_open = len(links)
        self._exchange = Exchange(links, lost_after_s=lost_after_s, on_frame=self._on_frame, on_broken=self._on_broken)
        self._exchange.start()

    # ---- what everybody asks

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    @property
    def lost(self) -> HostLostError | None:
        """The host that was lost first, if one was."""
        return self._lost

    @property
    def stopped(self) -> threading.Event:
        """Set at the orderly end: on a follower when host 0 said so."""
        return self._stopped

    def check(self) -> None:
        """Raise HostLostError if a host is lost, unless they go because this one said that it failed."""
        if self._lost is not None and not self._failed:
            raise self._lost

    def _check_going_on(self) -> None:
        self.check()
        if self._failed:
            raise RuntimeError("this host has failed, and the group ends")

    def check_after(self, error: Exception) -> None:
        """Raise HostLostError if `error` may come of a lost host.

        A device call that failed because a peer died fails a moment before the peer's connection is seen to close. With
        HostsError all hosts have just answered.
        """
        if not isinstance(error, HostsError):
            self._lost_event.wait(LOST_S)
        self.check()

    def on_lost(self, callback: OnLost) -> None:
        """Call `callback(error)` once, in a thread of its own, when a host is lost; now, if one is."""
        with self._lock:
            if self._lost is None:
                self._callbacks.append(callback)
                return
        self._tell(callback, self._lost)

    def fail(self, reason: str) -> None:
        """This host cannot go on: tell the others, for whom it is lost then, with this reason."""
        self._failed = True
        self._exchange.broadcast(frame(Kind.LOST, encode_loss(self.rank, self.describe(self.rank), reason)))

    def agree(self, facts: Mapping[str, Any], advice: str = SAME_EVERYWHERE, *, timeout_s: float | None = None) -> None:
        """Return when every host has said the same `facts` (JSON); HostsError names who says what else, everywhere.

        Every host calls it, in the same order; `advice` ends the message. HostLostError when one goes away instead.
        `timeout_s`: of host 0, after which HostsError names who has not said anything; the group is no good then.
        """
        said = json.dumps(facts, sort_keys=True)
        if len(said.encode()) > MAX_FACTS_BYTES:
            raise ValueError(f"facts of {len(said.encode())} bytes are over {MAX_FACTS_BYTES}")
        if not self.is_leader:
            self._exchange.broadcast(frame(Kind.AGREE, said.encode()))
            error = self._next_verdict()[1]
        else:
            own = json.loads(said)
            answers = self._answers(timeout_s)
            error = next((text for i in sorted(answers) if (text := self._difference(i, answers[i], own))), "")
            error += f"; {advice}" if error and advice else ""
            self._exchange.broadcast(frame(Kind.AGREE, clip(json.dumps(error[: MAX_TEXT_BYTES // 6]))))  # \\u escapes
        if error:
            raise HostsError(str(error))

    def together[Result](self, what: str, work: Callable[[], Result]) -> Result:
        """Do `work` on every host, each in its own time, and return when all have: collectives do not wait for long.

        What it raises is raised here; where it failed on another host, HostsError.
        """
        try:
            result = work()
        except Exception as error:
            text = f"failed: {type(error).__name__}: {error}"[:1000]
            log.error("%s %s", what, text)  # the other hosts may take long to answer
            with contextlib.suppress(HostsError):  # that hosts differ is no news then
                self.agree({what: text}, "")
            raise
        self.agree({what: "done"}, "")
        return result

    def prepare[Result](self, message: Message, work: Callable[[], Result]) -> Result:
        """`together`, for a message's program: host 0 sends PREPARE first, the others call this when they get it."""
        shape = message.num_slots, message.prefill_tokens, message.reader
        if self.is_leader:
            self.broadcast(Message(Kind.PREPARE, *shape))
        return self.together(f"program {shape}", work)

    def restart(self, reason: str = "") -> None:
        """Begin anew after a device call failed: return when no other host has one under way that the next would meet.

        Host 0 sends RESET; the others call this when they got it and their calls have ended. RuntimeError, on host 0,
        where a host's have not after RESTART_S: they wait for its part of the call that failed. The group ends.
        `reason`: why it failed, for the message.
        """
        if not self.is_leader:
            self.agree({"calls": "ended"}, "")
            return
        self.broadcast(Message(Kind.RESET))
        try:
            self.agree({"calls": "ended"}, "", timeout_s=RESTART_S)
        except HostsError as error:
            text = f"its device call failed ({reason}), and those of others have not ended: {error}"
            self.fail(text)
            raise RuntimeError(text) from error

    def describe(self, host_id: int) -> str:
        """Name and address of a host that this one is connected to, or its own."""
        if host_id == 0:
            return self._place.coordinator
        return next((link.address for link in self._links if link.host_id == host_id), socket.gethostname())

    # ---- the leader

    def broadcast(self, message: Message) -> None:
        """Send a message to every follower, without waiting for anybody. HostLostError when one is lost."""
        self._check_going_on()
        self._exchange.broadcast(message.encode())

    def on_leave(self, callback: Callable[[str], object]) -> None:
        """Call `callback(text)`, in the exchange's thread, when a follower was asked to stop.

        Where nobody listens, the group ends then.
        """
        self._leave_callbacks.append(callback)

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """The orderly end. Host 0 sends STOP and waits for the others to leave; whether all did, and none was lost."""
        orderly = self._lost is None and not self._failed
        if orderly and not self._stopped.is_set():
            self._stopped.set()
            if self.is_leader:
                self._exchange.broadcast(Message(Kind.STOP).encode())
        if orderly and self.is_leader and not self._all_gone.wait(timeout_s):
            log.warning("%d of %d followers have not ended within %g s", self._num_open, len(self._links), timeout_s)
            orderly = False
        self._exchange.close()
        return orderly

    # ---- a follower

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """The next message, in the order of the leader's calls; None past `timeout_s`. HostLostError ends it."""
        try:
            message = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if message is None:
            self._inbox.put(None)  # for whoever asks again
            self._check_going_on()
        assert message is not None
        with self._lock:
            self._waiting_bytes -= sum(buffer.nbytes for buffer in message.buffers)
        return message

    def leave(self, reason: str) -> None:
        """Ask host 0 to end the group in an orderly way."""
        self._exchange.broadcast(frame(Kind.LEAVE, clip(reason)))

    # ---- in the exchange's thread

    def _on_frame(self, link: Link, kind: Kind, body: memoryview) -> None:
        if kind in (Kind.CALL, Kind.PREPARE, Kind.RESET, Kind.STOP):
            message = Message.decode(kind, body)
            if kind is Kind.STOP:
                self._stopped.set()
                self._verdicts.put(None)
            with self._lock:
                self._waiting_bytes += sum(buffer.nbytes for buffer in message.buffers)
                if self._waiting_bytes > MAX_WAITING_BYTES:
                    raise ProtocolError(f"{self._waiting_bytes:,} bytes of calls that this host has not begun")
            self._inbox.put(message)
        elif kind is Kind.AGREE:
            try:
                self._verdicts.put((link.host_id, json.loads(decode_text(body))))
            except (ValueError, RecursionError):
                raise ProtocolError("facts that are no JSON") from None
        elif kind is Kind.LOST:
            host_id, address, reason = decode_loss(body)
            if self.is_leader:  # a follower speaks of itself alone
                self._lose(link.host_id, link.address, reason)
            elif host_id < self.size:
                self._lose(host_id, address, reason)
        elif kind is Kind.LEAVE:
            self._on_leave(link.host_id, decode_text(body))

    def _on_leave(self, host_id: int, reason: str) -> None:
        text = f"host {host_id} of {self.size} ({self.describe(host_id)}) was told to stop: {reason}"
        log.warning("%s", text)
        for callback in self._leave_callbacks:
            callback(text)
        if not self._leave_callbacks:
            self._lose(host_id, self.describe(host_id), f"it was told to stop: {reason}")

    def _on_broken(self, link: Link, reason: str) -> None:
        self._num_open -= 1
        if not self._num_open:
            self._all_gone.set()
        self._lose(link.host_id, link.address, reason)

    def _lose(self, host_id: int, address: str, reason: str) -> None:
        """A host is lost: tell everybody, once. After STOP nobody is."""
        with self._lock:
            if self._lost is not None or self._stopped.is_set():
                return
            self._lost = error = HostLostError(host_id, self.size, address, reason)
            callbacks = [] if self._failed else list(self._callbacks)  # it goes because this one does
        self._lost_event.set()
        if self.is_leader:  # the lost one too, if it still hears: it was perhaps told to stop
            self._exchange.broadcast(frame(Kind.LOST, encode_loss(host_id, address, reason)))
        self._inbox.put(None)
        self._verdicts.put(None)
        for callback in callbacks:
            self._tell(callback, error)

    @staticmethod
    def _tell(callback: OnLost, error: HostLostError) -> None:
        with contextlib.suppress(RuntimeError):  # at the interpreter's own end there are no more threads to be had
            threading.Thread(target=callback, args=(error,), name="jaxinfer-lost", daemon=True).start()

    # ---- agreement

    def _answers(self, timeout_s: float | None) -> dict[int, Any]:
        """What each of the others says."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        found: dict[int, Any] = {}
        while len(found) < len(self._links):
            try:
                host_id, answer = self._next_verdict(None if deadline_s is None else deadline_s - time.monotonic())
            except queue.Empty:
                silent = ", ".join(str(i) for i in range(1, self.size) if i not in found)
                raise HostsError(f"no answer from hosts {silent} of {self.size} within {timeout_s:g} s") from None
            found[host_id] = answer
        return found

    def _next_verdict(self, timeout_s: float | None = None) -> tuple[int, Any]:
        """queue.Empty past the timeout."""
        self._check_going_on()
        verdict = self._verdicts.get(timeout=None if timeout_s is None else max(0.0, timeout_s))
        if verdict is None:
            self._verdicts.put(None)  # for whoever asks again
            self._check_going_on()
            raise HostsError("host 0 has ended the group")
        return verdict

    def _difference(self, host_id: int, answer: Any, own: dict[str, Any]) -> str:
        """What a follower says that is not what host 0 says; "" where there is nothing."""
        theirs = answer if isinstance(answer, dict) else {}
        for name in sorted({*own, *theirs}):
            here, there = (json.dumps(facts.get(name)) for facts in (own, theirs))
            if here != there:
                here, there = (text if len(text) <= SAID_CHARS else f"{text[:SAID_CHARS]}..." for text in (here, there))
                return (
                    f"host {host_id} of {self.size} ({self.describe(host_id)}) differs: {name} is {there} there and "
                    f"{here} on host 0"
                )
        return ""


def wait_for(done: threading.Event, group: Group, timeout_s: float) -> bool:
    """Wait for `done`; False past `timeout_s`. HostLostError as soon as a host is lost."""
    deadline_s = time.monotonic() + timeout_s
    while not done.wait(0.1):
        group.check()
        if time.monotonic() > deadline_s:
            return False
    return True
