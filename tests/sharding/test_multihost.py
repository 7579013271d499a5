"""Hosts as processes of their own, with jax across them: what they compute, and what is left when one of them dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from sharding import multihost
from sharding.host_arrays import from_devices, to_devices
from sharding.mesh import make_mesh
from sharding.mesh_config import MeshConfig
from sharding.multihost import HostsConfig, HostsError, find, join

REPOSITORY = Path(__file__).parents[2]
BAR_S = 30.0  # from the death of a host to the end of the others
MEMBER = """
import json, os, sys, threading, time
flags, mode = json.loads(sys.argv[1]), sys.argv[2]
from sharding.host_arrays import from_devices, to_devices
from sharding.multihost import HostsConfig, HostsError, HostLostError, Kind, Message, join
sys.stdout = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # gloo writes to stdout
def say(**what):
    print(json.dumps(what), flush=True)
def end(error):
    print("jaxinfer:", error, file=sys.stderr, flush=True)
    os._exit(3)
import numpy as np
config = HostsConfig(**flags)
try:
    group = join(config, facts={"mode": mode})
except (HostsError, HostLostError) as error:
    end(error)
group.on_lost(lambda error: (time.sleep(0.5), end(error)))
import jax
from sharding.mesh import make_mesh
from sharding.mesh_config import MeshConfig
mesh = make_mesh(MeshConfig(tensor=group.size))
split, whole = mesh.sharding(mesh.names("tensor")), mesh.everywhere
total = jax.jit(lambda a, b: (a * b).sum() + b, out_shardings=whole)
def run(buffer):
    return from_devices(total(to_devices(buffer, split), to_devices(buffer[:1], whole))).tolist()
say(rank=group.rank, pid=os.getpid(), devices=jax.device_count(), local=jax.local_device_count())
rng = np.random.default_rng(0)
def lead():
    for i in range(5):
        buffer = rng.integers(0, 99, 4 * group.size, np.int32)
        group.broadcast(Message(Kind.CALL, i, buffers=(buffer,)))
        say(call=i, result=run(buffer), expected=((buffer * buffer[0]).sum() + buffer[:1]).tolist())
    if mode == "stop":
        say(orderly=group.close())
    while mode == "hang":  # calls until one does not return, or fails
        buffer = rng.integers(0, 99, 4 * group.size, np.int32)
        group.broadcast(Message(Kind.CALL, buffers=(buffer,)))
        run(buffer)
        time.sleep(0.05)
def follow():
    while (message := group.receive()).kind is not Kind.STOP:
        result = run(*message.buffers)
        if mode == "stop":
            say(call=message.num_slots, result=result)
    group.close()
try:
    lead() if group.is_leader else follow()
except (ValueError, HostLostError):  # gloo met the end of its peer, or we did: `end` is told
    time.sleep(60)
os._exit(0)
"""


class Member:
    """One host's process."""

    def __init__(self, flags: dict[str, Any], mode: str):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        command = [sys.executable, "-c", MEMBER, json.dumps(flags), mode]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def line(self) -> dict[str, Any]:
        """The next thing it says."""
        assert self.process.stdout is not None and self.process.stderr is not None
        text = self.process.stdout.readline()
        assert text, self.process.stderr.read()
        return json.loads(text)

    def end(self, timeout_s: float = 60.0) -> tuple[int, str, str]:
        """Exit code, stdout, stderr; fails past `timeout_s`."""
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, err


