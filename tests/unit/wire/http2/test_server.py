"""The server before grpcio's own clients, and before one that speaks bare HTTP/2."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import h2.connection
import h2.events
import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe.frame import GoAwayFrame

from cluster.config.listening import can_listen
from cluster.wire.http2 import call as calls
from cluster.wire.http2 import connection as connections
from cluster.wire.http2 import protocol
from cluster.wire.http2.messages import framed
from cluster.wire.http2.outbox import Outbox
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


@pytest.fixture
async def start() -> AsyncIterator[Start]:
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


# ------------------------------------------------------------------------------------------------------ its addresses


@pytest.fixture
async def two() -> AsyncIterator[tuple[Http2Server, Http2Server]]:
    servers = Http2Server(), Http2Server()
    yield servers
    for server in servers:
        await server.stop(None)


def _none(channel: grpc.aio.Channel) -> Any:
    return channel.unary_unary("/t.T/none")


async def test_a_port_is_taken_once(two: tuple[Http2Server, Http2Server]) -> None:
    port = two[0].add_insecure_port("127.0.0.1:0")
    with pytest.raises(RuntimeError, match=str(port)):
        two[1].add_insecure_port(f"127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["[::1]:0", "[::]:0"])
@pytest.mark.skipif(not can_listen("::1", 0), reason="this machine has no IPv6 loopback")
async def test_ipv6(two: tuple[Http2Server, Http2Server], address: str) -> None:
    port = two[0].add_insecure_port(address)
    await two[0].start()
    async with grpc.aio.insecure_channel(f"[::1]:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await _none(channel)(b"", timeout=DEADLINE_S)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_all_addresses_and_names(two: tuple[Http2Server, Http2Server]) -> None:
    for server, address in zip(two, ("0.0.0.0:0", "localhost:0"), strict=True):
        port = server.add_insecure_port(address)
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
                await _none(channel)(b"", timeout=DEADLINE_S)


async def test_an_address_that_is_none(two: tuple[Http2Server, Http2Server]) -> None:
    with pytest.raises(RuntimeError, match=r"192\.0\.2\.1"):
        two[0].add_insecure_port("192.0.2.1:0")


# ----------------------------------------------------------------------------------------------- for grpcio's clients


@pytest.mark.parametrize("size", [0, 1, 16_384, 65_536, 5_000_000])
async def test_messages_of_any_size(start: Start, size: int) -> None:
    call = (await start()).unary("echo")(bytes(range(256)) * (size // 256) + b"x" * (size % 256))
    assert len(await call) == size
    trailing = dict(await call.trailing_metadata())
    assert (trailing["x-size"], trailing["seen-bin"]) == (str(size), b"\x00\xff")


async def test_metadata_and_deadline_reach_the_handler(start: Start) -> None:
    site = await start()
    metadata = (("x-tenant", "one"), ("blob-bin", b"\x00\x01"), ("x-tenant", "two"))
    seen = eval(await site.unary("who")(b"", metadata=metadata, timeout=60))
    assert [pair for pair in seen if pair[0] == "x-tenant"] == [metadata[0], metadata[2]]
    assert dict(seen)["blob-bin"] == b"\x00\x01"
    assert 50 < dict(seen)["left"] <= 60
    assert dict(eval(await site.unary("who")(b"")))["left"] is None


async def test_a_status_arrives_as_it_was_meant(start: Start) -> None:
    site = await start()
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await site.unary("fail")(b"")
    assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failed.value.details() == "100 % é"
    assert dict(failed.value.trailing_metadata() or ())["retry-bin"] == b"\x01"


async def test_a_bug_costs_one_call(start: Start) -> None:
    site = await start()
    with pytest.raises(grpc.aio.AioRpcError, match="oops") as failed:
        await site.unary("fail")(b"bug")
    assert failed.value.code() is grpc.StatusCode.UNKNOWN
    assert await site.unary("echo")(b"next") == b"next"


async def test_a_method_that_is_not_there(start: Start) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="/t.T/none".replace(".", "[.]")) as failed:
        await (await start()).unary("none")(b"")
    assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_message_that_is_too_long(start: Start) -> None:
    site = await start(largest_message=1000)
    with pytest.raises(grpc.aio.AioRpcError, match="1000 bytes") as failed:
        await site.unary("echo")(bytes(2_000_000))
    assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await site.unary("echo")(bytes(1000)) == bytes(1000)


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_requests(start: Start, compression: grpc.Compression) -> None:
    message = b"again and " * 1000
    assert await (await start()).unary("echo")(message, compression=compression) == message


async def test_a_conversation(start: Start) -> None:
    talk: Any = (await start()).channel.stream_stream("/t.T/talk")
    call = talk()
    for word in (b"one", b"two"):
        await call.write(word)
        assert await call.read() == word.upper()
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_many_streams_at_once_each_in_its_order(start: Start) -> None:
    site = await start()

    async def read(number: int, size: int) -> list[int]:
        return [int.from_bytes(m[:4], "big") async for m in site.stream("count")(b"%d %d" % (number, size))]

    sizes = [4, 300, 20_000, 100_000]
    got = await asyncio.gather(*(read(60, sizes[index % 4]) for index in range(40)))
    assert got == [list(range(60))] * 40


async def test_a_client_that_does_not_read_holds_its_handler_and_nobody_else(start: Start) -> None:
    site = await start()
    little = (("grpc.http2.lookahead_bytes", 16384), ("grpc.http2.bdp_probe", 0), LOCAL)
    async with grpc.aio.insecure_channel(site.address, options=little) as narrow:
        slow = site.stream("count", narrow)(b"500 10000")
        await eventually(lambda: site.service.begun == 1, "it writes")
        assert await site.unary("echo")(b"other") == b"other"
        assert site.service.ended == 0, "five megabytes do not fit between them"
        got = [int.from_bytes(message[:4], "big") async for message in slow]
    assert got == list(range(500))


async def test_a_client_that_leaves_cancels_its_handler(start: Start) -> None:
    site = await start()
    call = site.stream("wait")(b"here")
    assert await call.read() == b"here"
    call.cancel()
    await eventually(lambda: site.service.cancelled == 1, "its handler is told")


async def test_a_connection_that_breaks_cancels_all_its_handlers(start: Start) -> None:
    site = await start()
    calls = [site.stream("wait")(b"here") for _ in range(20)]
    for call in calls:
        await call.read()
    await site.channel.close()
    await eventually(lambda: site.service.cancelled == 20, "all are told")


async def test_a_deadline_ends_a_call_on_both_sides(start: Start) -> None:
    site = await start()
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        _ = [message async for message in site.stream("wait")(b"here", timeout=0.2)]
    assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: site.service.cancelled == 1, "its handler is told")


async def test_stopping_lets_calls_end_and_takes_no_new_ones(start: Start) -> None:
    site = await start()
    call = site.stream("wait")(b"here")
    assert await call.read() == b"here"
    stopping = asyncio.create_task(site.server.stop(DEADLINE_S))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await site.unary("echo")(b"late")
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    site.service.go_on.set()
    assert await call.read() == b"end"
    assert await call.code() is grpc.StatusCode.OK
    await stopping


async def test_a_deadline_that_is_over_at_once(start: Start) -> None:
    async with bare(await start()) as client:
        calls = [client.request(("grpc-timeout", f"{micros}u")) for micros in (0, 1, 10, 100)]
        for stream_id in calls:
            client.h2.send_data(stream_id, framed(b"x"), end_stream=True)
        assert {(await client.status(stream_id))["grpc-status"] for stream_id in calls} <= {"0", "4"}


async def test_a_client_that_says_goodbye_reads_what_it_has_asked_for(start: Start) -> None:
    site = await start()
    async with bare(site) as client:
        call = client.request(path="/t.T/wait")
        client.h2.send_data(call, framed(b"here"), end_stream=True)
        await client.until(lambda: bool(client.of(h2.events.DataReceived)))
        client.writer.write(GoAwayFrame(0, last_stream_id=0, error_code=0).serialize())
        client.h2.ping(bytes(8))
        await client.until(lambda: bool(client.of(h2.events.PingAckReceived)))
        site.service.go_on.set()
        assert (await client.status(call))["grpc-status"] == "0"


@pytest.mark.parametrize("sizes", [(0,), (100,), (2**31 - 1,), (0, 0), (0, 4096)])
async def test_a_client_s_table_of_headers_is_not_filled(start: Start, sizes: tuple[int, ...]) -> None:
    site = await start()
    async with bare(site) as client:
        for size in sizes:
            client.h2.update_settings({SettingCodes.HEADER_TABLE_SIZE: size})
        for _ in range(2):
            call = client.request()
            client.h2.send_data(call, framed(b"x"), end_stream=True)
            assert (await client.status(call))["grpc-status"] == "0"
        (connection,) = site.server._connections
        assert not connection._h2.encoder.header_table.dynamic_entries


async def test_windows_of_other_streams_cost_nothing(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    site = await start()
    pushes: list[int] = []
    push = Outbox._push

    def counted(self: Outbox, stream_id: int, data: memoryview) -> memoryview | None:
        pushes.append(stream_id)
        return push(self, stream_id, data)

    monkeypatch.setattr(Outbox, "_push", counted)
    async with bare(site) as client:
        client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
        streams = [client.request(path="/t.T/count") for _ in range(50)]
        for stream_id in streams:
            client.h2.send_data(stream_id, framed(b"1 10"), end_stream=True)
        await client.until(lambda: len(client.of(h2.events.ResponseReceived)) == 50)
        pushes.clear()
        for _ in range(20):
            client.h2.increment_flow_control_window(1)
        client.h2.increment_flow_control_window(100, streams[7])
        assert (await client.status(streams[7]))["grpc-status"] == "0"
        assert pushes == [streams[7]]


async def test_stopping_at_once_cancels(start: Start) -> None:
    site = await start()
    call = site.stream("wait")(b"here")
    await call.read()
    await asyncio.gather(site.server.stop(DEADLINE_S), site.server.stop(None))
    assert site.service.cancelled == 1
    assert await call.code() is grpc.StatusCode.UNAVAILABLE


@asynccontextmanager
async def one_that_goes_on(site: Site) -> AsyncIterator[None]:
    """Another call of the same connection, which whatever happens meanwhile leaves alone."""
    running = site.stream("wait")(b"here")
    assert await running.read() == b"here"
    yield
    site.service.go_on.set()
    assert await running.read() == b"end"
    assert await running.code() is grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("name", "code"), [("none", grpc.StatusCode.UNIMPLEMENTED), ("echo", grpc.StatusCode.RESOURCE_EXHAUSTED)]
)
async def test_a_refused_upload_costs_nobody_else_anything(start: Start, name: str, code: grpc.StatusCode) -> None:
    site = await start(largest_message=1000)
    async with one_that_goes_on(site):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await site.unary(name)(bytes(10**7))
        assert refused.value.code() is code


async def test_metadata_that_are_too_long_cost_one_call(start: Start) -> None:
    site = await start()
    async with one_that_goes_on(site):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await site.unary("echo")(b"", metadata=(("x-long", "x" * 100_000),))
        assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await site.unary("echo")(b"x", metadata=(("x-padded", " padded "), ("x-long", "x" * 10_000))) == b"x"


async def test_a_thousand_clients_that_give_up_cost_nobody_else_anything(start: Start) -> None:
    site = await start()
    async with one_that_goes_on(site):
        calls = [site.stream("wait")(b"") for _ in range(1500)]
        await eventually(lambda: site.service.begun == 1501, "all run")
        for call in calls:
            call.cancel()
        await eventually(lambda: site.service.cancelled == 1500, "all are told")


async def test_nothing_of_a_call_is_left(start: Start) -> None:
    site = await start()
    for _ in range(3):
        await asyncio.gather(*(site.unary("echo")(b"x") for _ in range(100)))
    (connection,) = site.server._connections
    await eventually(lambda: connection.calls == 0, "all have ended")
    gc.collect()
    streams = connection._h2.streams
    assert len(streams) <= 2 * protocol.LOOKS_AT_ONCE + 100, "h2 forgets them with the streams that follow"


# ------------------------------------------------------------------------------------------------------ bare HTTP/2


class Bare:
    """An HTTP/2 client that sends what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        config = h2.config.H2Configuration(validate_outbound_headers=False, normalize_outbound_headers=False)
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        self.events: list[h2.events.Event] = []
        self.closed = False

    def request(self, *more: tuple[str, str], end: bool = False, path: str = "/t.T/echo") -> int:
        stream_id = self.h2.get_next_available_stream_id()
        given = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "t", "te": "trailers",
                 "content-type": "application/grpc"} | dict(more)  # fmt: skip
        self.h2.send_headers(stream_id, list(given.items()), end_stream=end)
        return stream_id

    async def flush(self) -> None:
        self.writer.write(self.h2.data_to_send())
        with suppress(ConnectionError):
            await self.writer.drain()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not holds():
                await self.flush()
                try:
                    data = await self.reader.read(65536)
                except ConnectionError:  # what we still sent was not read any more
                    data = b""
                if not data:
                    self.closed = True
                    assert holds(), f"the connection has ended after {self.events[-3:]}"
                    return
                self.events += self.h2.receive_data(data)

    def of(self, kind: type, stream_id: int | None = None) -> list[Any]:
        return [
            e for e in self.events if type(e) is kind and (not stream_id or getattr(e, "stream_id", 0) == stream_id)
        ]

    async def status(self, stream_id: int) -> dict[str, str]:
        """The last header block of a stream."""
        await self.until(lambda: bool(self.of(h2.events.StreamEnded, stream_id)))
        blocks = self.of(h2.events.TrailersReceived, stream_id) or self.of(h2.events.ResponseReceived, stream_id)
        return {name.decode(): value.decode() for name, value in blocks[-1].headers}

    async def gone(self) -> None:
        await self.until(lambda: self.closed)


