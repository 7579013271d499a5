"""How the hosts of a group come together: host 0 waits at its port, the others connect and show that they belong.

Hides the handshake (challenge and answer by HMAC over a shared token, both ways; RFC 2104), strangers, duplicates and
stragglers, and which interface is listened on. Pure sockets: what is wrong is known before jax is asked for anything.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sharding.control import FROM_FOLLOWER, FROM_LEADER, FrameReader, Kind, ProtocolError, clip, decode_text, frame
from sharding.hosts import HostsError, Place, join_address
from sharding.links import Link

log = logging.getLogger(__name__)

VERSION = 1
NONCE_BYTES = MAC_BYTES = 32
HANDSHAKE_S = 10.0
MAX_STRANGERS = 64  # connections that have not shown yet who they are
RETRY_S = 0.25
LOOK_S = 0.1
HELLO = struct.Struct(f"<III{NONCE_BYTES}s{MAC_BYTES}s")  # version, host id, hosts, own nonce, proof; then the name
WELCOME = struct.Struct(f"<H{MAC_BYTES}s")  # port of jax's service, proof
MAX_NAME_BYTES = 255
MAX_REFUSAL_BYTES = 2048
Say = Callable[[str], None]


@dataclass(frozen=True)
class Gathered:
    """What each host has when all are there."""

    links: list[Link]  # host 0: to every other; another: to host 0
    jax_port: int
    bind: str  # where host 0 listens


def gather(place: Place, *, token: bytes, timeout_s: float, say: Say) -> Gathered:
    """Meet the other hosts. Raises HostsError: who did not come in time, or why this host is refused."""
    deadline_s = time.monotonic() + timeout_s
    if place.is_leader:
        return _Door(place, token, timeout_s, deadline_s, say).wait()
    return _knock(place, token, timeout_s, deadline_s, say)


def bind_address(host: str) -> str:
    """What host 0 listens on: its own address where `host` is one, loopback for loopback, else every interface."""
    if host == "localhost":
        return "127.0.0.1"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return ""  # a name: what it resolves to here need not be what the others see
    with contextlib.suppress(OSError):
        family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        with socket.socket(family) as probe:
            probe.bind((host, 0))
            return host
    return ""  # an address that others reach this host by, through some translation


# ---- host 0 ----------------------------------------------------------------------------------------------------------


class _Door:
    """Host 0 while it waits."""

    def __init__(self, place: Place, token: bytes, timeout_s: float, deadline_s: float, say: Say):
        self._place = place
        self._token = token
        self._timeout_s = timeout_s
        self._deadline_s = deadline_s
        self._say = say
        self._lock = threading.Lock()
        self._strangers = threading.Semaphore(MAX_STRANGERS)
        self._came: dict[int, tuple[socket.socket, str, bytes]] = {}  # host id -> connection, address, nonce

    def wait(self) -> Gathered:
        bind = bind_address(self._place.host)
        try:
            with _listen(bind, self._place.port) as listener:
                self._say(f"host 0 of {self._place.num_hosts}, waiting for the others on {self._place.coordinator}")
                self._until_all(listener)
        except BaseException:
            for connection, _, _ in self._came.values():
                connection.close()
            raise
        port = _free_port(bind)
        links = []
        for host_id, (connection, address, nonce) in sorted(self._came.items()):
            proof = _mac(self._token, b"leader", nonce, struct.pack("<H", port))
            with contextlib.suppress(OSError):  # gone just now: its link will say so
                connection.sendall(b"".join(frame(Kind.WELCOME, WELCOME.pack(port, proof))))
            links.append(Link(connection, host_id, address, FROM_FOLLOWER))
        return Gathered(links, port, bind)

    def _until_all(self, listener: socket.socket) -> None:
        listener.settimeout(LOOK_S)
        while len(self._came) < self._place.num_hosts - 1:
            if time.monotonic() > self._deadline_s:
                self._give_up()
            with contextlib.suppress(TimeoutError):
                connection, peer = listener.accept()
                if not self._strangers.acquire(blocking=False):
                    connection.close()
                    continue
                threading.Thread(target=self._meet, args=(connection, peer), daemon=True).start()
            self._forget_the_gone()

    def _give_up(self) -> None:
        with self._lock:
            missing = [str(i) for i in range(1, self._place.num_hosts) if i not in self._came]
            names = f"host {missing[0]}" if len(missing) == 1 else f"hosts {', '.join(missing)}"
            text = f"{names} of {self._place.num_hosts} did not come to {self._place.coordinator}"
            text += f" within {self._timeout_s:g} s"
            for connection, _, _ in self._came.values():
                with contextlib.suppress(OSError):
                    connection.sendall(b"".join(frame(Kind.REFUSED, clip(text))))
        raise HostsError(text + " (--join-timeout-s)")

    def _forget_the_gone(self) -> None:
        with self._lock:
            for host_id, (connection, address, _) in list(self._came.items()):
                if _is_closed(connection):
                    connection.close()
                    del self._came[host_id]
                    self._say(f"host {host_id} ({address}) went away while the others were waited for")

    def _meet(self, connection: socket.socket, peer: Any) -> None:
        """Challenge one that connected; it joins, or is told why not."""
        try:
            _notice_silence(connection)
            connection.settimeout(HANDSHAKE_S)
            challenge = os.urandom(NONCE_BYTES)
            connection.sendall(b"".join(frame(Kind.CHALLENGE, challenge)))
            _, body = _receive(connection, {Kind.HELLO: HELLO.size + MAX_NAME_BYTES}, time.monotonic() + HANDSHAKE_S)
            refusal = self._admit(connection, str(peer[0]), challenge, body)
            if refusal is not None:
                log.warning("a connection from %s is refused: %s", peer[0], refusal)
                connection.sendall(b"".join(frame(Kind.REFUSED, clip(refusal))))
                connection.close()
        except (OSError, ProtocolError) as error:
            log.warning("a connection from %s is refused: %s", peer[0], error)
            connection.close()
        finally:
            self._strangers.release()

    def _admit(self, connection: socket.socket, ip: str, challenge: bytes, body: memoryview) -> str | None:
        """Let in who answered the challenge; why not, if not."""
        if len(body) < HELLO.size:
            raise ProtocolError(f"a HELLO of {len(body)} bytes")
        version, host_id, num_hosts, nonce, proof = HELLO.unpack_from(body)
        said = bytes(body[: HELLO.size - MAC_BYTES]) + bytes(body[HELLO.size :])
        if not hmac.compare_digest(proof, _mac(self._token, b"follower", challenge, said)):
            return "its token is not host 0's (--hosts-token-file)"
        if version != VERSION:
            return f"it speaks version {version} of the hosts' protocol, host 0 version {VERSION}"
        if num_hosts != self._place.num_hosts:
            return f"it is one of {num_hosts} hosts, host 0 is one of {self._place.num_hosts}"
        if not 1 <= host_id < num_hosts:
            return f"its number is {host_id}; that must be from 1 to {num_hosts - 1}"
        address = f"{decode_text(body[HELLO.size :])}, {ip}"
        self._forget_the_gone()  # perhaps the same host, before it was started anew
        with self._lock:
            if host_id in self._came:
                return f"host {host_id} is there already ({self._came[host_id][1]})"
            self._came[host_id] = (connection, address, nonce)
        self._say(f"host {host_id} of {num_hosts} ({address}) is there")
        return None


def _is_closed(connection: socket.socket) -> bool:
    """Whether the peer, which has nothing to say at this time, has hung up."""
    timeout_s = connection.gettimeout()
    connection.setblocking(False)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(timeout_s)


def _listen(bind: str, port: int) -> socket.socket:
    try:
        if not bind and socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=MAX_STRANGERS)
        family = socket.AF_INET6 if ":" in bind else socket.AF_INET
        return socket.create_server((bind, port), family=family, backlog=MAX_STRANGERS)
    except OSError as error:
        raise HostsError(
            f"host 0 cannot wait on {join_address(bind or '*', port)} for the others: {error.strerror or error}"
        ) from error


def _free_port(bind: str) -> int:
    """A port for jax's service. Nothing keeps it until jax takes it: jax says so if somebody else was faster."""
    with _listen(bind, 0) as probe:
        return int(probe.getsockname()[1])


