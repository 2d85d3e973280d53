"""Sending without a task: as far as there is room, and on from where it stopped when there is room again."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from cluster.wire.http2.client import Http2Channel
from cluster.wire.http2.server import Http2Server

DEADLINE_S = 10.0
MANY, SIZE = 400, 20_000  # eight megabytes: more than all windows and buffers between two sockets


def as_it_is(message: bytes) -> bytes:
    return message


def numbered(count: int = MANY) -> list[bytes]:
    return [index.to_bytes(4, "big") + bytes(SIZE) for index in range(count)]


class Pusher:
    """Pushes ``messages`` on ``call`` while it is writable."""

    def __init__(self, call: Any, messages: list[bytes]) -> None:
        self.call, self.left, self.stops = call, deque(messages), 0
        call.on_room = self.push
        self.push()

    def push(self) -> None:
        while self.left and self.call.writable:
            self.call.push(self.left.popleft())
        self.stops += bool(self.left)


class Service:
    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.pushers: list[Pusher] = []
        self.taken: list[bytes] = []
        self.go_on = asyncio.Event()

    async def count(self, requests: AsyncIterator[bytes], context: Any) -> None:
        self.calls.append(context)
        self.pushers.append(Pusher(context, numbered()))
        async for _ in requests:
            pass

    async def give_up(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """A client that does not read is told so, behind the message that is half out."""
        del requests
        self.calls.append(context)
        self.pushers.append(Pusher(context, numbered()))
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "read it as it comes")

    async def late(self, requests: AsyncIterator[bytes], context: Any) -> None:
        self.calls.append(context)
        await self.go_on.wait()
        async for request in requests:
            self.taken.append(request)
        await context.write(b"all")


@pytest.fixture
async def served() -> AsyncIterator[tuple[Service, Http2Channel]]:
    service, server = Service(), Http2Server()
    methods = {
        name: grpc.stream_stream_rpc_method_handler(getattr(service, name)) for name in ("count", "give_up", "late")
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with Http2Channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(DEADLINE_S):
        yield service, channel
    await server.stop(None)


async def held_up(served: tuple[Service, Http2Channel], name: str) -> tuple[Any, Pusher]:
    """A call on which the server has pushed until there was no room."""
    service, channel = served
    call = await begin(channel, name)
    await until(lambda: service.pushers and service.pushers[0].stops)
    (pusher,) = service.pushers
    return call, pusher


async def begin(channel: Http2Channel, name: str) -> Any:
    return await channel.stream(f"/t.T/{name}", as_it_is, as_it_is)


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0)


async def test_a_server_pushes_as_fast_as_its_client_reads(served: tuple[Service, Http2Channel]) -> None:
    service, _ = served
    call, pusher = await held_up(served, "count")
    held = len(pusher.left)
    assert held > MANY // 2, "it does not fit between them"
    assert not service.calls[0].writable
    assert [await call.read() for _ in range(MANY)] == numbered()
    assert pusher.stops > 1, "it went on more than once"
    assert not pusher.left
    assert service.calls[0].writable
    call.done_writing()
    assert await call.read() is None


async def test_a_client_pushes_as_fast_as_its_server_reads(served: tuple[Service, Http2Channel]) -> None:
    service, channel = served
    call = await begin(channel, "late")
    pusher = Pusher(call, numbered())
    assert pusher.stops == 1
    assert not call.writable
    service.go_on.set()
    await until(lambda: not pusher.left and call.writable)
    call.done_writing()
    assert await call.read() == b"all"
    assert service.taken == numbered()


async def test_what_is_pushed_goes_out_in_the_same_turn_and_takes_along_what_waits_for_its_end(
    served: tuple[Service, Http2Channel],
) -> None:
    _, channel = served
    call, other = await begin(channel, "late"), await begin(channel, "late")
    await other.write(b"waits for the end of the turn")
    link = channel._link
    assert link is not None
    assert link._h2.has_outgoing
    call.push(b"now")
    assert not link._h2.has_outgoing
    assert not link._flushing, "nothing is left for the end of the turn"


async def test_a_call_that_gives_up_pushes_nothing_more_and_says_why(served: tuple[Service, Http2Channel]) -> None:
    """Else the next message would be half out when the status is due, and the stream could only be reset."""
    service, _ = served
    call, pusher = await held_up(served, "give_up")
    left = len(pusher.left)
    with pytest.raises(grpc.RpcError) as caught:
        await call.each(lambda _: None)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.details() == "read it as it comes"
    assert len(pusher.left) == left
    assert not service.calls[0].writable


async def test_nothing_is_pushed_on_a_call_that_has_ended(served: tuple[Service, Http2Channel]) -> None:
    service, channel = served
    call = await begin(channel, "late")
    await until(lambda: service.calls)
    call.cancel()
    assert not call.writable
    await until(lambda: service.calls[0].done())
    assert not service.calls[0].writable
    with pytest.raises(asyncio.InvalidStateError, match="has ended"):
        service.calls[0].push(b"too late")


async def test_who_waits_for_room_when_the_other_side_leaves_hears_of_none(
    served: tuple[Service, Http2Channel],
) -> None:
    service, _ = served
    call, pusher = await held_up(served, "count")
    stops = pusher.stops
    call.cancel()
    await until(lambda: service.calls[0].done())
    assert (pusher.stops, pusher.call.writable) == (stops, False)
