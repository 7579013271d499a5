"""Commands on several hosts, as processes: who serves, who follows, and that none of them outlives a lost host."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxinfer.config import ConfigError
from jaxinfer.request import FinishReason, SamplingParams
from serving import client as api
from serving.async_engine import AsyncEngine, State
from serving.client import Client
from serving.errors import status_of
from serving.eval_cli import _require_writable
from serving.several_hosts import ALONE, Team
from sharding.control import HostLostError
from sharding.hosts import Place

REPOSITORY = Path(__file__).parents[2]
MODEL = Path(__file__).parents[1] / "goldens" / "llama"
READY_S = 120.0  # the machine may be busy
BAR_S = 30.0  # from the death of a host to the end of the others
# The command line with an engine that needs no model: host 0 tells the others of each step, and in mode "hang" its
# steps do not return once it is told to, like a collective whose peer is gone.
PROGRAM = """
import os, sys, threading, time, types
from concurrent.futures import ThreadPoolExecutor
mode = sys.argv[2]
sys.path.insert(0, sys.argv[1])
from conftest import FakeEngine
from sharding.control import Kind, Message
compiling = threading.Event()
class Engine(FakeEngine):
    def __init__(self, model, config, *, devices=None, progress=None, group=None):
        super().__init__(slots=4, max_model_len=1 << 30, pace_s=0.002)
        self.group, self.num_followed = group, 0
        if mode == "no memory" and group.rank:
            raise MemoryError("no room for weights")
        if mode == "a replica fails" and devices[0].id == 1:
            assert compiling.wait(60)
            raise MemoryError("no room for weights")
        os.write(1, b"[Gloo] noise\\n")
    def warm_up(self, progress=None):
        while mode == "compiles for ever" and self.group.rank:
            time.sleep(1)
        if mode == "a replica fails":
            compiling.set()
            with ThreadPoolExecutor(1) as pool:  # as an engine does: Python would wait for these at its end
                list(pool.map(time.sleep, [1000]))
    def step(self):
        if self.group is not None:
            self.group.broadcast(Message(Kind.CALL, call=self.num_steps))
        while mode == "hang" and self.num_steps > 20:
            time.sleep(1)
        return super().step()
    def follow(self, message):
        self.num_followed += 1
    def close(self):
        super().close()
        if self.group is not None and self.group.rank:
            print("followed", self.num_followed, file=sys.stderr, flush=True)
module = types.ModuleType("jaxinfer.engine")
module.Engine = Engine
sys.modules["jaxinfer.engine"] = module
import serving.generate
def run(args):  # what every command but serve does, with an engine of this test
    engine = Engine(args.model, None, **args.team.engine_options())
    args.team.follow(engine)
    engine.group.broadcast(Message(Kind.CALL))
    print("the result", flush=True)
    while mode == "stuck":
        time.sleep(1)
    return 0
serving.generate.run = run
from serving.cli import main
sys.exit(main(sys.argv[3:]))
"""


class Host:
    """One host's process."""

    def __init__(self, mode: str, *arguments: str):
        command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), mode, *arguments]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.err: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.err.append(line.rstrip("\n"))
                self._changed.notify_all()

    def until(self, text: str) -> None:
        """Return when it has said `text` on stderr."""
        with self._changed:
            assert self._changed.wait_for(lambda: any(text in line for line in self.err), READY_S), self.err

    def line(self) -> str:
        """The next line of its stdout."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.err
        return line

    def end(self, timeout_s: float = 2 * READY_S) -> tuple[int, str]:
        """Exit code and the last line of stderr; fails past `timeout_s`."""
        code = self.process.wait(timeout_s)
        self._reader.join(10)
        return code, self.err[-1]


@contextlib.contextmanager
def hosts(mode: str, *arguments: str, size: int = 2, differ: tuple[str, ...] = ()) -> Iterator[list[Host]]:
    """`size` hosts of one command; the last one gets `differ` as well. What still runs at the end is killed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        coordinator = f"127.0.0.1:{listener.getsockname()[1]}"
    shared = [*arguments, "--coordinator", coordinator, "--num-hosts", str(size), "--join-timeout-s", "100"]
    found = [Host(mode, *shared, "--host-id", str(i), *(differ if i == size - 1 else ())) for i in range(size)]
    try:
        yield found
    finally:
        for host in found:
            host.process.kill()
            host.process.wait()


def serve(*flags: str) -> tuple[str, ...]:
    return ("serve", str(MODEL), "--port", "0", "--json", *flags)


@contextlib.contextmanager
def served(mode: str, *flags: str, size: int = 2) -> Iterator[tuple[list[Host], Client, str]]:
    """A server on several hosts that takes requests."""
    with hosts(mode, *serve(*flags), size=size) as found:
        address = json.loads(found[0].line())["address"]
        with Client(address) as client:
            client.wait_ready(READY_S)
            for follower in found[1:]:
                follower.until("ready, following host 0")
            yield found, client, address