# ---- the others ------------------------------------------------------------------------------------------------------


def _knock(place: Place, token: bytes, timeout_s: float, deadline_s: float, say: Say) -> Gathered:
    """Try until host 0 is there and welcomes: it may start later, or anew."""
    say(f"host {place.host_id} of {place.num_hosts}, looking for host 0 at {place.coordinator}")
    last: Exception = TimeoutError("no answer")
    while time.monotonic() < deadline_s:
        left_s = max(0.1, deadline_s - time.monotonic())
        try:
            connection = socket.create_connection((place.host, place.port), timeout=min(HANDSHAKE_S, left_s))
        except OSError as error:  # not there yet, or its name is not known yet
            last = error
            time.sleep(min(RETRY_S, left_s))
            continue
        try:
            _notice_silence(connection)
            port = _present(connection, place, token, deadline_s)
        except HostsError:
            connection.close()
            raise
        except (OSError, ProtocolError) as error:
            connection.close()
            last = error
            time.sleep(RETRY_S)
            continue
        return Gathered([Link(connection, 0, place.coordinator, FROM_LEADER)], port, "")
    raise HostsError(
        f"host 0 at {place.coordinator} did not gather all {place.num_hosts} hosts within {timeout_s:g} s "
        f"(--join-timeout-s): {last}"
    )


