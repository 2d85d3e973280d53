"""Adapter: the gRPC server as a thing that is certainly gone before its event loop.

grpc.aio's server schedules its own end on the event loop when it is collected. An exception whose traceback
still knows it would put that off until the loop is closed, and the process would hang.
"""

from __future__ import annotations

import asyncio

import grpc.aio

from cluster.domain.errors import PortTakenError
from cluster.wire import channel
from cluster.wire.http2.server import Http2Server


class Listener:
    """Owns one gRPC server from its creation to ``stop``, after which nobody holds it any more."""

    def __init__(self, *, shared: bool = False) -> None:
        """``shared``: the port that ``bind`` is given is held for several processes (``reserve_port``)."""
        self._shared = shared
        self._server: grpc.aio.Server | None = Http2Server(shared=shared)
        self._leaving: asyncio.Task[None] | None = None

    @property
    def server(self) -> grpc.aio.Server:
        """For registering services; keep no reference to it."""
        assert self._server is not None, "stopped"
        return self._server

    def bind(self, host: str, port: int) -> int:
        """The bound port; PortTakenError."""
        taken = ""
        try:
            return (channel.bind_shared if self._shared else channel.bind)(self.server, host, port)
        except PortTakenError as error:
            taken = str(error)
        raise PortTakenError(taken)  # a new one: the old one's traceback knows the server

    async def start(self) -> None:
        await self.server.start()

    def leave_port(self, grace_s: float) -> None:
        """Listens no more; calls that run have ``grace_s``, unless ``stop`` gives them less."""
        if self._server is not None and self._leaving is None:
            self._leaving = asyncio.get_running_loop().create_task(self._server.stop(grace_s))

    async def stop(self, grace_s: float) -> None:
        server, self._server = self._server, None
        leaving, self._leaving = self._leaving, None
        if server is not None:
            await server.stop(grace_s)
        if leaving is not None:
            await leaving
