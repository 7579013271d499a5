"""The gRPC server: its options, its port, its health, and its life from the first byte of weights to the last drain.

Binds loopback addresses unless told `insecure`: there is neither TLS nor authentication yet. The port is open while the
model loads; until it is ready every call answers UNAVAILABLE with RetryInfo and health says NOT_SERVING.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2

from jaxinfer.config import ConfigError
from jaxinfer.request import EngineDeadError, RequestError
from serving import errors
from serving.async_engine import AsyncEngine, NotReadyError, Progress, State
from serving.health import HealthServicer
from serving.inference_service import SERVICE_NAME, InferenceServicer
from serving.protos.jaxinfer.v1 import inference_pb2 as pb
from serving.replicas import AnyEngine, ReplicaSet
from serving.several_hosts import ALONE, Team
from serving.tokenizing import TokenizerPool
from sharding.control import HostLostError

if TYPE_CHECKING:
    from jaxinfer.engine import Engine

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 16 * 2**20
MAX_CONCURRENT_STREAMS = 65_536
MAX_REPLICAS = 4096
# gRPC ends calls over its own limits as UNAVAILABLE or CANCELLED: what the handlers refuse must be met long before.
GRPC_CALLS = 16 * MAX_CONCURRENT_STREAMS
MAX_CONNECTION_AGE_S = 2_000_000.0  # gRPC keeps it as milliseconds in 32 bits
STOP_GRACE_S = 5.0  # for handlers to write what their requests ended with


def _flag(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class ServerConfig:
    """How requests reach an engine. The flags of `jaxinfer serve` are generated from these fields."""

    host: str = _flag("127.0.0.1", "address to listen on; one that is no loopback address needs --insecure")
    port: int = _flag(50051, "port to listen on; 0 takes a free one")
    insecure: bool = _flag(
        False, "let --host be any address, without TLS and authentication: whoever reaches the port can use the server"
    )
    replicas: int = _flag(1, "whole engines, each on devices of its own: the first takes the first devices, and so on")
    served_model_name: str | None = _flag(None, "name that requests may ask for (default: the model directory's name)")
    drain_s: float = _flag(30.0, "after SIGTERM, time for running requests to end, in seconds; then they are aborted")
    request_timeout_s: float = _flag(600.0, "time limit of calls that bring no deadline, in seconds")
    max_concurrent_streams: int = _flag(256, "calls that one connection may have open at once (at most 65536)")
    max_message_bytes: int = _flag(4 * 2**20, "largest message taken or sent (at most 16 MiB)")
    max_prompt_chars: int = _flag(1_000_000, "longest text that is tokenized")
    max_connection_age_s: float | None = _flag(
        None, "seconds after which clients are asked to reconnect (at most 2000000; default: never)"
    )
    tokenizer_threads: int = _flag(2, "threads that tokenize")
    reflection: bool = _flag(False, "offer gRPC reflection, so that grpcurl needs no .proto")

    def __post_init__(self) -> None:
        if not self.host or not (self.insecure or _is_loopback(self.host)):
            raise ConfigError(
                f"host={self.host!r} is not a loopback address; without TLS and authentication only 127.0.0.1, ::1 or "
                "localhost is bound (use an SSH tunnel to reach this server from elsewhere); --insecure binds any "
                "address, for networks where everybody may use the server"
            )
        if self.served_model_name == "":
            raise ConfigError("served_model_name='' is empty; leave it out to take the model directory's name")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} must be from 0 to 65535")
        for name in ("max_concurrent_streams", "max_prompt_chars", "tokenizer_threads", "replicas"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.replicas > MAX_REPLICAS:
            raise ConfigError(f"replicas={self.replicas} must be at most {MAX_REPLICAS}")
        if self.max_concurrent_streams > MAX_CONCURRENT_STREAMS:
            raise ConfigError(
                f"max_concurrent_streams={self.max_concurrent_streams} must be at most {MAX_CONCURRENT_STREAMS}"
            )
        if not 1024 <= self.max_message_bytes <= MAX_MESSAGE_BYTES:
            raise ConfigError(f"max_message_bytes={self.max_message_bytes} must be from 1024 to {MAX_MESSAGE_BYTES}")
        if not self.drain_s >= 0:
            raise ConfigError(f"drain_s={self.drain_s} must not be negative")
        for name in ("request_timeout_s", "max_connection_age_s"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")
        if self.max_connection_age_s is not None and self.max_connection_age_s > MAX_CONNECTION_AGE_S:
            raise ConfigError(
                f"max_connection_age_s={self.max_connection_age_s:g} must be at most {MAX_CONNECTION_AGE_S:.0f}; "
                "leave it out for never"
            )


class GrpcServer:
    """`engine` behind a port. The engine is started and stopped by whoever made it."""

    def __init__(self, engine: AnyEngine, config: ServerConfig, *, model_name: str):
        self._config = config
        self._tokenizing = TokenizerPool(
            num_threads=config.tokenizer_threads,
            max_prompt_chars=config.max_prompt_chars,
            max_pending=config.max_concurrent_streams,
        )
        self._server = grpc.aio.server(options=_channel_options(config))
        servicer = InferenceServicer(
            engine,
            self._tokenizing,
            model_name=model_name,
            request_timeout_s=config.request_timeout_s,
            max_open_calls=config.max_concurrent_streams,
            max_answer_bytes=config.max_message_bytes,
        )
        health = HealthServicer(engine, (SERVICE_NAME,))
        self._server.add_generic_rpc_handlers(
            (
                _handlers(pb.DESCRIPTOR.services_by_name["Inference"], servicer),
                _handlers(health_pb2.DESCRIPTOR.services_by_name["Health"], health),
            )
        )
        if config.reflection:
            from grpc_reflection.v1alpha import reflection

            health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
            reflection.enable_server_reflection((SERVICE_NAME, health_name, reflection.SERVICE_NAME), self._server)
        self.port = 0

    @property
    def address(self) -> str:
        """host:port, as clients want it; the port is known after `start`."""
        return _join(self._config.host, self.port)

    async def start(self) -> None:
        """Open the port; ConfigError when it is taken."""
        wanted = _join(self._config.host, self._config.port)
        if self._config.insecure and not _is_loopback(self._config.host):
            log.warning(
                "host=%s: listening without TLS and authentication; whoever reaches port %s can use this server",
                *(self._config.host, self._config.port),
            )
        try:
            self.port = self._server.add_insecure_port(wanted)
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {wanted} (is the port in use? --port 0 takes a free one): {error}"
            ) from None
        await self._server.start()

    async def stop(self) -> None:
        """Close the port; handlers have STOP_GRACE_S to write their last messages."""
        await self._server.stop(STOP_GRACE_S)
        self._tokenizing.close()


class LeftBehindError(Exception):
    """A replica failed, as `__cause__` says, while another's thread compiles: only the process's end ends that one."""


async def serve(
    make_engine: Callable[..., Engine],
    config: ServerConfig,
    *,
    model_name: str,
    report: Progress,
    say: Progress,
    on_listening: Callable[[str], None],
    team: Team = ALONE,
) -> bool:
    """Serve until SIGTERM or SIGINT, drain, and return; a second signal ends the process at once.

    `make_engine(progress)` makes the engine, in a thread of its own; where `config.replicas` asks for several,
    `make_engine(progress, replica=i)` makes each of them. `report` hears of each tensor and program, `say` of what
    goes on; `on_listening(address)` is called when the port is open, before the model is loaded. Returns False when an
    engine thread is stuck in a call that does not return: then only leaving the process ends it.
    Raises ConfigError (port), what loading the model raised, HostLostError when one of the `team` was lost, or
    EngineDeadError when the engine failed later; LeftBehindError, from one of these, where a replica's thread is stuck.
    """
    engine = _engine(make_engine, config.replicas, report)
    server = GrpcServer(engine, config, model_name=model_name)
    stop = asyncio.Event()
    seen: list[int] = []
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, number, seen, stop)
    if team.is_several:
        assert isinstance(engine, AsyncEngine), "several hosts run one replica"
        team.on_lost(engine.fail)
        team.on_leave(lambda text: _soon(loop, partial(_on_leave, text, say, stop)))
    await server.start()
    try:
        on_listening(server.address)
        engine.start()
        watch = asyncio.create_task(_until_dead(engine, lambda: say(f"ready on {server.address}")))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait((watch, stopped), return_when=asyncio.FIRST_COMPLETED)
        watch.cancel()
        stopped.cancel()
        if engine.state is not State.DEAD:
            say(f"draining: up to {config.drain_s:g} s for running requests")
    finally:
        ended = await _end(engine, server, config.drain_s, say)
    if engine.error is not None:
        if not ended and config.replicas > 1:
            raise LeftBehindError from engine.error
        raise engine.error
    return ended


def _engine(make_engine: Callable[..., Engine], num_replicas: int, report: Progress) -> AnyEngine:
    if num_replicas == 1:
        return AsyncEngine(make_engine, progress=report)
    return ReplicaSet([partial(make_engine, replica=i) for i in range(num_replicas)], progress=report)


async def _end(engine: AnyEngine, server: GrpcServer, drain_s: float, say: Progress) -> bool:
    """Drain, stop the engine, close the port: each of them whatever the one before raised."""
    try:
        if engine.state is not State.DEAD:
            num_aborted = await engine.drain(drain_s)
            say(f"drained; {num_aborted} requests were aborted")
    finally:
        try:
            ended = await engine.stop()
        finally:
            await server.stop()
    return ended


async def _until_dead(engine: AnyEngine, on_ready: Callable[[], None]) -> None:
    try:
        await engine.until_ready()
        on_ready()
    except (EngineDeadError, HostLostError, NotReadyError):
        log.debug("the engine did not become ready: %s", engine.state)
    while engine.state is not State.DEAD:
        await engine.next_state(engine.state)


def _on_signal(number: int, seen: list[int], stop: asyncio.Event) -> None:
    if seen:
        log.warning("second signal: leaving at once")
        os._exit(128 + number)
    seen.append(number)
    stop.set()


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """From another thread; nobody is left to tell when the loop has closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call)


