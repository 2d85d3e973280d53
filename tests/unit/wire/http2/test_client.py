"""The client before grpcio's server, before ours, and before those that speak something else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from hyperframe.frame import Frame, GoAwayFrame, RstStreamFrame

from cluster.wire.channel import new_server
from cluster.wire.http2 import client
from cluster.wire.http2.client import Http2Channel
from cluster.wire.http2.client_call import ClientCall
from cluster.wire.http2.messages import framed
from cluster.wire.http2.server import Http2Server

DEADLINE_S = 10.0
MANY, SIZE = 400, 20_000  # eight megabytes: more than all windows and buffers between two processes
LARGE = 20 * 2**20


def as_it_is(message: bytes) -> bytes:
    return message


class Service:
    """Handlers of the method names, and what they have seen."""

    def __init__(self) -> None:
        self.begun = self.ended = self.taken = 0
        self.go_on = asyncio.Event()

    async def echo(self, request: bytes, _context: Any) -> bytes:
        return request

    async def hang(self, request: bytes, _context: Any) -> bytes:
        return await self._counted(self._wait(request))

    async def fail(self, request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, request.decode() or "100 % é")
        return b""

    async def talk(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """Answers in capitals; fails at b"fail"."""

        async def talking() -> None:
            async for request in requests:
                if request == b"fail":
                    await context.abort(grpc.StatusCode.ABORTED, "as you wish")
                await context.write(request.upper())

        await self._counted(talking())

    async def count(self, _requests: AsyncIterator[bytes], context: Any) -> None:
        async def counting() -> None:
            for index in range(MANY):
                await context.write(index.to_bytes(4, "big") + bytes(SIZE))

        await self._counted(counting())

    async def late(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """Reads nothing before ``go_on``."""

        async def reading() -> None:
            await self.go_on.wait()
            async for _ in requests:
                self.taken += 1
            await context.write(b"%d" % self.taken)

        await self._counted(reading())

    async def _wait(self, request: bytes) -> bytes:
        await self.go_on.wait()
        return request

    async def _counted(self, work: Any) -> Any:
        self.begun += 1
        try:
            return await work
        finally:
            self.ended += 1


class Site:
    def __init__(self, make: Callable[[], grpc.aio.Server]) -> None:
        self.service, self._make = Service(), make
        self.port = 0

    async def start(self) -> None:
        self.server = self._make()
        unary = {
            name: grpc.unary_unary_rpc_method_handler(getattr(self.service, name)) for name in ("echo", "hang", "fail")
        }
        streams = {
            name: grpc.stream_stream_rpc_method_handler(getattr(self.service, name))
            for name in ("talk", "count", "late")
        }
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", unary | streams),))
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self.server.start()

    def channel(self, **options: Any) -> Http2Channel:
        return Http2Channel(f"127.0.0.1:{self.port}", **options)


@pytest.fixture(params=[Http2Server, new_server], ids=["ours", "grpcio"])
async def site(request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    made = Site(request.param)
    await made.start()
    async with asyncio.timeout(4 * DEADLINE_S):
        yield made
        made.service.go_on.set()
        await made.server.stop(DEADLINE_S)
        await eventually(lambda: made.service.begun == made.service.ended, "every handler has ended")


@pytest.fixture
async def channel(site: Site) -> AsyncIterator[Http2Channel]:
    async with site.channel() as opened:
        yield opened


async def eventually(holds: Callable[[], bool], what: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not holds():
            await asyncio.sleep(0.01)
    assert holds(), what


def ask(channel: Http2Channel, name: str, request: bytes) -> Any:
    return channel.unary_unary(f"/t.T/{name}", as_it_is, as_it_is)(request)


async def stream(channel: Http2Channel, name: str) -> ClientCall[bytes, bytes]:
    return await channel.stream(f"/t.T/{name}", as_it_is, as_it_is)


async def failure(work: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await work
    return failed.value.code(), str(failed.value.details())


@pytest.mark.parametrize("request_", [b"", b"hello", bytes(range(256)) * (LARGE // 256)], ids=["none", "one", "large"])
async def test_a_unary_call(channel: Http2Channel, request_: bytes) -> None:
    assert await ask(channel, "echo", request_) == request_


async def test_calls_share_a_connection(channel: Http2Channel) -> None:
    asked = [b"%d" % index for index in range(200)]
    assert await asyncio.gather(*(ask(channel, "echo", each) for each in asked)) == asked
    assert await ask(channel, "echo", b"last") == b"last"  # h2 forgets streams when another one begins
    assert channel._link is not None
    assert not channel._link._calls, "none is kept"
    assert len(channel._link._h2.streams) < 10, "nor its stream"


async def test_a_status_and_its_words_come_as_they_were_sent(channel: Http2Channel) -> None:
    assert await failure(ask(channel, "fail", b"")) == (grpc.StatusCode.FAILED_PRECONDITION, "100 % é")
    code, _ = await failure(ask(channel, "nothing", b""))
    assert code is grpc.StatusCode.UNIMPLEMENTED


async def test_a_stream_of_both_sides(channel: Http2Channel) -> None:
    call = await stream(channel, "talk")
    for word in (b"one", b"two"):
        await call.write(word)
        assert await call.read() == word.upper()
    await call.write(b"three")
    call.done_writing()
    assert [await call.read(), await call.read(), await call.read()] == [b"THREE", None, None]


async def test_messages_before_a_failure_are_read_first(channel: Http2Channel) -> None:
    call = await stream(channel, "talk")
    await call.write(b"one")
    await call.write(b"fail")
    assert await call.read() == b"ONE"
    for _ in range(2):
        assert await failure(call.read()) == (grpc.StatusCode.ABORTED, "as you wish")
    assert (await failure(call.write(b"more")))[0] is grpc.StatusCode.ABORTED


async def test_each_message_is_given_in_order_until_the_end(channel: Http2Channel) -> None:
    call, got = await stream(channel, "count"), []
    call.done_writing()
    first = await call.read()
    await call.each(got.append)
    assert [int.from_bytes(one[:4], "big") for one in (first or b"", *got)] == list(range(MANY))


async def test_a_failure_ends_each(channel: Http2Channel) -> None:
    call, got = await stream(channel, "talk"), []
    await call.write(b"one")
    await call.write(b"fail")
    assert (await failure(call.each(got.append)))[0] is grpc.StatusCode.ABORTED
    assert got == [b"ONE"]


@pytest.mark.parametrize("buffered", [False, True])
async def test_what_each_is_given_may_end_the_call(site: Site, channel: Http2Channel, *, buffered: bool) -> None:
    class Enough(Exception):  # noqa: N818 - no fault
        pass

    def enough(_message: bytes) -> None:
        raise Enough

    call = await stream(channel, "talk")
    if buffered:
        await call.write(b"one")
        await call.write(b"two")
        assert await call.read() == b"ONE"
        reader = call._reader
        assert reader is not None
        await eventually(reader.ready, "the second is here")
        with pytest.raises(Enough):
            await call.each(enough)
        call.cancel()
    else:
        async with asyncio.TaskGroup() as group:
            group.create_task(call.write(b"one"))
            with pytest.raises(Enough):
                await call.each(enough)
    await eventually(lambda: site.service.ended == 1, "its handler is told")
    assert await ask(channel, "echo", b"others") == b"others"


async def test_cancelling_tells_both_sides(site: Site, channel: Http2Channel) -> None:
    call = await stream(channel, "talk")
    await call.write(b"one")
    assert await call.read() == b"ONE"
    reading = asyncio.create_task(call.read())
    await asyncio.sleep(0)
    call.cancel()
    assert (await failure(reading))[0] is grpc.StatusCode.CANCELLED
    await eventually(lambda: site.service.ended == 1, "its handler is told")


async def test_a_cancelled_task_cancels_its_unary_call(site: Site, channel: Http2Channel) -> None:
    asking = asyncio.create_task(ask(channel, "hang", b""))
    await eventually(lambda: site.service.begun == 1, "it has come")
    asking.cancel()
    await eventually(lambda: site.service.ended == 1, "its handler is told")


async def test_what_nobody_reads_holds_its_sender_and_nobody_else(site: Site, channel: Http2Channel) -> None:
    call, got = await stream(channel, "count"), []
    call.done_writing()
    assert await call.read() is not None
    await eventually(lambda: call._reader is not None and call._reader.untaken > 2**19, "much has come")
    assert await ask(channel, "echo", b"other") == b"other"
    assert site.service.ended == 0, "it does not fit between them"
    await call.each(got.append)
    assert len(got) == MANY - 1


async def test_a_server_that_does_not_read_holds_the_writer_and_nobody_else(site: Site, channel: Http2Channel) -> None:
    call = await stream(channel, "late")

    async def write() -> None:
        for _ in range(MANY):
            await call.write(bytes(5 * SIZE))
        call.done_writing()

    writing = asyncio.create_task(write())
    await eventually(lambda: call.unsent is not None, "it is held")
    assert await ask(channel, "echo", b"other") == b"other"
    assert not writing.done()
    site.service.go_on.set()
    assert await call.read() == b"%d" % MANY
    await writing


async def test_a_message_beyond_the_limit_ends_its_call(site: Site) -> None:
    async with site.channel(largest_message=1000) as narrow:
        assert (await failure(ask(narrow, "echo", bytes(1001))))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await ask(narrow, "echo", bytes(1000)) == bytes(1000)


async def test_nobody_there() -> None:
    async with Http2Channel("127.0.0.1:1") as channel:
        code, why = await failure(ask(channel, "echo", b""))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "127.0.0.1:1 cannot be reached" in why


async def test_a_server_that_dies_ends_its_calls_and_the_next_one_finds_its_successor(
    site: Site, channel: Http2Channel
) -> None:
    call = await stream(channel, "talk")
    await call.write(b"one")
    assert await call.read() == b"ONE"
    await site.server.stop(0)
    code, _ = await failure(call.read())
    assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    await site.start()
    assert await ask(channel, "echo", b"again") == b"again"


async def test_a_server_that_leaves_in_peace_ends_what_it_has(site: Site, channel: Http2Channel) -> None:
    call = await stream(channel, "talk")
    await call.write(b"one")
    assert await call.read() == b"ONE"
    leaving = asyncio.create_task(site.server.stop(DEADLINE_S))
    link = channel._link
    assert link is not None
    await eventually(lambda: not link.usable, "it has said so")
    assert (await failure(ask(channel, "echo", b"")))[0] is grpc.StatusCode.UNAVAILABLE
    await call.write(b"two")
    assert await call.read() == b"TWO"
    call.done_writing()
    assert await call.read() is None
    await leaving


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10, b"\x00" * 100, b""])
async def test_somebody_else_at_the_port(greeting: bytes) -> None:
    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, Http2Channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(DEADLINE_S):
        assert (await failure(ask(channel, "echo", b"")))[0] is grpc.StatusCode.UNAVAILABLE


async def test_a_host_that_takes_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CLOSE_S", 0.01)
    accepted: list[asyncio.StreamReader] = []

    async def deaf(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        accepted.append(reader)
        await asyncio.Event().wait()

    server = await asyncio.start_server(deaf, "127.0.0.1", 0, limit=1)
    channel = Http2Channel(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    call = await stream(channel, "late")
    link = channel._link
    assert link is not None
    link._h2.remote_settings.initial_window_size = 2**30
    link._h2.outbound_flow_control_window = 2**30
    link._h2.streams[call.stream_id].outbound_flow_control_window = 2**30
    writing = asyncio.create_task(call.write(bytes(32 * 2**20)))
    await eventually(lambda: call.unsent is not None, "the sockets are full")
    await channel.close()
    assert (await failure(writing))[0] is grpc.StatusCode.CANCELLED
    await eventually(lambda: link._transport is None, "its connection is gone")
    server.close()
    for reader in accepted:
        reader._transport.abort()  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------------------- a server by hand


class Peer(asyncio.Transport):
    """A server that sends what it likes over a connection that is only bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.link = client.ClientLink("peer", 1000)
        self.h2 = H2Connection(H2Configuration(client_side=False, validate_outbound_headers=False))
        self.h2.initiate_connection()
        self.closing = False
        self.link.connection_made(self)
        self.tell()

    def write(self, data: Any) -> None:
        self.h2.receive_data(bytes(data))

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = True

    async def call(self) -> ClientCall[bytes, bytes]:
        begun: ClientCall[bytes, bytes] = ClientCall("/t.T/talk", as_it_is, as_it_is)
        begun.begin(self.link)
        await asyncio.sleep(0)  # what is sent goes out at the end of the turn
        self.h2.send_headers(begun.stream_id, [(":status", "200"), ("content-type", "application/grpc")])
        return begun

    def tell(self, *frames: Frame) -> None:
        """All that waits, and ``frames``, in one piece."""
        self.link.data_received(self.h2.data_to_send() + b"".join(frame.serialize() for frame in frames))


