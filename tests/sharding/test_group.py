"""A group of hosts in one process, sockets alone: who is let in, who hears what, and who is found to be gone."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from sharding import rendezvous
from sharding.control import HostLostError, Kind, Message, frame
from sharding.group import Group
from sharding.hosts import HostsError, Place
from sharding.rendezvous import Gathered, gather

TOKEN = b"0123456789abcdef"
NAME = socket.gethostname()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def come(port: int, host_id: int, size: int = 2, *, token: bytes = TOKEN, timeout_s: float = 20.0) -> Gathered:
    place = Place("test", "127.0.0.1", port, size, host_id)
    return gather(place, token=token, timeout_s=timeout_s, say=lambda text: None)


class Hosts:
    """Groups that have met; all of them are closed at the end of the test."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self.pool = ThreadPoolExecutor(8)
        self.sockets: list[socket.socket] = []

    def meet(self, size: int, *, lost_after_s: float = 20.0, silent: int | None = None) -> list[Group]:
        """A group of `size` hosts; host `silent` is its socket alone, which is the last of `sockets`."""
        port = free_port()
        gathered = list(self.pool.map(lambda i: come(port, i, size), range(size)))
        for host_id, found in enumerate(gathered):
            if host_id == silent:
                self.sockets.append(found.links[0].connection)
            else:
                place = Place("test", "127.0.0.1", port, size, host_id)
                self.groups.append(Group(place, found.links, lost_after_s=lost_after_s))
        return self.groups

    def close(self) -> None:
        for group in reversed(self.groups):
            group.close(0)
        for connection in self.sockets:
            connection.close()
        self.pool.shutdown()


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    found = Hosts()
    yield found
    found.close()
    leftover = [t.name for t in threading.enumerate() if t.name == "jaxinfer-hosts"]
    assert not leftover


def losses(groups: list[Group]) -> list[HostLostError]:
    """What `on_lost` tells each group, within 10 seconds."""
    told: queue.Queue[HostLostError] = queue.Queue()
    for group in groups:
        group.on_lost(told.put)
    return [told.get(timeout=10) for _ in groups]


# ---- coming together -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token": b"another token..."}, "refuses this host, 1: its token is not host 0's"),
        ({"token": b""}, "refuses this host, 1: its token is not host 0's"),
        ({"size": 4}, "it is one of 4 hosts, host 0 is one of 3"),
        ({"host_id": 3, "size": 4}, "it is one of 4 hosts"),
        ({"host_id": 2}, rf"host 2 is there already \({NAME}, 127.0.0.1\)"),
    ],
)
def test_who_does_not_belong_is_told_why_and_keeps_nobody_out(change: dict[str, Any], message: str) -> None:
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        leader = pool.submit(come, port, 0, 3)
        second = pool.submit(come, port, 2, 3)
        time.sleep(0.5)  # the second is there
        with pytest.raises(HostsError, match=message):
            come(port, **{"host_id": 1, "size": 3, **change})
        third = pool.submit(come, port, 1, 3)
        gathered = [future.result(20) for future in (leader, second, third)]
    assert [link.host_id for link in gathered[0].links] == [1, 2]
    assert len({found.jax_port for found in gathered}) == 1
    for found in gathered:
        for link in found.links:
            link.close()


def test_a_stranger_that_answers_for_host_0_is_found_out() -> None:
    """Who has not the token cannot welcome anybody, whatever it replays."""

    def stranger(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"".join(frame(Kind.CHALLENGE, bytes(32))))
            connection.recv(4096)
            connection.sendall(b"".join(frame(Kind.WELCOME, rendezvous.WELCOME.pack(1, bytes(32)))))
            connection.recv(4096)

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        pool.submit(stranger, listener)
        with pytest.raises(HostsError, match="has not this host's token"):
            come(listener.getsockname()[1], 1)


def test_strangers_that_say_nothing_or_nonsense_keep_nobody_out() -> None:
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        leader = pool.submit(come, port, 0)
        strangers = []
        for words in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            frame(Kind.HELLO, bytes(3)),
            bytes([2, 0, 0, 0, 255, 255, 255, 255]),
        ):
            while True:
                try:
                    strangers.append(socket.create_connection(("127.0.0.1", port), timeout=5))
                    break
                except ConnectionRefusedError:
                    time.sleep(0.05)
            strangers[-1].sendall(b"".join(words) if isinstance(words, list) else words)
        found = [come(port, 1), leader.result(20)]
        for stranger in strangers:
            stranger.close()
    for gathered in found:
        gathered.links[0].close()


