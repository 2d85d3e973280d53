"""The server before grpcio's own clients."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from cluster.config.listening import can_listen
from cluster.wire.http2 import protocol
from cluster.wire.http2.server import Http2Server
from tests.unit.wire.http2.front_site import (
    DEADLINE_S,
    LOCAL,
    Start,
    eventually,
    one_that_goes_on,
)

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
    # What is left is written on the wire in tenths of a second there, rounded up: grpcio may send 60.1 for 60.
    assert 50 < dict(seen)["left"] <= 60.1
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


async def test_stopping_at_once_cancels(start: Start) -> None:
    site = await start()
    call = site.stream("wait")(b"here")
    await call.read()
    await asyncio.gather(site.server.stop(DEADLINE_S), site.server.stop(None))
    assert site.service.cancelled == 1
    assert await call.code() is grpc.StatusCode.UNAVAILABLE


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


async def test_who_reads_nothing_hears_of_the_servers_leaving_all_the_same(start: Start) -> None:
    site = await start()
    little = (("grpc.http2.lookahead_bytes", 16384), ("grpc.http2.bdp_probe", 0), LOCAL)
    async with grpc.aio.insecure_channel(site.address, options=little) as channel:
        call = site.stream("count", channel)(b"1000 30000", timeout=DEADLINE_S)
        await eventually(lambda: bool(site.server._connections), "it has come")
        (connection,) = site.server._connections
        await eventually(lambda: any(c.unsent_began for c in connection._calls.values()), "a message is half out")
        await site.server.stop(0)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            [message async for message in call]
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