@asynccontextmanager
async def bare(site: Site) -> AsyncIterator[Bare]:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    try:
        yield Bare(reader, writer)
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.parametrize(
    ("header", "status"), [((":method", "GET"), "405"), (("content-type", "text/html"), "415")], ids=str
)
async def test_http_that_is_no_grpc(start: Start, header: tuple[str, str], status: str) -> None:
    async with bare(await start()) as client:
        assert (await client.status(client.request(header, end=True)))[":status"] == status
        assert (await client.status(client.request(header)))[":status"] == status  # its body is not waited for


@pytest.mark.parametrize("body", [b"", b"\x00\x00", framed(b"a") + framed(b"b"), framed(b"cut")[:-1]])
async def test_one_message_it_has_to_be(start: Start, body: bytes) -> None:
    async with bare(await start()) as client:
        stream_id = client.request()
        client.h2.send_data(stream_id, body, end_stream=True)
        assert (await client.status(stream_id))["grpc-status"] == "3"
        after = client.request()
        client.h2.send_data(after, framed(b"fine"), end_stream=True)
        assert (await client.status(after))["grpc-status"] == "0"


async def test_a_deadline_passes_before_the_message_has_come(start: Start) -> None:
    async with bare(await start()) as client:
        assert (await client.status(client.request(("grpc-timeout", "50m"))))["grpc-status"] == "4"


