"""Adapter: the port that clients talk to."""

from __future__ import annotations

import asyncio

from cluster.wire import channel
from cluster.wire.http2.server import Http2Server


class Listener:
    """Owns the public gRPC server from its creation to ``stop``."""

    def __init__(self, *, client_stall_s: float, shared: bool = False) -> None:
        """``shared``: the port that ``bind`` is given is held for several processes (``reserve_port``)."""
        self._shared = shared
        self._server = Http2Server(shared=shared, answer_stall_s=client_stall_s)
        self._leaving: asyncio.Task[None] | None = None

    @property
    def server(self) -> Http2Server:
        """For registering services."""
        return self._server

    def bind(self, host: str, port: int) -> int:
        """The bound port; PortTakenError."""
        return (channel.bind_shared if self._shared else channel.bind)(self._server, host, port)

    async def start(self) -> None:
        await self._server.start()

    def leave_port(self, grace_s: float) -> None:
        """Listens no more; calls that run have ``grace_s``, unless ``stop`` gives them less."""
        if self._leaving is None:
            self._leaving = asyncio.get_running_loop().create_task(self._server.stop(grace_s))

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)
        if self._leaving is not None:
            self._leaving.cancel()
            await asyncio.wait([self._leaving])
