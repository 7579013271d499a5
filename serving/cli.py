"""The `jaxinfer` command: serve, generate, eval, check, convert, compile, bench, info, demo.

stdout holds results (with --json one JSON document and nothing else), stderr everything else. Exit codes: 0 done,
1 failed, 2 bad arguments. jax is imported by the commands that need it, so that --help is quick.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from jaxinfer.config import ConfigError, EngineConfig, shipped_model
from jaxinfer.request import RequestError
from serving.check_cli import add_check_parser
from serving.compile_cli import add_compile_parser
from serving.convert_cli import add_convert_parser
from serving.eval_cli import add_eval_parser
from serving.flags import add_config_flags, config_from
from serving.generate import add_generate_parser
from serving.several_hosts import ALONE, Team
from sharding.control import HostLostError
from sharding.hosts import HostsConfig, HostsError

LOG_LEVELS = ("debug", "info", "warning", "error")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser(argv).parse_args(argv)
    level = getattr(args, "log_level", "warning").upper()  # bench has flags of its own
    logging.basicConfig(stream=sys.stderr, level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    _choose_platform()
    args.progress = Progress()
    args.team = ALONE
    code = 1
    try:
        code = _run(args)
    except SystemExit as error:  # of argparse
        code = error.code if isinstance(error.code, int) else 1
        raise
    finally:
        args.team.leave_process(code)
    return code


def _run(args: argparse.Namespace) -> int:
    try:
        if getattr(args, "model", None) is not None:
            _check_model(args.model)
        args.team = Team.of(args)
        code = args.team.run(lambda: args.func(args), joins_itself=args.func is _serve, end=partial(_end, args))
        print(end="", flush=True)  # so that a stdout which nobody reads is an error here
        return code
    except KeyboardInterrupt:
        return _fail(args, "interrupted", 130)
    except HostLostError as error:
        _end(args, str(error))
        return 1
    except Exception as error:
        if isinstance(error, BrokenPipeError):
            _discard(sys.stdout)  # or the interpreter would fail to flush it at exit
        return _failed(args, error)


class Progress:
    """What the user sees while waiting, on stderr: `update` overwrites one line of a terminal, `say` leaves a line.

    Nothing is raised when stderr cannot be written: requests matter more than who watches.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._shown = False
        self._tty = sys.stderr is not None and sys.stderr.isatty()

    def update(self, text: str) -> None:
        """Show `text` until the next call; nothing where stderr is no terminal."""
        if self._tty:
            self._shown = True
            _to_stderr(f"\r\x1b[2K{text[:100]}")

    def clear(self) -> None:
        """Take the last update away."""
        if self._shown:
            _to_stderr("\r\x1b[2K")
            self._shown = False

    def say(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        self.clear()
        _to_stderr(f"[{time.monotonic() - self._start:6.1f} s] {text}\n")


# ---- commands ----


def _serve(args: argparse.Namespace) -> int:
    from serving.grpc_server import LeftBehindError, ServerConfig, serve
    from serving.replicas import replica_devices

    engine_config = config_from(args, EngineConfig)
    server_config = config_from(args, ServerConfig)
    model_name = server_config.served_model_name or Path(args.model).resolve().name
    progress: Progress = args.progress
    team: Team = args.team
    if team.is_several and server_config.replicas > 1:
        raise ConfigError(
            f"replicas={server_config.replicas}: several hosts serve one replica; start a group of hosts for each"
        )

    def make_engine(report: Any, replica: int | None = None) -> Any:
        team.join()
        from jaxinfer.engine import Engine
        from jaxinfer.memory import kv_budget

        progress.say(f"loading {args.model}" + ("" if replica is None else f" as replica {replica}"))
        devices, config = None, engine_config
        if replica is not None:
            size, count = engine_config.mesh_sizes.num_devices, server_config.replicas
            devices = replica_devices(replica, count, size)
            if config.kv_memory_bytes is None:
                config = replace(config, kv_memory_bytes=kv_budget(size * count))
        engine = Engine(args.model, config, devices=devices, progress=report, **team.engine_options())
        progress.say("loaded; compiling")
        return engine

    if team.follows:
        engine = make_engine(progress.update)
        engine.warm_up(progress.update)
        team.follow(engine)

    def on_listening(address: str) -> None:
        progress.say(f"listening on {address}")
        if args.json:
            print(json.dumps({"address": address, "model": model_name, "pid": os.getpid()}), flush=True)

    serving = serve(
        make_engine,
        server_config,
        model_name=model_name,
        report=progress.update,
        say=progress.say,
        on_listening=on_listening,
        team=team,
    )
    try:
        ended = asyncio.run(serving)
    except LeftBehindError as error:
        assert isinstance(error.__cause__, Exception)
        os._exit(_failed(args, error.__cause__))
    if not ended:  # a compile or a device call holds the engine thread; interpreter shutdown would wait for it
        team.close()
        os._exit(0)
    return 0


def _info(args: argparse.Namespace) -> int:
    if args.kernels:
        from serving.kernel_info import run

        if args.model != str(shipped_model()) or config_from(args, EngineConfig) != EngineConfig():
            raise ConfigError("--kernels loads no model and starts no engine: leave out MODEL and the engine's options")
        return run(args)
    if args.device is not None:
        raise ConfigError(f"--device {args.device} needs --kernels: a model is loaded on this machine's device only")
    from jaxinfer.engine import Engine

    engine = Engine(args.model, config_from(args, EngineConfig), progress=args.progress.update)
    info = engine.info()
    args.progress.clear()
    if args.json:
        json.dump(info, sys.stdout)
        print()
        return 0
    from rich.console import Console
    from rich.table import Table

    choices = info.pop("kv_choices")
    table = Table(show_header=False, title=str(args.model))
    for key, value in info.items():
        table.add_row(key, value if isinstance(value, str) else json.dumps(value))
    Console().print(table)
    sizes = Table("choice", "bytes per token", "bytes per sequence", title="K/V of a sequence of max_model_len tokens")
    for choice in choices:
        sizes.add_row(choice["choice"], f"{choice['bytes_per_token']:,.0f}", f"{choice['bytes_per_sequence']:,}")
    Console().print(sizes)
    return 0


def _demo(args: argparse.Namespace) -> int:
    from serving.demo import run

    return run(args)


# ---- arguments ----


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxinfer", description="Serve open-weight language models with JAX.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common, model = _common(), _model()

    server = subparsers.add_parser(
        "serve", parents=[model, common], allow_abbrev=False, help="serve a model over gRPC until SIGTERM"
    )
    from serving.grpc_server import ServerConfig

    add_config_flags(server, ServerConfig)
    add_config_flags(server, EngineConfig)
    add_config_flags(server, HostsConfig)
    server.set_defaults(func=_serve)

    add_generate_parser(subparsers, [model, common])
    add_eval_parser(subparsers, [model, common])
    add_check_parser(subparsers, [model, common])
    add_convert_parser(subparsers, [common])
    add_compile_parser(subparsers, [common])
    if "bench" in argv:
        from serving.benchmark import add_bench_parser

        add_bench_parser(subparsers)
    else:
        subparsers.add_parser("bench", help="measure latency, throughput and start-up")

    info = subparsers.add_parser(
        "info", parents=[model, common], allow_abbrev=False, help="print what a model is and how it would run"
    )
    info.add_argument("--kernels", action="store_true", help="print which kernel serves which case, and why not others")
    info.add_argument("--device", metavar="NAME", help="with --kernels: another device, such as v6e or h100")
    add_config_flags(info, EngineConfig)
    info.set_defaults(func=_info)

    demo = subparsers.add_parser(
        "demo", parents=[model, common], allow_abbrev=False, help="serve, stream to concurrent clients, print a table"
    )
    demo.add_argument("--clients", type=int, default=8, metavar="N", help="concurrent streams (default: 8)")
    demo.add_argument("--max-tokens", type=int, default=48, metavar="N", help="tokens per stream (default: 48)")
    # Prompts are short and eight at most: few, small programs, so that the first token comes soon.
    add_config_flags(demo, EngineConfig, max_num_seqs=8, max_num_batched_tokens=128, min_prefill_bucket=128)
    demo.set_defaults(func=_demo)
    return parser


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else")
    common.add_argument("--log-level", choices=LOG_LEVELS, default="warning", help="of stderr (default: warning)")
    common.add_argument("--debug", action="store_true", help="print the traceback of a failure")
    return common


def _model() -> argparse.ArgumentParser:
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument(
        "model",
        nargs="?",
        default=str(shipped_model()),
        metavar="MODEL",
        help="Hugging Face model directory (default: the model that ships with jaxinfer)",
    )
    return model


def _check_model(model: str) -> None:
    if not model:
        raise ConfigError("MODEL is empty; name a model directory, or leave it out for the shipped model")
    if not Path(model).is_dir():
        what = "is not a directory" if Path(model).exists() else "does not exist"
        raise ConfigError(f"model directory {model!r} {what}")


def _choose_platform() -> None:
    """Without a TPU, an installed libtpu would search for one for minutes: leave it out, unless told otherwise."""
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    if any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*")):
        return
    has_cuda = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    os.environ["JAX_PLATFORMS"] = "cuda,cpu" if has_cuda else "cpu"


def _end(args: argparse.Namespace, text: str) -> None:
    """The last word of a process whose group has lost a host."""
    args.progress.clear()
    _to_stderr(f"jaxinfer: {text}\n")


def _failed(args: argparse.Namespace, error: Exception) -> int:
    """Say what ended the command; the exit code: 2 where its arguments did."""
    if getattr(args, "debug", False):
        _to_stderr("".join(traceback.format_exception(error)))
    usage = isinstance(error, (ConfigError, HostsError, RequestError))
    return _fail(args, str(error) or type(error).__name__, 2 if usage else 1)


def _fail(args: argparse.Namespace, message: str, code: int) -> int:
    args.progress.clear()
    _to_stderr(f"jaxinfer {args.command}: error: {message}\n")
    return code


def _to_stderr(text: str) -> None:
    """Write and flush; from the first failure on, what is written to stderr is dropped."""
    if sys.stderr is None:  # closed before the start
        return
    try:
        print(text, end="", file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Let what is and will be written to `stream` go nowhere."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, stream.fileno())
    os.close(devnull)


if __name__ == "__main__":
    sys.exit(main())
