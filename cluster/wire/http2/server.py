"""grpcio's asyncio server's interface over HTTP/2 of our own, at a fraction of the cost of a message.

For servicers that are written for ``grpc.aio``. Only what this project uses is there: no TLS, no interceptors.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from cluster.wire.channel import KEEPALIVE_S, KEEPALIVE_TIMEOUT_S, MAX_MESSAGE_BYTES
from cluster.wire.http2.call import ServerCall
from cluster.wire.http2.connection import Connection
from cluster.wire.http2.messages import CallRefused

LEAVE_S = 1.0  # for handlers that were cancelled, to end
ANSWER_STALL_S = 60.0
_WILDCARDS = ("0.0.0.0", "::")  # noqa: S104 - compared with


@dataclass
class _Called:
    """grpc.HandlerCallDetails. No handler of this project chooses by metadata."""

    method: str
    invocation_metadata: tuple[tuple[str, str | bytes], ...] = ()


class Http2Server(grpc.aio.Server):
    """See ``grpc.aio.Server``. ``stop`` may be called more than once; the shortest grace counts."""

    def __init__(
        self,
        *,
        shared: bool = False,
        largest_message: int = MAX_MESSAGE_BYTES,
        answer_stall_s: float = ANSWER_STALL_S,
        keepalive_s: float = KEEPALIVE_S,
        keepalive_timeout_s: float = KEEPALIVE_TIMEOUT_S,
    ) -> None:
        """``shared``: by SO_REUSEPORT with others of this user. A client silent for ``keepalive_s`` is pinged.

        ``answer_stall_s``: how long the only message of a unary answer waits for its client to read some of it.
        """
        self.largest_message, self.answer_stall_s = largest_message, answer_stall_s
        self.keepalive_s, self.keepalive_timeout_s = keepalive_s, keepalive_timeout_s
        # Hears the path of each call whose handler never saw it, and what its client was told; None: it had left.
        self.on_unserved: Callable[[str, grpc.StatusCode | None], None] | None = None
        self._shared = shared
        self._generic: list[grpc.GenericRpcHandler] = []
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self._sockets: list[socket.socket] = []
        self._listening: list[asyncio.Server] = []
        self._connections: set[Connection] = set()
        self._idle = asyncio.Event()
        self._stopped = asyncio.Event()
        self.leaving = False

    # ----------------------------------------------------------------------------------------- as grpc.aio.Server has

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        self._generic.extend(generic_rpc_handlers)

    def add_insecure_port(self, address: str) -> int:
        """Listens on ``address`` (HOST:PORT, 0: any) at once and serves from ``start`` on; RuntimeError."""
        host, _, port = address.rpartition(":")
        host, bound = host.strip("[]"), int(port)
        found = [""] if host in _WILDCARDS else []
        try:
            if not found:
                resolved = socket.getaddrinfo(host, bound, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
                found = list(dict.fromkeys(str(address[0]) for *_, address in resolved))
            sockets: list[socket.socket] = []
            try:
                for each in found:
                    sockets.append(self._listen(each, bound))
                    bound = sockets[-1].getsockname()[1]
            except OSError:
                for opened in sockets:
                    opened.close()
                raise
        except OSError as error:
            raise RuntimeError(f"Failed to bind to address {address}: {error}") from error
        self._sockets += sockets
        return bound

    def add_secure_port(self, address: str, server_credentials: Any) -> int:
        del address, server_credentials
        raise grpc.aio.UsageError("There is no TLS here; put a proxy that has it in front.")

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        for listening in self._sockets:
            server = await loop.create_server(lambda: Connection(self), sock=listening, backlog=socket.SOMAXCONN)
            self._listening.append(server)
        self._sockets.clear()

    async def stop(self, grace: float | None) -> None:
        self.leaving = True
        for listening in self._listening:
            listening.close()
        for unused in self._sockets:
            unused.close()
        self._sockets.clear()
        for connection in tuple(self._connections):
            connection.go_away()
        await self._until_idle(grace or 0.0)
        for connection in tuple(self._connections):
            connection.cancel_calls()
        await self._until_idle(LEAVE_S)
        await asyncio.sleep(0)  # what is left to be sent is sent
        for connection in tuple(self._connections):
            connection.abort()
        self._stopped.set()

    async def wait_for_termination(self, timeout: float | None = None) -> bool:
        try:
            await asyncio.wait_for(self._stopped.wait(), timeout)
        except TimeoutError:
            return True
        return False

    # ------------------------------------------------------------------------------------------------ for connections

    def method_at(self, path: str) -> grpc.RpcMethodHandler[Any, Any]:
        """The handler of the method ``path``; CallRefused when there is none."""
        known = self._handlers.get(path)
        if known is not None:
            return known
        for generic in self._generic:
            found = generic.service(_Called(path))
            if found is not None:
                self._handlers[path] = found
                return found
        raise CallRefused(grpc.StatusCode.UNIMPLEMENTED, f"There is no method {path[:200]!r} here; check its name.")

    def opened(self, connection: Connection) -> None:
        self._connections.add(connection)

    def closed(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._look_whether_idle()

    def call_ended(self, call: ServerCall) -> None:
        if not call.served:
            self.unserved(call.path, call.ended_as)
        if self.leaving:
            self._look_whether_idle()

    def unserved(self, path: str, code: grpc.StatusCode | None) -> None:
        if self.on_unserved is not None:
            self.on_unserved(path, code)

    # ----------------------------------------------------------------------------------------------------------- inner

    async def _until_idle(self, limit_s: float) -> None:
        self._idle.clear()
        self._look_whether_idle()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), limit_s)

    def _look_whether_idle(self) -> None:
        if not any(connection.calls for connection in self._connections):
            self._idle.set()

    def _listen(self, host: str, port: int) -> socket.socket:
        """``host`` "": all addresses, of IPv6 and IPv4 where the machine has both."""
        both = not host and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
        listening = socket.create_server(
            (host, port), family=family, backlog=socket.SOMAXCONN, reuse_port=self._shared, dualstack_ipv6=both
        )
        # Connections inherit it; asyncio sets it only where a socket's protocol is named. A token must not wait for
        # the acknowledgement of the one before.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
