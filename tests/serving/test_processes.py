"""The server as a process: signals under load, a client that has only stubs of its own making, the commands."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from grpc_tools import protoc

from jaxinfer.request import FinishReason, SamplingParams
from serving import client as api
from serving.client import AsyncClient, Client

REPOSITORY = Path(__file__).parents[2]
MODEL = Path(__file__).parents[1] / "goldens" / "llama"
READY_S = 240.0  # the machine may be busy
STUB_CLIENT = """
import json, sys, threading
import grpc, inference_pb2 as pb, inference_pb2_grpc
stub = inference_pb2_grpc.InferenceStub(grpc.insecure_channel(sys.argv[1]))
answers = [None] * 8
def call(i):
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[i + 3, i + 4]))
    request.sampling.max_tokens, request.sampling.temperature, request.sampling.ignore_eos = 10 + i, 0, True
    messages = list(stub.GenerateStream(request, timeout=120))
    assert messages[-1].finish_reason == pb.FINISH_REASON_LENGTH, messages[-1]
    assert messages[-1].usage.completion_tokens == 10 + i
    answers[i] = [token for message in messages for token in message.token_ids]
threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not {"jax", "jaxinfer", "serving"} & set(sys.modules), sorted(sys.modules)
print(json.dumps(answers))
"""


FAKE_SERVER = """
import asyncio, os, sys
sys.path.insert(0, sys.argv[1])
from conftest import FakeEngine
from serving.cli import Progress
from serving.grpc_server import ServerConfig, serve
engine = FakeEngine(slots=4, max_model_len=1 << 30, pace_s=0.004)
if sys.argv[3] == "loading":
    engine.warm.clear()
if sys.argv[3] == "dying":
    engine.step_error = ZeroDivisionError("found by the test")