async def test_a_good_message_is_read_before_one_that_is_too_long() -> None:
    peer = Peer()
    call, other = await peer.call(), await peer.call()
    peer.h2.send_data(call.stream_id, framed(b"good") + framed(bytes(1001)))
    peer.tell()
    assert await call.read() == b"good"
    assert (await failure(call.read()))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert other.status is None


async def test_an_answer_that_ends_with_half_a_message_is_no_good_one() -> None:
    peer, got = Peer(), []
    for each in (False, True):
        call = await peer.call()
        peer.h2.send_data(call.stream_id, framed(b"good") + framed(b"half")[:-1])
        peer.h2.send_headers(call.stream_id, [("grpc-status", "0")], end_stream=True)
        peer.tell()
        if each:
            code, _ = await failure(call.each(got.append))
            assert got == [b"good"]
        else:
            assert await call.read() == b"good"
            code, _ = await failure(call.read())
        assert code is grpc.StatusCode.INTERNAL


async def test_who_has_left_is_given_nothing_more() -> None:
    peer, got = Peer(), []
    leaving, cancelled = await peer.call(), await peer.call()

    def take_one(message: bytes) -> None:
        got.append(message)
        leaving.cancel()

    reading = [asyncio.create_task(leaving.each(take_one)), asyncio.create_task(cancelled.each(got.append))]
    await asyncio.sleep(0)
    peer.h2.send_data(leaving.stream_id, framed(b"1") + framed(b"2"))
    peer.h2.send_data(cancelled.stream_id, framed(b"3"))
    reading[1].cancel()
    peer.tell()
    assert (await failure(reading[0]))[0] is grpc.StatusCode.CANCELLED
    with pytest.raises(asyncio.CancelledError):
        await reading[1]
    assert got == [b"1"]


