"""Adapter: the gRPC server as a thing that is certainly gone before its event loop.

grpc.aio's server schedules its own end on the event loop when it is collected. An exception whose traceback
still knows it would put that off until the loop is closed, and the process would hang.
"""

from __future__ import annotations

import grpc.aio

from cluster.domain.errors import PortTakenError
from cluster.wire import channel


class Listener:
    """Owns one gRPC server from its creation to ``stop``, after which nobody holds it any more."""

    def __init__(self) -> None:
        self._server: grpc.aio.Server | None = channel.new_server()

    @property
    def server(self) -> grpc.aio.Server:
        """For registering services; keep no reference to it."""
        assert self._server is not None, "stopped"
        return self._server

    def bind(self, host: str, port: int) -> int:
        """The bound port; PortTakenError."""
        taken = ""
        try:
            return channel.bind(self.server, host, port)
        except PortTakenError as error:
            taken = str(error)
        raise PortTakenError(taken)  # a new one: the old one's traceback knows the server

    async def start(self) -> None:
        await self.server.start()

    async def stop(self, grace_s: float) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace_s)