def test_a_host_that_was_started_anew_is_let_in_again() -> None:
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        leader = pool.submit(come, port, 0, 3)
        early = pool.submit(come, port, 1, 3, timeout_s=0.8)  # gives up: its connection closes
        with pytest.raises(HostsError, match=r"did not gather all 3 hosts within 0\.8 s"):
            early.result(20)
        others = [pool.submit(come, port, i, 3) for i in (1, 2)]
        found = [future.result(20) for future in (leader, *others)]
    for gathered in found:
        for link in gathered.links:
            link.close()


def test_nobody_waits_longer_than_was_said() -> None:
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        leader = pool.submit(come, port, 0, 4, timeout_s=1.5)
        follower = pool.submit(come, port, 2, 4)
        text = rf"hosts 1, 3 of 4 did not come to 127\.0\.0\.1:{port} within 1\.5 s"
        with pytest.raises(HostsError, match=rf"^{text} \(--join-timeout-s\)$"):
            leader.result(20)
        with pytest.raises(HostsError, match=f"refuses this host, 2: {text}"):
            follower.result(20)
    with pytest.raises(HostsError, match=rf"host 0 at 127\.0\.0\.1:{port} did not gather .* refused"):
        come(port, 1, timeout_s=0.5)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(HostsError, match=rf"host 0 cannot wait on 127\.0\.0\.1:{port} .*in use"):
            come(port, 0)


def test_what_host_0_listens_on() -> None:
    assert [rendezvous.bind_address(host) for host in ("localhost", "127.0.0.1", "127.1.2.3")] == [
        "127.0.0.1",
        "127.0.0.1",
        "127.1.2.3",
    ]
    assert rendezvous.bind_address("192.0.2.1") == ""  # an address of documentation, no machine's own (RFC 5737)
    assert rendezvous.bind_address("node7.cluster") == ""


# ---- messages --------------------------------------------------------------------------------------------------------


def test_every_follower_gets_every_message_in_order(hosts: Hosts) -> None:
    leader, *followers = hosts.meet(3)
    assert leader.is_leader and [group.rank for group in hosts.groups] == [0, 1, 2] and leader.size == 3
    rng = np.random.default_rng(0)
    sent = []
    for i in range(200):
        shapes = [(i % 7 + 1,), (2, 300 * (i % 11) + 1)][: 1 + i % 2]
        buffers = tuple(rng.integers(-(2**31), 2**31, shape, np.int32) for shape in shapes)
        sent.append(Message(Kind.CALL, i, 2 * i, "scores" if i % 3 else "", 7 * i, buffers))
        if i % 50 == 49:
            sent.append(Message(Kind.RESET))
    for message in sent:
        leader.broadcast(message)
    for follower in followers:
        for message in sent:
            got = follower.receive(10)
            assert got is not None
            for name in ("kind", "num_slots", "prefill_tokens", "reader", "call"):
                assert getattr(got, name) == getattr(message, name)
            assert len(got.buffers) == len(message.buffers) and all(map(np.array_equal, got.buffers, message.buffers))
        assert follower.receive(0.01) is None
    ends = [hosts.pool.submit(_follow_to_the_end, follower) for follower in followers]
    assert leader.close() and [end.result(10) for end in ends] == [Kind.STOP] * 2
    assert all(group.lost is None for group in hosts.groups)


def _follow_to_the_end(group: Group) -> Kind:
    message = group.receive(10)
    assert message is not None and group.stopped.is_set()
    group.close()
    return message.kind


def test_a_follower_that_does_not_end_is_left_behind(hosts: Hosts) -> None:
    leader, follower = hosts.meet(2)
    assert not leader.close(0.2)
    assert follower.stopped.wait(10) and follower.lost is None


def test_sending_never_waits_and_who_does_not_read_is_lost(hosts: Hosts) -> None:
    [leader] = hosts.meet(2, lost_after_s=1.0, silent=1)
    done = threading.Event()

    def alive() -> None:
        while not done.wait(0.2):
            hosts.sockets[0].send(b"".join(frame(Kind.BEAT)))

    hosts.pool.submit(alive)
    call = Message(Kind.CALL, buffers=(np.zeros(1 << 21, np.int32),))
    began_s = time.monotonic()
    for _ in range(6):
        leader.broadcast(call)  # 48 MB, far more than sockets hold
    assert time.monotonic() - began_s < 0.9
    [lost] = losses([leader])
    done.set()
    assert "it has not read what it was sent for 1 s" in str(lost)
    with pytest.raises(HostLostError):
        leader.broadcast(call)


# ---- losses ----------------------------------------------------------------------------------------------------------


def _hang_up(hosts: Hosts) -> None:
    hosts.sockets[0].close()


def _nothing(hosts: Hosts) -> None:
    pass


