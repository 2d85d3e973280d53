"""A server with handlers that say what they have seen, for tests that meet it as clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from cluster.wire.http2.server import Http2Server

DEADLINE_S = 10.0
Context = Any


@dataclass
class Service:
    """What the handlers have seen, and switches for them."""

    begun: int = 0
    ended: int = 0
    cancelled: int = 0
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def echo(self, request: bytes, context: Context) -> bytes:
        context.set_trailing_metadata((("x-size", str(len(request))), ("seen-bin", b"\x00\xff")))
        return request

    async def who(self, _request: bytes, context: Context) -> bytes:
        return repr([*context.invocation_metadata(), ("left", context.time_remaining())]).encode()

    async def count(self, request: bytes, context: Context) -> None:
        """As many messages of a size as the request says: ``b"NUMBER SIZE"``."""
        number, size = map(int, request.split())
        async with self._counted():
            for index in range(number):
                await context.write(index.to_bytes(4, "big") + bytes(size - 4))

    async def wait(self, request: bytes, context: Context) -> None:
        async with self._counted():
            if request:
                await context.write(request)
            await self.go_on.wait()
            await context.write(b"end")

    async def fail(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        if request == b"bug":
            raise RuntimeError("oops")
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "100 % é", (("retry-bin", b"\x01"),))

    async def refuse_midway(self, _request: bytes, context: Context) -> None:
        async with self._counted():
            writing = asyncio.create_task(context.write(bytes(1000)))
            await asyncio.sleep(0)
            await context.abort(grpc.StatusCode.ABORTED, "")
        await writing

    async def talk(self, requests: AsyncIterator[bytes], _context: Context) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request.upper()

    @asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        self.begun += 1
        try:
            yield
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.ended += 1


@dataclass
class Site:
    service: Service
    server: Http2Server
    port: int
    channel: grpc.aio.Channel

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def unary(self, name: str) -> Any:
        return self.channel.unary_unary(f"/t.T/{name}")

    def stream(self, name: str, channel: grpc.aio.Channel | None = None) -> Any:
        return (channel or self.channel).unary_stream(f"/t.T/{name}")


Start = Callable[..., Awaitable[Site]]
LOCAL = ("grpc.use_local_subchannel_pool", 1)
LARGE = (("grpc.max_receive_message_length", 2**26), ("grpc.max_send_message_length", 2**26), LOCAL)


@asynccontextmanager
async def starting() -> AsyncIterator[Start]:
    """Starts sites with settings; nothing of them may be left at the end."""
    sites: list[Site] = []

    async def started(**settings: Any) -> Site:
        service, server = Service(), Http2Server(**settings)
        kinds: dict[str, Any] = {
            "echo": grpc.unary_unary_rpc_method_handler, "who": grpc.unary_unary_rpc_method_handler,
            "fail": grpc.unary_unary_rpc_method_handler, "count": grpc.unary_stream_rpc_method_handler,
            "wait": grpc.unary_stream_rpc_method_handler, "refuse_midway": grpc.unary_stream_rpc_method_handler,
            "talk": grpc.stream_stream_rpc_method_handler,
        }  # fmt: skip
        made = {name: kind(getattr(service, name)) for name, kind in kinds.items()}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", made),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        sites.append(Site(service, server, port, grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=LARGE)))
        return sites[-1]

    async with asyncio.timeout(4 * DEADLINE_S):
        yield started
        for site in sites:
            await site.channel.close()
            site.service.go_on.set()
            await site.server.stop(DEADLINE_S)
            assert not site.server._connections, "nobody is left"
            assert site.service.begun == site.service.ended, "every handler has ended"


async def eventually(holds: Callable[[], bool], what: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not holds():
            await asyncio.sleep(0.005)
    assert holds(), what


@asynccontextmanager
async def one_that_goes_on(site: Site) -> AsyncIterator[None]:
    """Another call of the same connection, which whatever happens meanwhile leaves alone."""
    running = site.stream("wait")(b"here")
    assert await running.read() == b"here"
    yield
    site.service.go_on.set()
    assert await running.read() == b"end"
    assert await running.code() is grpc.StatusCode.OK