config = ServerConfig(port=0, drain_s=float(sys.argv[2]))
progress = Progress()
options = {"report": progress.update, "say": progress.say, "on_listening": lambda address: print(address, flush=True)}
ended = asyncio.run(serve(lambda report: engine, config, model_name="fake", **options))
assert ended or sys.argv[3] == "loading"
os._exit(0)
"""


def _fake(drain_s: float, mode: str = "serving") -> list[str]:
    """The command of a server around FakeEngine, which prints its address."""
    return [sys.executable, "-c", FAKE_SERVER, str(Path(__file__).parent), str(drain_s), mode]


@contextlib.contextmanager
def _server(command: list[str]):
    """A server process and the line it prints when it listens; killed at the end if it still runs."""
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield process, line
    finally:
        process.kill()
        process.communicate()


def _end(process: subprocess.Popen, timeout_s: float = 120) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout_s)
    return process.returncode, out, err


async def _load_and_sigterm(process: subprocess.Popen, address: str, max_tokens: int):
    """24 streams; SIGTERM when some run; requests that come later.

    Returns (tokens, reason) of each stream, (0, None) where it came too late, and the refusal of a later request.
    """
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    begun = asyncio.Event()

    async def one(client: AsyncClient, i: int) -> tuple[int, FinishReason | None]:
        count, reason = 0, None
        try:
            async for chunk in client.stream([i + 3], sampling):
                begun.set()
                count, reason = count + len(chunk.token_ids), chunk.finish_reason
        except api.UnavailableError as error:
            assert count == 0 and error.retry_after_s is not None  # SIGTERM was there before this request
        return count, reason

    async with AsyncClient(address) as client:
        await client.wait_ready(READY_S)
        streams = [asyncio.create_task(one(client, i)) for i in range(24)]
        await begun.wait()
        await client.model_info()  # by now most of the others have arrived, too
        process.send_signal(signal.SIGTERM)
        late = None
        while late is None and not all(task.done() for task in streams):
            try:
                await client.generate([3], SamplingParams(max_tokens=1))
            except api.UnavailableError as error:
                late = error
        return await asyncio.gather(*streams), late


def test_the_real_server_answers_strangers_and_drains_under_load(tmp_path):
    """Eight streams from a process that has only stubs generated from the .proto; then SIGTERM under load."""
    proto = REPOSITORY / "serving" / "protos" / "jaxinfer" / "v1" / "inference.proto"
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python")]
    assert protoc.main(["protoc", f"-I{proto.parent}", *outputs, proto.name]) == 0
    arguments = [str(MODEL), "--port", "0", "--json", "--dtype", "float32", "--max-num-seqs", "4"]
    command = [sys.executable, "-m", "serving.cli", "serve", *arguments, "--max-num-batched-tokens", "32"]
    with _server(command) as (process, line):
        address = json.loads(line)["address"]
        with Client(address) as client:
            client.wait_ready(READY_S)
            stranger = [sys.executable, "-c", STUB_CLIENT, address]
            done = subprocess.run(stranger, cwd=tmp_path, capture_output=True, text=True, timeout=180)
            assert done.returncode == 0, done.stderr
            answers = json.loads(done.stdout)
            for i, answer in enumerate(answers):
                sampling = SamplingParams(max_tokens=10 + i, temperature=0, ignore_eos=True)
                assert list(client.generate([i + 3, i + 4], sampling).completions[0].token_ids) == answer
            chunks = list(client.stream([3, 4], SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)))
            assert [t for chunk in chunks for t in chunk.token_ids] == answers[0]
            assert client.model_info().model == "llama" and not client.abort("nobody")
        outcomes, _ = asyncio.run(_load_and_sigterm(process, address, 240))
        code, out, err = _end(process)
    assert (code, out) == (0, ""), err
    assert set(outcomes) <= {(240, FinishReason.LENGTH), (0, None)} and outcomes.count((0, None)) < 20


@pytest.mark.parametrize("drain_s", [60, 0])
def test_sigterm_under_load_loses_nothing(drain_s):
    max_tokens = 60 if drain_s else 1_000_000
    with _server(_fake(drain_s)) as (process, line):
        outcomes, late = asyncio.run(_load_and_sigterm(process, line.strip(), max_tokens))
        code, _, err = _end(process)
    assert code == 0, err
    if drain_s:
        assert late is not None and late.retry_after_s is not None
        assert set(outcomes) <= {(max_tokens, FinishReason.LENGTH), (0, None)} and outcomes.count((0, None)) < 20
    else:
        assert {reason for _, reason in outcomes} <= {FinishReason.ABORT, None}
        assert any(count for count, _ in outcomes)


def test_a_second_signal_ends_at_once():
    with _server(_fake(600)) as (process, line):
        with Client(line.strip()) as client:
            client.wait_ready(READY_S)
            stream = client.stream([3], SamplingParams(max_tokens=1_000_000))
            next(stream)
            process.send_signal(signal.SIGINT)
            with pytest.raises(api.UnavailableError):
                while True:
                    client.generate([3], SamplingParams(max_tokens=1))
            process.send_signal(signal.SIGINT)
            code, _, _ = _end(process)
            assert code == 128 + signal.SIGINT
            with pytest.raises(api.UnavailableError):
                list(stream)


def test_a_reader_of_stderr_that_leaves_costs_no_request():
    with _server(_fake(60)) as (process, line):
        process.stderr.close()
        outcomes, _ = asyncio.run(_load_and_sigterm(process, line.strip(), 60))
        assert process.wait(120) == 0
    assert set(outcomes) <= {(60, FinishReason.LENGTH), (0, None)} and outcomes.count((0, None)) < 20


@pytest.mark.parametrize(
    ("closed", "arguments", "code"),
    [("stdout", [str(MODEL), "--port", "0", "--json"], 1), ("stderr", ["/no/such/model"], 2)],
)
def test_output_that_nobody_reads_is_an_ordinary_failure(closed, arguments, code):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "serving.cli", "serve", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, closed: writer}
    done = subprocess.run(command, cwd=REPOSITORY, **streams, text=True, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stdout or "") == (code, "")
    if closed == "stdout":
        *progress, last = done.stderr.splitlines()
        assert last == "jaxinfer serve: error: [Errno 32] Broken pipe"
        assert all(line.startswith("[") for line in progress), done.stderr


def test_sigterm_while_loading_ends_cleanly():
    with _server(_fake(600, "loading")) as (process, _):
        process.send_signal(signal.SIGTERM)
        code, _, err = _end(process)
    assert code == 0 and "Traceback" not in err, err


def test_an_engine_that_dies_ends_the_server_with_1():
    with _server(_fake(600, "dying")) as (process, line):
        with Client(line.strip()) as client:
            client.wait_ready(READY_S)
            with pytest.raises(api.InternalError) as caught:
                client.generate([3], SamplingParams(max_tokens=1_000_000))
            assert caught.value.reason == "ENGINE_DEAD"
        code, _, err = _end(process)
    assert code == 1 and "ZeroDivisionError" in err


def test_the_demo_runs_on_the_shipped_model():
    flags = [
        "--dtype",
        "float32",
        "--max-num-seqs",
        "4",
        "--max-num-batched-tokens",
        "64",
        "--min-prefill-bucket",
        "64",
    ]
    command = [sys.executable, "-m", "serving.cli", "demo", "--max-tokens", "12", "--json", *flags]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        try:
            code, out, err = _end(demo, READY_S)
        finally:
            demo.send_signal(signal.SIGINT)  # it stops its server; nothing happens where it has ended
    assert code == 0, err
    summary = json.loads(out)
    assert len(summary["streams"]) == 8
    assert all(s["num_tokens"] == 12 and s["text"] and s["ttft_ms"] > 0 for s in summary["streams"])
    assert summary["first_token_s"] >= summary["ready_s"] > 0