def _present(connection: socket.socket, place: Place, token: bytes, deadline_s: float) -> int:
    """Answer host 0's challenge and wait for the others; jax's port. Raises HostsError when refused."""
    kind, challenge = _receive(connection, {Kind.CHALLENGE: NONCE_BYTES}, time.monotonic() + HANDSHAKE_S)
    nonce, name = os.urandom(NONCE_BYTES), socket.gethostname().encode()[:MAX_NAME_BYTES]
    said = HELLO.pack(VERSION, place.host_id, place.num_hosts, nonce, b"")[:-MAC_BYTES] + name
    proof = _mac(token, b"follower", bytes(challenge), said)
    hello = HELLO.pack(VERSION, place.host_id, place.num_hosts, nonce, proof) + name
    connection.sendall(b"".join(frame(Kind.HELLO, hello)))
    kind, body = _receive(connection, {Kind.WELCOME: WELCOME.size, Kind.REFUSED: MAX_REFUSAL_BYTES}, deadline_s)
    if kind is Kind.REFUSED:
        raise HostsError(f"host 0 at {place.coordinator} refuses this host, {place.host_id}: {decode_text(body)}")
    if len(body) != WELCOME.size:
        raise ProtocolError(f"a WELCOME of {len(body)} bytes")
    port, proof = WELCOME.unpack(body)
    if not hmac.compare_digest(proof, _mac(token, b"leader", nonce, struct.pack("<H", port))):
        raise HostsError(f"who answers at {place.coordinator} has not this host's token (--hosts-token-file)")
    return int(port)


# ---- both ------------------------------------------------------------------------------------------------------------


def _notice_silence(connection: socket.socket) -> None:
    """Let the kernel close a connection whose peer is gone without a word: nothing is sent while others are awaited."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2)):  # seconds, seconds, times
        if hasattr(socket, option):  # where the system has it
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _mac(token: bytes, *parts: bytes) -> bytes:
    return hmac.digest(token, b"jaxinfer hosts\0" + b"\0".join(parts), "sha256")


def _receive(connection: socket.socket, limits: Mapping[Kind, int], deadline_s: float) -> tuple[Kind, memoryview]:
    """One frame; TimeoutError past the deadline, ConnectionError where the peer closes, ProtocolError."""
    reader = FrameReader(limits)
    while True:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("it does not go on")
        connection.settimeout(left_s)
        count = connection.recv_into(reader.room())
        if not count:
            raise ConnectionError("it closed the connection")
        done = reader.advance(count)
        if done is not None:
            return done