async def test_a_reset_without_a_name_ends_its_call_only() -> None:
    peer = Peer()
    call, other = await peer.call(), await peer.call()
    peer.tell(RstStreamFrame(call.stream_id, error_code=119))
    assert (await failure(call.read()))[0] is grpc.StatusCode.INTERNAL
    assert other.status is None


async def test_calls_that_a_leaving_server_has_not_taken_end_and_with_the_last_one_the_connection() -> None:
    peer = Peer()
    taken, late = await peer.call(), await peer.call()
    peer.tell(GoAwayFrame(0, last_stream_id=taken.stream_id, error_code=0))
    assert (await failure(late.read()))[0] is grpc.StatusCode.UNAVAILABLE
    assert not peer.closing
    assert not peer.link.usable
    peer.h2.send_headers(taken.stream_id, [("grpc-status", "0")], end_stream=True)
    peer.tell()
    assert await taken.read() is None
    assert peer.closing


async def test_an_early_answer_counts_while_the_request_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer()
    channel = Http2Channel("127.0.0.1:1")

    async def connected(_self: Http2Channel) -> client.ClientLink:
        return peer.link

    monkeypatch.setattr(Http2Channel, "_connected", connected)
    asking = asyncio.create_task(ask(channel, "echo", bytes(100_000)))
    await asyncio.sleep(0.01)
    (call,) = peer.link._calls.values()
    assert call.unsent is not None, "the window is full"
    peer.h2.send_headers(call.stream_id, [(":status", "200"), ("content-type", "application/grpc")])
    peer.h2.send_data(call.stream_id, framed(b"enough"))
    peer.h2.send_headers(call.stream_id, [("grpc-status", "0")], end_stream=True)
    peer.tell()
    assert await asking == b"enough"


async def test_a_long_reason_ends_its_call_only() -> None:
    site = Site(Http2Server)
    await site.start()
    async with site.channel() as channel, asyncio.timeout(DEADLINE_S):
        call = await stream(channel, "talk")
        assert await failure(ask(channel, "fail", b"why " * 25_000)) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "why " * 25_000,
        )
        await call.write(b"still")
        assert await call.read() == b"STILL"
    await site.server.stop(DEADLINE_S)
