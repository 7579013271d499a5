"""The demo and its server's process: whoever ends first, nobody waits in vain and nothing is left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from serving import demo
from serving.client import AsyncClient

DEMO = """
import sys
from serving import cli, demo
demo.SERVER = sys.argv[1]
sys.exit(cli.main(["demo", "--log-level", "info", "--debug"]))
"""
SERVER = """
import json, sys, time
import serving.cli
from serving.demo import serve_for_parent

def main():
    print(json.dumps({"address": "127.0.0.1:1"}), flush=True)
    time.sleep(1)  # by now the demo waits until this server is ready
    print(json.dumps([sys.argv, sys.flags.safe_path]), file=sys.stderr, flush=True)
    time.sleep(300)

serving.cli.main = main
serve_for_parent()
"""


def _process(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, 130, "jaxinfer demo: error: interrupted\n"), (signal.SIGKILL, -signal.SIGKILL, "")],
)
def test_a_demo_that_is_ended_leaves_no_server(number, code, said, repository):
    command = [sys.executable, "-c", DEMO, SERVER]
    with subprocess.Popen(
        command, cwd=repository, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        arguments, safe_path = json.loads(process.stderr.readline())
        process.send_signal(number)
        _, err = process.communicate(timeout=60)  # the server has stderr, too: this returns when both are gone
    assert (process.returncode, err, safe_path) == (code, said, True)
    assert arguments[arguments.index("--log-level") :][:3] == ["--log-level", "info", "--debug"]


@pytest.mark.asyncio
async def test_a_server_that_ends_while_loading_is_told_at_once():
    with _process("raise SystemExit(3)") as server:
        began = time.monotonic()
        async with AsyncClient("127.0.0.1:1") as client:
            with pytest.raises(RuntimeError, match="ended with exit code 3 before it was ready"):
                await demo._until_ready(client, server)
        assert time.monotonic() - began < demo.READY_S / 2


@pytest.mark.parametrize("line", ["WARNING: not for us", "[1]", "{}"])
def test_a_first_line_that_is_no_address_is_told(line):
    with _process(f"print({line!r})") as server, pytest.raises(RuntimeError, match="is not its address: "):
        demo._address(server)


def test_a_server_that_prints_nothing_is_told():
    with _process("raise SystemExit(4)") as server, pytest.raises(RuntimeError, match="exit code 4 before it listened"):
        demo._address(server)