def test_host_0_serves_the_others_follow_and_sigterm_ends_all_in_order() -> None:
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    with served("serve") as ((leader, follower), client, _):
        assert len(client.generate([3, 4], sampling).completions[0].token_ids) == 40
        leader.process.send_signal(signal.SIGTERM)
        ends = [leader.end(), follower.end()]
    assert [code for code, _ in ends] == [0, 0], (leader.err, follower.err)
    assert any("host 0 of 2, waiting for the others on 127.0.0.1:" in line for line in leader.err)
    assert ends[1][1] == "followed 40"
    assert follower.process.stdout is not None and follower.process.stdout.read() == ""
    assert "[Gloo] noise" in leader.err, "what libraries write to stdout is not the command's"


def test_sigterm_on_a_follower_drains_the_group() -> None:
    """As when an orchestrator stops all of them: whoever hears first, running requests end well."""
    with served("serve") as ((leader, follower), client, _):
        stream = client.stream([3], SamplingParams(max_tokens=300, ignore_eos=True))
        chunks = [next(stream)]
        follower.process.send_signal(signal.SIGTERM)
        leader.until("was told to stop: SIGTERM")
        leader.process.send_signal(signal.SIGTERM)  # its own first one, not a second
        chunks += stream
        ends = [leader.end(), follower.end()]
    assert [code for code, _ in ends] == [0, 0], (leader.err, follower.err)
    assert sum(len(chunk.token_ids) for chunk in chunks) == 300
    assert chunks[-1].finish_reason is FinishReason.LENGTH


def test_of_other_commands_host_0_prints_and_the_others_follow() -> None:
    with hosts("generate", "generate", str(MODEL), "--prompt", "x") as (leader, follower):
        ends = [leader.end(), follower.end()]
        outs = [host.process.stdout.read() for host in (leader, follower) if host.process.stdout is not None]
    assert outs == ["the result\n", ""] and [code for code, _ in ends] == [0, 0], (leader.err, follower.err)
    assert ends[1][1] == "followed 1"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_stuck_ends_with_its_follower(number: signal.Signals) -> None:
    with hosts("stuck", "generate", str(MODEL), "--prompt", "x") as (leader, follower):
        assert leader.line() == "the result\n"
        follower.until("ready, following host 0")
        follower.process.send_signal(number)
        code, last = leader.end(BAR_S)
        reason = "it was told to stop: SIGTERM" if number is signal.SIGTERM else "its connection was closed"
        assert code == 1 and last.startswith("jaxinfer: host 1 of 2 (") and f" was lost: {reason}" in last, last
        assert number is signal.SIGKILL or follower.end(BAR_S)[0] == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_lost_follower_ends_host_0_although_its_engine_hangs(number: signal.Signals) -> None:
    with served("hang") as ((leader, follower), client, address):
        streams = [client.stream([i], SamplingParams(max_tokens=100_000, ignore_eos=True)) for i in range(3)]
        for stream in streams:
            next(stream)
        health = health_pb2_grpc.HealthStub(grpc.insecure_channel(address))
        watch = iter(health.Watch(health_pb2.HealthCheckRequest()))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        time.sleep(1)  # by now the engine hangs
        began_s = time.monotonic()
        follower.process.send_signal(number)
        for stream in streams:
            with pytest.raises(api.UnavailableError) as caught:
                list(stream)
            assert caught.value.message == "host 1 of 2 of this server was lost, and the server ends"
            assert caught.value.reason == "HOST_LOST" and caught.value.retry_after_s is None
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        code, last = leader.end(BAR_S)
        assert time.monotonic() - began_s < BAR_S
    assert code == 1 and last.startswith(f"jaxinfer: host 1 of 2 ({socket.gethostname()}, 127.0.0.1) was lost: "), last
    assert not any("Traceback" in line for line in leader.err), leader.err


@pytest.mark.parametrize(
    ("number", "size"), [(signal.SIGKILL, 2), pytest.param(signal.SIGSTOP, 3, marks=pytest.mark.slow)]
)
def test_a_lost_host_0_ends_its_followers(number: signal.Signals, size: int) -> None:
    with served("serve", size=size) as ((leader, *followers), _, _):
        began_s = time.monotonic()
        leader.process.send_signal(number)
        ends = [follower.end(BAR_S) for follower in followers]
        assert time.monotonic() - began_s < BAR_S
    for code, last in ends:
        assert code == 1 and last.startswith(f"jaxinfer: host 0 of {size} (127.0.0.1:"), last