def _on_leave(text: str, say: Progress, stop: asyncio.Event) -> None:
    """A host that follows got a signal: as if this one had, but its own may come as well."""
    say(text)
    stop.set()


def _handlers(service: ServiceDescriptor, servicer: object) -> grpc.GenericRpcHandler:
    """What the generated add_..._to_server adds, but bytes that are no message of the method are INVALID_ARGUMENT."""
    methods = {}
    for method in service.methods:
        kind = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        handler = _decoding(GetMessageClass(method.input_type), getattr(servicer, method.name))
        methods[method.name] = kind(handler, response_serializer=GetMessageClass(method.output_type).SerializeToString)
    return grpc.method_handlers_generic_handler(service.full_name, methods)


def _decoding(message_class: type[Message], handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def handle(raw: bytes, context: grpc.aio.ServicerContext) -> Any:
        try:
            message = message_class.FromString(raw)
        except DecodeError:
            name = message_class.DESCRIPTOR.full_name
            await errors.abort(context, RequestError("message", f"these {len(raw)} bytes are no {name}"))
        return await handler(message, context)

    return handle


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _channel_options(config: ServerConfig) -> list[tuple[str, int]]:
    options = [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.max_concurrent_streams", GRPC_CALLS),
        ("grpc.server.max_pending_requests", GRPC_CALLS),  # those that came but did not reach a handler yet
        ("grpc.server.max_pending_requests_hard_limit", GRPC_CALLS),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a coin toss per connection
    ]
    if config.max_connection_age_s is not None:
        options.append(("grpc.max_connection_age_ms", round(config.max_connection_age_s * 1000)))
    return options