def _nonsense(hosts: Hosts) -> None:
    hosts.sockets[0].send(b"".join(frame(Kind.STOP)))


def _claim(hosts: Hosts) -> None:
    hosts.sockets[0].send(bytes([Kind.LOST, 0, 0, 0, 255, 255, 255, 255]))


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (_hang_up, "its connection was closed: the process ended"),
        (_nothing, "no sign of life for 2 s"),
        (_nonsense, "it sent a frame of kind 11, which is not one that may come here"),
        (_claim, "it sent a LOST frame of 4,294,967,295 bytes; the limit is 2,048"),
    ],
)
def test_every_host_hears_which_host_is_lost(hosts: Hosts, act: Callable[[Hosts], None], reason: str) -> None:
    survivors = hosts.meet(4, lost_after_s=2.0, silent=2)
    act(hosts)
    found = losses(survivors)
    for error in found:
        assert error.host == "host 2 of 4" and error.host_id == 2 and error.reason == reason
        assert str(error) == f"host 2 of 4 ({NAME}, 127.0.0.1) was lost: {reason}"
    with pytest.raises(HostLostError, match="host 2 of 4"):
        survivors[0].broadcast(Message(Kind.RESET))
    for follower in survivors[1:]:
        for _ in range(2):  # it stays so
            with pytest.raises(HostLostError, match="host 2 of 4"):
                follower.receive(10)
    assert set(losses(survivors)) == set(found), "who registers later is told, too"
    assert not survivors[0].close(5)


def test_a_silent_leader_is_lost_to_every_follower() -> None:
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        leader, follower = pool.map(lambda i: come(port, i), range(2))
    group = Group(Place("test", "127.0.0.1", port, 2, 1), follower.links, lost_after_s=1.0)
    [lost] = losses([group])
    assert str(lost) == f"host 0 of 2 (127.0.0.1:{port}) was lost: no sign of life for 1 s"
    group.close()
    leader.links[0].close()


@pytest.mark.parametrize("who", [0, 1])
def test_who_cannot_go_on_says_why(hosts: Hosts, who: int) -> None:
    groups = hosts.meet(3)
    groups[who].fail("ValueError: no such model")
    others = [group for group in groups if group.rank != who]
    for error in losses(others):
        assert error.host == f"host {who} of 3" and error.reason == "ValueError: no such model"
    assert not groups[who].close(0)


def test_a_follower_that_is_told_to_stop(hosts: Hosts) -> None:
    leader, follower, other = hosts.meet(3)
    asked: queue.Queue[str] = queue.Queue()
    leader.on_leave(asked.put)
    follower.leave("SIGTERM")
    assert asked.get(timeout=10) == f"host 1 of 3 ({NAME}, 127.0.0.1) was told to stop: SIGTERM"
    leader.broadcast(Message(Kind.RESET))
    for group in (follower, other):
        message = group.receive(10)
        assert message is not None and message.kind is Kind.RESET and group.lost is None, "the group goes on"


def test_where_nobody_can_stop_in_order_the_group_ends(hosts: Hosts) -> None:
    leader, follower = hosts.meet(2)
    follower.leave("SIGTERM")
    for error in losses([leader, follower]):
        assert error.host == "host 1 of 2" and error.reason == "it was told to stop: SIGTERM"


def test_a_failed_call_may_turn_out_to_be_a_lost_host(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = hosts.meet(2)
    monkeypatch.setattr("sharding.group.LOST_S", 0.01)
    leader.check_after(RuntimeError("the call failed"))
    monkeypatch.setattr("sharding.group.LOST_S", 10.0)
    leader.check_after(HostsError("host 1 could not compile"))  # at once: it has just said so
    threading.Timer(0.3, follower.fail, ("it is ill",)).start()
    with pytest.raises(HostLostError, match="it is ill"):
        leader.check_after(RuntimeError("the call failed"))


def test_who_waits_for_an_answer_hears_of_the_orderly_end(hosts: Hosts) -> None:
    leader, follower = hosts.meet(2)
    waiting = hosts.pool.submit(follower.agree, {"a": 1})
    leader.broadcast(Message(Kind.STOP))
    with pytest.raises(HostsError, match="host 0 has ended the group"):
        waiting.result(10)


# ---- agreement -------------------------------------------------------------------------------------------------------


def test_hosts_agree_again_and_again(hosts: Hosts) -> None:
    groups = hosts.meet(3)
    for facts in ({"a": 1, "b": [1, 2]}, {}, {"pages": "100"}):
        list(hosts.pool.map(lambda group, facts=facts: group.agree(facts), groups))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"model": "x", "seats": 8}, f"host 2 of 3 ({NAME}, 127.0.0.1) differs: seats is 8 there and 16 on host 0;"),
        ({"model": "x"}, "differs: seats is null there and 16 on host 0;"),
        ({"model": "x", "seats": 16, "more": "é"}, "differs: more is "),
    ],
)
def test_every_host_hears_who_differs(hosts: Hosts, other: dict[str, Any], message: str) -> None:
    groups = hosts.meet(3)
    facts = [{"model": "x", "seats": 16}] * 2 + [other]
    for future in [hosts.pool.submit(g.agree, each, "use the same") for g, each in zip(groups, facts, strict=True)]:
        with pytest.raises(HostsError) as caught:
            future.result(10)
        assert message in str(caught.value) and str(caught.value).endswith("; use the same")


