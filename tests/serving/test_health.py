"""Health while a device call hangs: a load balancer must hear of it, and of its end."""

from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving import health

pytestmark = pytest.mark.asyncio

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_hanging_device_call_is_not_healthy(fakes, serving, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(health, "LOOK_S", 0.02)
    engine, request = fakes.Engine(), health_pb2.HealthCheckRequest()
    async with serving(engine) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(request)
        assert (await watch.read()).status == SERVING
        for stuck, status in ((True, NOT_SERVING), (False, SERVING)):
            engine.is_stuck = stuck
            assert (await stub.Check(request)).status == status
            assert (await watch.read()).status == status