async def test_windows_that_close_and_open_again(start: Start) -> None:
    site = await start()
    async with bare(site) as client:
        client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
        streams = [client.request(path="/t.T/count") for _ in range(5)]
        for stream_id in streams:
            client.h2.send_data(stream_id, framed(b"3 30000"), end_stream=True)
        await client.until(lambda: len(client.of(h2.events.ResponseReceived)) == 5)
        assert not client.of(h2.events.DataReceived)
        client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 10})
        await client.until(lambda: len(client.of(h2.events.DataReceived)) == 5)
        assert site.service.ended == 0
        client.h2.increment_flow_control_window(10**6)
        for stream_id in streams:
            client.h2.increment_flow_control_window(10**5, stream_id)
        for stream_id in streams:
            assert (await client.status(stream_id))["grpc-status"] == "0"
            whole = b"".join(event.data for event in client.of(h2.events.DataReceived, stream_id))
            assert whole == b"".join(framed(index.to_bytes(4, "big") + bytes(29_996)) for index in range(3))


async def test_a_stream_that_is_reset_early_and_often_ends_its_connection(start: Start) -> None:
    site = await start()
    async with bare(site) as client:
        for _ in range(connections.IDLE_BYTES_MAX // 9 + 10):  # the head of a frame has 9 bytes
            client.h2.reset_stream(client.request(path="/t.T/wait"), ErrorCodes.CANCEL)
        await client.gone()
        # A goodbye is lost where the client goes on sending.
        assert all(e.error_code == ErrorCodes.ENHANCE_YOUR_CALM for e in client.of(h2.events.ConnectionTerminated))
    assert site.service.begun == 0
    assert await site.unary("echo")(b"others go on") == b"others go on"


@pytest.mark.parametrize("kind", ["ping", "settings", "window", "priority", "empty"])
async def test_floods_that_bring_no_call_further_end_their_connection(start: Start, kind: str) -> None:
    site = await start()
    async with bare(site) as client:
        stream_id = client.request(path="/t.T/wait")
        await client.flush()
        for _ in range(connections.IDLE_BYTES_MAX // 9 + 100):
            if kind == "ping":
                client.h2.ping(bytes(8))
            elif kind == "settings":
                client.h2.update_settings({SettingCodes.ENABLE_PUSH: 0})
            elif kind == "window":
                client.h2.increment_flow_control_window(1, stream_id)
            elif kind == "priority":
                client.h2.prioritize(stream_id, weight=3)
            else:
                client.h2.send_data(stream_id, b"")
        await client.gone()
        assert all(e.error_code == ErrorCodes.ENHANCE_YOUR_CALM for e in client.of(h2.events.ConnectionTerminated))
    assert await site.unary("echo")(b"others go on") == b"others go on"


async def test_a_client_that_only_pings_now_and_then_may_do_so_for_ever(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "IDLE_BYTES_MAX", 400)
    site = await start(keepalive_s=0.01, keepalive_timeout_s=DEADLINE_S)
    async with bare(site) as client:
        for count in range(1, 41):  # 680 bytes
            client.h2.ping(bytes(8))
            while len(client.of(h2.events.PingAckReceived)) < count:
                seen = len(client.events)
                await client.until(lambda: len(client.events) > seen)  # noqa: B023 - awaited at once
            await asyncio.sleep(0.02)
        stream_id = client.request()
        client.h2.send_data(stream_id, framed(b"x"), end_stream=True)
        assert (await client.status(stream_id))["grpc-status"] == "0"


async def test_bytes_that_are_no_http2(start: Start) -> None:
    site = await start()
    async with bare(site) as client:
        client.writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await client.gone()
    assert await site.unary("echo")(b"others go on") == b"others go on"


async def test_a_client_that_is_silent_is_pinged_and_then_given_up(start: Start) -> None:
    site = await start(keepalive_s=0.05, keepalive_timeout_s=0.2)
    async with bare(site) as client:
        call = client.request(path="/t.T/wait")
        client.h2.send_data(call, framed(b"x"), end_stream=True)
        await client.until(lambda: bool(client.of(h2.events.PingReceived)))
        await eventually(lambda: site.service.begun == 1, "it runs")
        while await client.reader.read(65536):  # and never answers
            pass
        await eventually(lambda: site.service.cancelled == 1, "its call ends with it")


async def test_who_answers_pings_is_kept(start: Start) -> None:
    site = await start(keepalive_s=0.02, keepalive_timeout_s=1.0)
    async with bare(site) as client:
        await client.until(lambda: len(client.of(h2.events.PingReceived)) == 3)
        stream_id = client.request()
        client.h2.send_data(stream_id, framed(b"x"), end_stream=True)
        assert (await client.status(stream_id))["grpc-status"] == "0"


async def test_callers_who_send_no_end_do_not_hold_up_the_others(start: Start) -> None:
    site = await start()
    async with bare(site) as client:
        for _ in range(300):
            client.h2.send_data(client.request(), framed(bytes(16_000)))
            await client.until(lambda: client.h2.outbound_flow_control_window > 16_005)
        assert client.h2.outbound_flow_control_window > 2**20, "what came is acknowledged"


async def test_a_long_message_is_no_noise(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "IDLE_BYTES_MAX", 2000)
    site = await start()
    assert await site.unary("echo")(bytes(2**24)) == bytes(2**24)


async def test_an_abort_does_not_wait_for_a_client_that_does_not_read(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "ABORT_S", 0.05)
    site = await start()
    async with bare(site) as client:
        client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 10})
        call = client.request(path="/t.T/refuse_midway")
        client.h2.send_data(call, framed(b""), end_stream=True)
        await client.until(lambda: bool(client.of(h2.events.StreamReset, call)))
    await eventually(lambda: site.service.ended == 1, "its handler has ended")


async def test_a_good_message_comes_before_a_bad_one(start: Start) -> None:
    site = await start(largest_message=100)
    async with bare(site) as client:
        call = client.request(path="/t.T/talk")
        client.h2.send_data(call, framed(b"good") + framed(bytes(101)))
        status = await client.status(call)
        assert status["grpc-status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        assert [data.data for data in client.of(h2.events.DataReceived, call)] == [framed(b"GOOD")]
