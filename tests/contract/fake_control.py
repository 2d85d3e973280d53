"""A controller that only pushes endpoint tables: the real Control service on a loopback port."""

from __future__ import annotations

import asyncio
from typing import Any

from cluster.domain.endpoint import Endpoint, EndpointTable
from cluster.v1 import control_pb2, control_pb2_grpc
from cluster.wire import channel, convert


class FakeControl(control_pb2_grpc.ControlServicer):
    """``push`` replaces the table; every watcher gets the whole of it."""

    def __init__(self) -> None:
        self.table = EndpointTable(epoch=0)
        self.watchers: list[control_pb2.WatchEndpointsRequest] = []
        self.attended: list[control_pb2.ProcessStatus] = []
        self._changed = asyncio.Condition()
        self.port = 0

    async def start(self) -> FakeControl:
        self._server = channel.new_server()
        control_pb2_grpc.add_ControlServicer_to_server(self, self._server)
        self.port = channel.bind(self._server, "127.0.0.1", self.port)
        await self._server.start()
        return self

    async def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:  # a server must be gone before its event loop: it knows us, and must not be kept by us
            await server.stop(0)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def push(
        self, *endpoints: Endpoint, epoch: int | None = None, models: tuple[str, ...] = ("demo",), state_id: str = ""
    ) -> None:
        async with self._changed:
            self.table = EndpointTable(self.table.epoch + 1 if epoch is None else epoch, endpoints, models, state_id)
            self._changed.notify_all()

    async def Attend(self, request: control_pb2.ProcessStatus, context: Any) -> None:
        self.attended.append(request)
        await context.write(control_pb2.AttendResponse())
        await asyncio.Event().wait()

    async def WatchEndpoints(self, request: control_pb2.WatchEndpointsRequest, context: Any) -> None:
        self.watchers.append(request)
        sent: EndpointTable | None = None
        while True:
            async with self._changed:
                while self.table == sent:
                    await self._changed.wait()
                sent = self.table
            await context.write(convert.endpoint_table_to_message(sent))