@contextlib.contextmanager
def members(size: int, mode: str, count: int | None = None, **flags: Any) -> Iterator[list[Member]]:
    """The first `count` (all) of `size` hosts; what still runs at the end is killed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        coordinator = f"127.0.0.1:{listener.getsockname()[1]}"
    flags = {"coordinator": coordinator, "num_hosts": size, "join_timeout_s": 60.0, **flags}
    found = [Member({**flags, "host_id": i}, mode) for i in range(size if count is None else count)]
    try:
        yield found
    finally:
        for member in found:
            member.process.kill()
            member.process.communicate()


def _run_in_order(size: int) -> None:
    with members(size, "stop") as hosts:
        firsts = [host.line() for host in hosts]
        assert [(line["rank"], line["devices"], line["local"]) for line in firsts] == [
            (rank, size, 1) for rank in range(size)
        ]
        ends = [host.end() for host in hosts]
    assert [code for code, _, _ in ends] == [0] * size, [err for _, _, err in ends]
    lines = [[json.loads(line) for line in out.splitlines()] for _, out, _ in ends]
    *calls, last = lines[0]
    assert last == {"orderly": True} and len(calls) == 5
    for i, call in enumerate(calls):
        assert call["call"] == i and call["result"] == call["expected"]
    for follower in lines[1:]:
        assert follower == [{"call": call["call"], "result": call["result"]} for call in calls]


def test_two_hosts_compute_as_one_and_end_in_order() -> None:
    _run_in_order(2)


@pytest.mark.slow
def test_four_hosts_compute_as_one_and_end_in_order() -> None:
    _run_in_order(4)


def _lose(size: int, victim: int, number: signal.Signals, **flags: Any) -> list[tuple[int, str, str, float]]:
    """Signal a host of a group whose hosts wait for each other; exit code, stdout, stderr and seconds of the others."""
    with members(size, "hang", **flags) as hosts:
        for host in hosts:
            host.line()
        for _ in range(5):  # calls go through before
            assert "result" in hosts[0].line()
        began_s = time.monotonic()
        hosts[victim].process.send_signal(number)
        found = [(*host.end(BAR_S), time.monotonic() - began_s) for i, host in enumerate(hosts) if i != victim]
    for code, _, err, seconds in found:
        assert code == 3, err
        assert err.splitlines()[-1].startswith(f"jaxinfer: host {victim} of {size} ("), err
        assert seconds < BAR_S
    return found


def test_a_killed_follower_ends_host_0_that_waits_for_it() -> None:
    [(_, _, err, _)] = _lose(2, 1, signal.SIGKILL)
    name = socket.gethostname()
    expected = f"jaxinfer: host 1 of 2 ({name}, 127.0.0.1) was lost: its connection was closed: the process ended"
    assert err.splitlines()[-1] == expected


def test_a_killed_host_0_ends_its_followers_with_our_words_and_code() -> None:
    """Not with those of jax, whose service aborts the process from C++ at the same time."""
    [(_, _, err, _)] = _lose(2, 0, signal.SIGKILL)
    assert " was lost: its connection was closed: the process ended" in err.splitlines()[-1]


def test_a_follower_that_stands_still_ends_host_0_that_waits_for_it() -> None:
    [(_, _, err, seconds)] = _lose(2, 1, signal.SIGSTOP, lost_after_s=2.0)
    assert err.splitlines()[-1].endswith(" was lost: no sign of life for 2 s") and seconds < 10


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_four_hosts_end_within_the_bar_by_default(victim: int, number: signal.Signals) -> None:
    found = _lose(4, victim, number)
    assert len({err.splitlines()[-1] for _, _, err, _ in found}) == 1, "all of them say the same"


def test_a_host_that_does_not_come_is_named() -> None:
    with members(2, "stop", count=1, join_timeout_s=1.0) as [host]:
        code, out, err = host.end()
    assert (code, out) == (3, "")
    assert err.splitlines()[-1].startswith("jaxinfer: host 1 of 2 did not come to 127.0.0.1:"), err


def test_hosts_that_differ_do_not_begin() -> None:
    with members(2, "stop", count=1) as [host]:
        flags = json.loads(host.process.args[3]) | {"host_id": 1}
        other = Member(flags, "another mode")
        ends = [host.end(), other.end()]
    for code, out, err in ends:
        assert (code, out) == (3, "")
        assert 'differs: mode is "another mode" there and "stop" on host 0' in err.splitlines()[-1]


def test_hosts_that_listen_longer_than_others_beat_do_not_begin() -> None:
    with members(2, "stop", count=1, lost_after_s=2.0) as [host]:
        flags = json.loads(host.process.args[3]) | {"host_id": 1, "lost_after_s": 15.0}
        other = Member(flags, "stop")
        ends = [host.end(), other.end()]
    for code, _, err in ends:
        assert code == 3 and "differs: lost_after_s is 15.0 there and 2.0 on host 0" in err.splitlines()[-1], err


# ---- in this process -------------------------------------------------------------------------------------------------


def test_a_lone_host_joins_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(HostsConfig(hosts="none")) is None and join(HostsConfig(hosts="none")) is None
    monkeypatch.setenv("LWS_GROUP_SIZE", "2")
    monkeypatch.setenv("LWS_WORKER_INDEX", "1")
    monkeypatch.setenv("LWS_LEADER_ADDRESS", "leader")
    place = find(HostsConfig())
    assert place is not None and (place.coordinator, place.host_id) == ("leader:8400", 1)


def test_a_tpu_host_learns_its_place_from_what_jax_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """GKE's variables, which jax reads as it does a TPU VM's metadata; nothing is asked over the network."""
    monkeypatch.setattr(multihost, "_has_tpu", lambda: True)
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    variables = {"TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.2", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "2"}
    variables |= {"MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    place = find(HostsConfig())
    assert place is not None and (place.coordinator, place.num_hosts, place.host_id) == ("127.0.0.1:8482", 4, 3)
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "127.0.0.1")
    assert find(HostsConfig(hosts="tpu")) is None
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "one")
    with pytest.raises(HostsError, match=r"metadata do not say which host this is .* --hosts none"):
        find(HostsConfig())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"short\n", "has 5 bytes; 16 to 4096"),
        (b"x" * 5000, "16 to 4096 will do"),
    ],
)
def test_a_token_file_must_hold_a_token(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    config = HostsConfig(coordinator="127.0.0.1:1", num_hosts=2, host_id=1, hosts_token_file=str(path))
    with pytest.raises(HostsError, match=message):
        join(config)


@pytest.mark.parametrize("mesh", ["", "tensor=2", "data=2,tensor=4"])
def test_arrays_of_one_process_go_the_plain_way(mesh: str) -> None:
    buffer = np.arange(24, dtype=np.int32).reshape(2, 12)
    if not mesh:
        assert to_devices(buffer, None) is buffer
        assert np.array_equal(from_devices(jax.numpy.asarray(buffer)), buffer)
        return
    made = make_mesh(MeshConfig.parse(mesh))
    for sharding in (made.everywhere, made.by_data):
        placed = to_devices(buffer, sharding)
        assert placed.sharding == sharding and np.array_equal(from_devices(placed), buffer)