@pytest.mark.slow
def test_a_follower_that_cannot_load_ends_all_and_says_why() -> None:
    with hosts("no memory", *serve()) as (leader, follower):
        ends = [leader.end(), follower.end()]
    assert ends[1] == (1, "jaxinfer serve: error: no room for weights")
    assert ends[0][0] == 1 and ends[0][1].endswith(") was lost: MemoryError: no room for weights"), ends
    assert ends[0][1].startswith("jaxinfer: host 1 of 2 (")


def test_a_replica_that_fails_ends_the_process_while_another_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    host = Host("a replica fails", *serve("--replicas", "2"))
    try:
        host.until("loaded; compiling")
        assert host.end(BAR_S) == (1, "jaxinfer serve: error: no room for weights")
    finally:
        host.process.kill()


@pytest.mark.slow
def test_sigterm_reaches_a_follower_that_still_compiles() -> None:
    with hosts("compiles for ever", *serve()) as (leader, follower):
        leader.until("ready on")
        leader.process.send_signal(signal.SIGTERM)
        ends = [leader.end(), follower.end()]
    assert [code for code, _ in ends] == [0, 0], (leader.err, follower.err)


def test_hosts_with_other_options_do_not_begin() -> None:
    with hosts("serve", *serve(), differ=("--max-num-seqs", "3")) as found:
        ends = [host.end() for host in found]
    for code, last in ends:
        assert code == 2, last
        assert last.startswith("jaxinfer serve: error: host 1 of 2 (")
        assert "differs: max_num_seqs is 3 there and 16 on host 0" in last


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-hosts", "2"), "--num-hosts without --coordinator and --host-id"),
        (("--coordinator", "h:1", "--num-hosts", "2", "--host-id", "2"), "--host-id 2 must be from 0 to 1"),
        (("--replicas", "2", "--coordinator", "h:1", "--num-hosts", "2", "--host-id", "0"), "several hosts serve one"),
    ],
)
def test_flags_that_make_no_group_are_refused(flags: tuple[str, ...], message: str) -> None:
    host = Host("serve", *serve(*flags))
    code, last = host.end()
    assert code == 2 and message in last, last


# ---- in this process -------------------------------------------------------------------------------------------------


def test_a_command_without_the_flags_or_alone_is_run_as_ever() -> None:
    assert Team.of(argparse.Namespace()).run(lambda: 7, joins_itself=False, end=pytest.fail) == 7
    ALONE.join()
    ALONE.follow(None)
    ALONE.close()
    ALONE.leave_process(3)
    assert ALONE.engine_options() == {} and not ALONE.is_several and not ALONE.follows


def test_only_host_0_has_to_be_able_to_write_results(tmp_path: Path) -> None:
    args = argparse.Namespace(team=ALONE)
    with pytest.raises(ConfigError, match="cannot be written"):
        _require_writable(args, str(tmp_path / "none" / "result.json"))
    args.team = Team(place=Place("flags", "10.0.0.1", 8400, 2, 1))
    _require_writable(args, str(tmp_path / "none" / "result.json"))


def test_what_clients_hear_of_a_lost_host_names_no_address() -> None:
    status, retry_after_s = status_of(HostLostError(1, 2, "node7, 10.1.2.3", "no sign of life for 15 s"))
    assert status.code == grpc.StatusCode.UNAVAILABLE.value[0] and retry_after_s is None
    assert "host 1 of 2" in status.message and "10.1.2.3" not in str(status)


@pytest.mark.asyncio
async def test_failing_the_engine_from_another_thread_tells_everybody_once(fakes: Any) -> None:
    fake = fakes.Engine()
    engine = AsyncEngine(lambda progress: fake)
    engine.start()
    await engine.until_ready()
    fake.go.clear()  # the engine hangs from here on
    stream = engine.submit(_request())
    assert await asyncio.to_thread(fake.stepping.wait, 10)  # or it would answer the call first
    call = asyncio.create_task(engine.call(lambda e: e.info()))
    await asyncio.sleep(0)  # it waits by now
    error = HostLostError(1, 2, "node7", "its connection was closed: the process ended")
    for _ in range(2):
        threading.Thread(target=engine.fail, args=(error,)).start()
    for waiting in (stream.__anext__(), call):
        with pytest.raises(HostLostError) as caught:
            await waiting
        assert caught.value is error
    assert engine.state is State.DEAD and engine.error is error
    with pytest.raises(HostLostError):
        engine.submit(_request())
    with pytest.raises(HostLostError):
        await engine.call(lambda e: e.info())
    began_s = time.monotonic()
    assert not await engine.stop() and time.monotonic() - began_s < 5, "a thread that hangs is left behind"
    fake.step_error = ValueError("the collective failed in the end")
    fake.go.set()
    engine._thread.join(10)
    assert engine.error is error, "the first reason stands"


def _request() -> Any:
    from jaxinfer.request import Request

    return Request("name", (1, 2), SamplingParams(max_tokens=5, ignore_eos=True))
