"""Adapter: grpc.health.v1 and server reflection."""

from __future__ import annotations

import asyncio

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

INFERENCE = "cluster.v1.Inference"
ROUTING = "cluster.v1.Routing"
_NAMES = ("", INFERENCE)


class Health:
    """NOT_SERVING until told otherwise; ``set_ready`` may be called from anywhere on the event loop."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        reflection.enable_server_reflection((INFERENCE, ROUTING, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        self._ready = False
        self._changed = asyncio.Event()
        self._changed.set()
        self._task = asyncio.get_running_loop().create_task(self._publish(), name="health")

    @property
    def ready(self) -> bool:
        return self._ready

    def set_ready(self, *, ready: bool) -> None:
        if ready != self._ready:
            self._ready = ready
            self._changed.set()

    async def settle(self) -> None:
        """Returns when whoever asks or watches is told what was set last."""
        self._changed.clear()
        await self._tell()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _publish(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._tell()

    async def _tell(self) -> None:
        status = health_pb2.HealthCheckResponse
        for name in _NAMES:
            await self._servicer.set(name, status.SERVING if self._ready else status.NOT_SERVING)
