"""Processes that run chat templates: started on need, kept between calls, killed when they do not answer.

Hides the pipes and what the end of a process says. Why a process, and not a thread: docs/chat.md.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

SCRIPT = Path(__file__).with_name("chat_worker.py")
MAX_IDLE = 2  # processes kept; as many as there are callers run at once
READ_BYTES = 2**20


class TemplateFailure(Exception):
    """A template did not give a text; `on_purpose` when it said so itself (raise_exception)."""

    def __init__(self, message: str, *, on_purpose: bool = False):
        super().__init__(message)
        self.on_purpose = on_purpose


class _GoneError(Exception):
    """The process had ended before it was asked."""


class _KilledError(TemplateFailure):
    """Somebody ended the process while it rendered: a person, or a system short of memory. Not the template's doing."""


class ChatProcesses:
    """Renders requests in processes that have all `templates` compiled. Safe to use from several threads."""

    def __init__(self, templates: Mapping[str, str], *, cpu_s: float, wall_s: float, memory_bytes: int):
        self._settings = {"templates": templates, "cpu_s": cpu_s, "memory_bytes": memory_bytes}
        self._wall_s = wall_s
        self._idle: deque[_Process] = deque()
        weakref.finalize(self, _close_all, self._idle)

    def close(self) -> None:
        """End the idle processes; a later call starts one again."""
        _close_all(self._idle)

    def start(self) -> None:
        """Have a process ready; TemplateFailure names a template that does not compile."""
        self._idle.append(_Process(self._settings, self._wall_s))

    def render(self, request: Mapping[str, Any]) -> str:
        """The text that `chat_worker.Renderer.render` makes of the request. TemplateFailure says why there is none."""
        was_killed = False
        while True:
            try:
                process, is_new = self._idle.pop(), False
            except IndexError:
                process, is_new = _Process(self._settings, self._wall_s), True
            try:
                reply = process.ask(request)
            except _GoneError:  # somebody killed it while it was idle
                process.close()
                if is_new:
                    raise TemplateFailure("its process ends as soon as it is started") from None
                continue
            except _KilledError:  # rendering has no effects, so once more, in a new process most likely
                process.close()
                if was_killed:
                    raise
                was_killed = True
                continue
            except BaseException:
                process.close()
                raise
            break
        if len(self._idle) < MAX_IDLE:
            self._idle.append(process)
        else:
            process.close()
        return _text_of(reply)


class _Process:
    def __init__(self, settings: Mapping[str, Any], wall_s: float):
        """Start one and wait until its templates are compiled."""
        self._cpu_s: float = settings["cpu_s"]
        self._wall_s = wall_s
        # the script's folder holds our modules, which must not stand in for those of other packages: -P
        command = [sys.executable, "-P", str(SCRIPT)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self._stdin.fileno(), False)
        try:
            _text_of(self.ask(settings))
        except BaseException:
            self.close()
            raise

    def ask(self, request: Mapping[str, Any]) -> dict[str, str]:
        """The reply. _GoneError when there was nobody to ask, TemplateFailure when it ended meanwhile."""
        deadline_s = time.monotonic() + self._wall_s
        try:
            self._write(json.dumps(request).encode() + b"\n", deadline_s)
        except BrokenPipeError:
            raise _GoneError from None
        return json.loads(self._read_line(deadline_s))

    def _write(self, data: bytes, deadline_s: float) -> None:
        """More than a pipe holds would wait for as long as the process does not read."""
        left = memoryview(data)
        while left:
            self._wait(self._stdin, select.POLLOUT, deadline_s)
            try:
                left = left[os.write(self._stdin.fileno(), left) :]
            except BlockingIOError:  # there is room, but not for a whole small write
                time.sleep(0.001)

    def _read_line(self, deadline_s: float) -> bytes:
        pieces: list[bytes] = []
        while not (pieces and pieces[-1].endswith(b"\n")):
            self._wait(self._stdout, select.POLLIN, deadline_s)
            piece = os.read(self._stdout.fileno(), READ_BYTES)
            if not piece:
                raise self._end()
            pieces.append(piece)
        return b"".join(pieces)

    def _wait(self, pipe: IO[bytes], event: int, deadline_s: float) -> None:
        """Until the pipe is ready; TemplateFailure at the deadline."""
        poll = select.poll()  # unlike select(), it takes any file descriptor of a server with many connections
        poll.register(pipe, event)
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not poll.poll(1000 * left_s):
            raise TemplateFailure(f"it took longer than {self._wall_s:g} s")

    def _end(self) -> TemplateFailure:
        status = self._process.wait()
        if status == -signal.SIGPROF:
            return TemplateFailure(f"it took more than {self._cpu_s:g} s of CPU time")
        kind = _KilledError if status in (-signal.SIGKILL, -signal.SIGTERM) else TemplateFailure
        return kind(f"its process ended with status {status}")

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._stdout.close()
        self._stdin.close()


def _text_of(reply: Mapping[str, str]) -> str:
    if "text" in reply:
        return reply["text"]
    raise TemplateFailure(reply["error"], on_purpose=reply["kind"] == "raised")


def _close_all(processes: deque[_Process]) -> None:
    while processes:
        processes.pop().close()