def test_work_is_done_when_all_have_done_it(hosts: Hosts) -> None:
    leader, follower = hosts.meet(2)
    slow = threading.Event()
    futures = [
        hosts.pool.submit(leader.prepare, Message(Kind.CALL, 4, 64), lambda: "here"),
        hosts.pool.submit(lambda: follower.prepare(_received(follower, 4, 64), lambda: slow.wait(10) and "there")),
    ]
    time.sleep(0.3)
    assert not futures[0].done()
    slow.set()
    assert [future.result(10) for future in futures] == ["here", "there"]


@pytest.mark.parametrize("who", [0, 1])
def test_work_that_fails_on_one_host_leaves_no_other_waiting(hosts: Hosts, who: int) -> None:
    groups = hosts.meet(2)

    def fails() -> None:
        raise MemoryError("no room")

    for attempt in range(2):  # what was said the first time does not disturb the second
        message = Message(Kind.CALL, attempt + 1, 0, "scores")
        works = [fails if group.rank == who else lambda: None for group in groups]
        leading = hosts.pool.submit(groups[0].prepare, message, works[0])
        following = hosts.pool.submit(groups[1].prepare, _received(groups[1], attempt + 1, 0), works[1])
        with pytest.raises(MemoryError):
            (leading, following)[who].result(10)
        with pytest.raises(HostsError, match=r"program \(., 0, 'scores'\) is .*failed: MemoryError: no room"):
            (leading, following)[1 - who].result(10)


def test_all_begin_anew_when_the_calls_of_all_have_ended(hosts: Hosts) -> None:
    leader, *followers = hosts.meet(3)
    leading = hosts.pool.submit(leader.restart)
    for follower in followers:
        message = follower.receive(10)
        assert message is not None and message.kind is Kind.RESET and not leading.done()
    list(hosts.pool.map(Group.restart, followers))
    assert leading.result(10) is None


def test_a_call_that_does_not_end_after_a_failure_ends_the_group(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the part of host 0, whose call failed alone; what host 0 calls next would be taken for it."""
    monkeypatch.setattr("sharding.group.RESTART_S", 0.3)
    leader, ended, stuck = hosts.meet(3)
    ending = hosts.pool.submit(ended.restart)
    expected = (
        "its device call failed (no memory), and those of others have not ended: no answer from hosts 2 of 3 within"
    )
    with pytest.raises(RuntimeError) as caught:
        leader.restart("no memory")
    assert str(caught.value) == f"{expected} 0.3 s"
    with pytest.raises(HostLostError):
        ending.result(10)
    assert all(expected in str(loss) for loss in losses([ended, stuck]))
    for more in (lambda: leader.broadcast(Message(Kind.CALL)), lambda: leader.agree({}), leader.restart):
        with pytest.raises(RuntimeError, match="this host has failed, and the group ends"):
            more()


def test_both_ends_notice_a_peer_that_is_gone_without_a_word(hosts: Hosts) -> None:
    [leader] = hosts.meet(2, silent=1)
    for connection in (leader._links[0].connection, hosts.sockets[0]):
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def _received(group: Group, num_slots: int, prefill_tokens: int) -> Message:
    message = group.receive(10)
    assert message is not None
    assert (message.kind, message.num_slots, message.prefill_tokens) == (Kind.PREPARE, num_slots, prefill_tokens)
    return message


def test_facts_that_are_no_facts(hosts: Hosts) -> None:
    [leader] = hosts.meet(2, silent=1)
    hosts.sockets[0].send(b"".join(frame(Kind.AGREE, b"[" * 60_000)))
    with pytest.raises(HostLostError, match="it sent facts that are no JSON"):
        leader.agree({})


def test_waiting_for_facts_ends_with_the_host(hosts: Hosts) -> None:
    [leader] = hosts.meet(2, silent=1)
    threading.Timer(0.2, hosts.sockets[0].close).start()
    with pytest.raises(HostLostError, match="host 1 of 2"):
        leader.agree({"a": 1})
