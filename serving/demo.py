"""`jaxinfer demo`: the real server as a process of its own, concurrent clients, and a table of what they got."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from jaxinfer.config import ConfigError, EngineConfig
from serving.client import AsyncClient, SamplingParams
from serving.flags import arguments_from, config_from

PROMPTS = (  # none ends in white space, which the tokenizer would have joined with what follows
    "def fibonacci(n):",
    "class Stack:\n    def __init__(self):",
    "import os\nimport sys\n\ndef main():",
    "for i in range(10):",
    "def read_file(path):\n    with open(path) as f:",
    "try:\n    value = int(text)\nexcept",
    "class TestCase(unittest.TestCase):\n    def test_",
    "def __repr__(self):\n    return",
)
READY_S = 300.0
POLL_S = 0.2
STOP_S = 60.0
SERVER = "import sys; from serving.demo import serve_for_parent; sys.exit(serve_for_parent())"


@dataclass
class Stream:
    """What one client got, and when (seconds since it asked)."""

    prompt: str
    text: str = ""
    num_tokens: int = 0
    num_first_tokens: int = 0
    ttft_s: float = 0.0
    total_s: float = 0.0
    finish_reason: str = ""
    first_token_at: float = 0.0  # time.monotonic()

    @property
    def tpot_s(self) -> float:
        """Seconds per token after those of the first message."""
        return (self.total_s - self.ttft_s) / max(1, self.num_tokens - self.num_first_tokens)


def run(args: argparse.Namespace) -> int:
    """Start the server, stream, print, stop the server; 0 when every stream and the server ended well."""
    for name in ("clients", "max_tokens"):
        if getattr(args, name) < 1:
            raise ConfigError(f"{name}={getattr(args, name)} must be at least 1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as if by Ctrl-C: the server is stopped
    start = time.monotonic()
    flags = ["--log-level", args.log_level, *(["--debug"] if args.debug else [])]
    flags += arguments_from(config_from(args, EngineConfig))
    # -P: no module of the working directory is taken for one of ours
    command = [sys.executable, "-P", "-c", SERVER, "serve", args.model, "--port", "0", "--json", *flags]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        address = _address(server)
        streams, ready_s, wall_s = asyncio.run(_drive(server, address, args.clients, args.max_tokens, start))
    except asyncio.CancelledError:  # SIGTERM
        raise KeyboardInterrupt from None
    finally:
        server.terminate()
        try:
            code = server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()
            raise RuntimeError(f"the server did not stop within {STOP_S:g} s of SIGTERM") from None
    if code:
        raise RuntimeError(f"the server ended with exit code {code}")
    summary = {
        "ready_s": ready_s,
        "first_token_s": min(s.first_token_at for s in streams) - start,
        "output_throughput": sum(s.num_tokens for s in streams) / wall_s,
        "streams": [_as_json(s) for s in streams],
    }
    if args.json:
        print(json.dumps(summary))
    else:
        _print(streams, summary)
    return 0


def serve_for_parent() -> int:
    """The server's own process: the command line, ended as by SIGTERM when the parent's end of stdin closes."""
    from serving.cli import main

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    return main()


def _address(server: subprocess.Popen[str]) -> str:
    """Where the server listens, which is the first thing it prints."""
    assert server.stdout is not None
    line = server.stdout.readline()
    if not line:
        raise RuntimeError(f"the server ended with exit code {server.wait()} before it listened")
    try:
        return json.loads(line)["address"]
    except (ValueError, LookupError, TypeError):
        raise RuntimeError(f"the server's first line of output is not its address: {line!r}") from None


async def _until_ready(client: AsyncClient, server: subprocess.Popen[str]) -> None:
    """Return when the server takes requests; RuntimeError when its process ends first."""
    ready = asyncio.create_task(client.wait_ready(READY_S))
    while not (await asyncio.wait((ready,), timeout=POLL_S))[0]:
        if (code := server.poll()) is not None:
            ready.cancel()
            raise RuntimeError(f"the server ended with exit code {code} before it was ready")
    ready.result()


async def _drive(
    server: subprocess.Popen[str], address: str, num_clients: int, max_tokens: int, start: float
) -> tuple[list[Stream], float, float]:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with AsyncClient(address) as client:
        await _until_ready(client, server)
        ready_s = time.monotonic() - start
        began = time.monotonic()
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(num_clients)]
        streams = await asyncio.gather(*(_stream(address, prompt, max_tokens) for prompt in prompts))
        return list(streams), ready_s, time.monotonic() - began


async def _stream(address: str, prompt: str, max_tokens: int) -> Stream:
    got = Stream(prompt)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.7, top_p=0.95, seed=1, ignore_eos=True)
    async with AsyncClient(address) as client:
        asked = time.monotonic()
        async for chunk in client.stream(prompt, sampling):
            now = time.monotonic()
            if chunk.token_ids and not got.num_tokens:
                got.ttft_s, got.first_token_at, got.num_first_tokens = now - asked, now, len(chunk.token_ids)
            got.text += chunk.text
            got.num_tokens += len(chunk.token_ids)
            got.total_s = now - asked
            if chunk.finish_reason is not None:
                got.finish_reason = chunk.finish_reason.value
    return got


def _as_json(stream: Stream) -> dict[str, Any]:
    return {
        "prompt": stream.prompt,
        "text": stream.text,
        "num_tokens": stream.num_tokens,
        "finish_reason": stream.finish_reason,
        "ttft_ms": 1e3 * stream.ttft_s,
        "tpot_ms": 1e3 * stream.tpot_s,
        "total_ms": 1e3 * stream.total_s,
    }


def _print(streams: list[Stream], summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{len(streams)} concurrent GenerateStream calls", show_lines=True)
    table.add_column("prompt → completion", overflow="fold")
    for name in ("TTFT ms", "TPOT ms", "total ms", "tokens", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for s in streams:
        table.add_row(
            Text(s.prompt, style="dim") + Text(s.text, style="bold"),
            f"{1e3 * s.ttft_s:.0f}",
            f"{1e3 * s.tpot_s:.1f}",
            f"{1e3 * s.total_s:.0f}",
            str(s.num_tokens),
            f"{s.num_tokens / s.total_s:.0f}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"first token {summary['first_token_s']:.1f} s after the start (ready after {summary['ready_s']:.1f} s); "
        f"{summary['output_throughput']:.0f} tokens/s over all streams",
        highlight=False,
    )
