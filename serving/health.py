"""grpc.health.v1, derived from the engine's state: SERVING when it is READY and no device call hangs.

There is no status to set, hence none to forget; a watcher that reads slowly holds up nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.async_engine import State
from serving.replicas import AnyEngine

Context = grpc.aio.ServicerContext
LOOK_S = 1.0  # between looks for a hanging device call


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Answers for the server as a whole (\"\") and for each name in `services`."""

    def __init__(self, engine: AnyEngine, services: tuple[str, ...]):
        self._engine = engine
        self._services = ("", *services)

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """The status now; NOT_FOUND for a service that is not here."""
        if request.service not in self._services:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"service {request.service[:100]!r} is none of {self._services}"
            )
        return health_pb2.HealthCheckResponse(status=self._status())

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """The status now and at every change, until the engine has stopped."""
        if request.service not in self._services:
            unknown = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            await context.write(health_pb2.HealthCheckResponse(status=unknown))
            return
        sent = None
        while True:
            state, status = self._engine.state, self._status()
            if status != sent:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                sent = status
            if state in (State.STOPPED, State.DEAD):
                return
            with contextlib.suppress(TimeoutError):  # a hanging device call is no change of state
                await asyncio.wait_for(self._engine.next_state(state), LOOK_S)

    def _status(self) -> health_pb2.HealthCheckResponse.ServingStatus:
        ready = self._engine.state is State.READY and not self._engine.is_stuck
        return health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
