"""A command that runs on several hosts at once: host 0 does what the command says, the others do its device calls.

Hides who joins when, signals on hosts that follow, C++ libraries that write to stdout, and that no process of the group
outlives a lost host: whatever its threads are stuck in, it says which host was lost and ends.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxinfer.config import EngineConfig, flag_fields
from serving.flags import config_from
from sharding.control import HostLostError
from sharding.hosts import HostsConfig, HostsError, Place

if TYPE_CHECKING:
    from sharding.group import Group

END_S = 12.0  # for host 0's clients to hear that a host was lost; then the process ends
SAY_S = 5.0  # for host 0 to say why it ends, where hosts disagreed
STOP_S = 8.0  # for a follower to end after STOP; then it is left to its device call
LAST_WORD_S = 0.5  # jax's service prints a stack trace when host 0 dies: ours shall be the last line


class Followed(Exception):
    """This host has followed to the orderly end; there is nothing else for it to do."""


class Team:
    """This process's part in a command; `say` hears of what goes on. Alone (`place` is None) it costs nothing."""

    def __init__(
        self,
        config: HostsConfig | None = None,
        place: Place | None = None,
        facts: dict[str, Any] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ):
        self._config = config
        self._place = place
        self._facts = facts or {}
        self._say = say
        self._group: Group | None = None
        self._joined = threading.Event()
        self._lock = threading.Lock()
        self._on_lost: list[Callable[[HostLostError], None]] = []
        self._on_leave: list[Callable[[str], object]] = []

    @classmethod
    def of(cls, args: argparse.Namespace) -> Team:
        """The team that the parsed arguments, or the launcher, describe. Raises HostsError."""
        if not hasattr(args, "num_hosts"):
            return cls()
        from sharding.multihost import find

        config = config_from(args, HostsConfig)
        return cls(config, find(config), _facts(args), args.progress.say)

    @property
    def is_several(self) -> bool:
        return self._place is not None

    @property
    def follows(self) -> bool:
        """Whether this is another host than host 0."""
        return self._place is not None and not self._place.is_leader

    # ---- for commands

    def join(self) -> None:
        """Meet the other hosts, once, before anything else of jax. Raises HostsError or HostLostError."""
        if self._place is None or self._group is not None:
            return
        from sharding.multihost import join

        assert self._config is not None
        group = join(self._config, self._place, facts=self._facts, say=self._say)
        assert group is not None
        self._say(f"all {group.size} hosts are there; this is host {group.rank}")
        with self._lock:
            self._group = group
            for on_lost in self._on_lost:
                group.on_lost(on_lost)
            for on_leave in self._on_leave:
                group.on_leave(on_leave)
        self._joined.set()

    def engine_options(self) -> dict[str, Any]:
        """Keyword arguments for Engine and LLM: the group, where there is one."""
        return {} if self._group is None else {"group": self._group}

    def follow(self, engine: Any) -> None:
        """On host 0, return. On another, do what host 0 says, to the end; then raise Followed."""
        if not self.follows:
            return
        from jaxinfer.follower import Follower

        assert self._group is not None
        self._say("ready, following host 0")
        Follower(engine, self._group).run()
        engine.close()
        raise Followed

    def on_lost(self, callback: Callable[[HostLostError], None]) -> None:
        """Call it, in another thread, when a host is lost; also before `join`."""
        with self._lock:
            self._on_lost.append(callback)
            if self._group is not None:
                self._group.on_lost(callback)

    def on_leave(self, callback: Callable[[str], object]) -> None:
        """Call it, in another thread, when a follower was told to stop; also before `join`."""
        with self._lock:
            self._on_leave.append(callback)
            if self._group is not None:
                self._group.on_leave(callback)

    # ---- for the command line

    def run(self, command: Callable[[], int], *, joins_itself: bool, end: Callable[[str], None]) -> int:
        """Run the command as this host's part has it; the exit code. `end` prints an error's text, for a last word.

        With `joins_itself` the command calls `join`, and on host 0 sees to it that a lost host ends it.
        """
        if self._place is None:
            return command()
        _keep_stdout_clean()

        def joined() -> int:
            if not joins_itself:
                self.join()
            return command()

        def leave(error: HostLostError) -> None:
            if joins_itself:
                time.sleep(END_S)
            end(str(error))
            os._exit(1)

        if self.follows:
            return self._supervise(joined)
        self.on_lost(leave)
        try:
            code = joined()
        except BaseException as error:
            if self._group is not None and isinstance(error, Exception):
                self._group.check_after(error)
            self._fail(error)
            raise
        self.close()
        return code

    def close(self) -> None:
        """Host 0's orderly end: the others end before it does."""
        if self._group is not None:
            self._group.close()

    def leave_process(self, code: int) -> None:
        """End the process, if others belong to it: at Python's own end jax would wait for all of them, or abort."""
        if self._place is not None:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    stream.flush()
            os._exit(code)

    def _fail(self, error: BaseException) -> None:
        if self._group is not None:
            self._group.fail(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)

    # ---- a follower's process

    def _supervise(self, command: Callable[[], int]) -> int:
        """Run the command in a thread: this one stays free for signals, losses and STOP."""
        ends: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
        self.on_lost(ends.put)

        def work() -> None:
            try:
                ends.put(command())
            except Followed:
                ends.put(0)
            except BaseException as error:
                ends.put(error)

        worker = threading.Thread(target=work, name="jaxinfer-follower", daemon=True)
        self._handle_signals()
        worker.start()
        threading.Thread(target=self._end_after_stop, args=(ends,), daemon=True).start()
        end = ends.get()
        if isinstance(end, HostsError) and self._group is not None:  # host 0 knows, and may know better: it goes first
            with contextlib.suppress(queue.Empty):
                end = ends.get(timeout=SAY_S)
        if isinstance(end, HostLostError):
            if end.host_id == 0:
                time.sleep(LAST_WORD_S)
        elif isinstance(end, BaseException):
            self._fail(end)
        if isinstance(end, BaseException):
            raise end
        return end

    def _end_after_stop(self, ends: queue.SimpleQueue[int | BaseException]) -> None:
        """Where the follower does not come to read STOP, as while it compiles, end all the same."""
        self._joined.wait()
        assert self._group is not None
        self._group.stopped.wait()
        time.sleep(STOP_S)
        ends.put(0)

    def _handle_signals(self) -> None:
        """The first asks host 0 to end the group, the second ends this process."""
        seen: list[int] = []

        def handle(number: int, frame: Any) -> None:
            seen.append(number)
            if len(seen) > 1 or self._group is None:
                os._exit(128 + number)
            self._group.leave(signal.Signals(number).name)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handle)


ALONE = Team()


def team_of(args: argparse.Namespace) -> Team:
    """The team that runs the command of these arguments."""
    return getattr(args, "team", ALONE)


def _facts(args: argparse.Namespace) -> dict[str, Any]:
    """What must be the same on every host: the command, the engine's options, the model, versions."""
    facts: dict[str, Any] = {"command": args.command}
    facts |= {spec.name: getattr(args, spec.name) for spec in flag_fields(EngineConfig) if hasattr(args, spec.name)}
    del facts["compilation_cache_dir"]  # a path, and each host's own
    for package in ("jax", "jaxlib", "jaxinfer"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    config = Path(args.model) / "config.json" if getattr(args, "model", None) is not None else None
    if config is not None and config.is_file():
        facts["config.json"] = sha256(config.read_bytes()).hexdigest()
    return facts


def _keep_stdout_clean() -> None:
    """What C++ libraries write to stdout (gloo does) goes to stderr; Python's stdout stays what it was."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
        sys.stdout = os.fdopen(kept, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1)
