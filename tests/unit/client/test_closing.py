"""A client that is closed while a stream pauses between two calls makes no further call."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
import pytest

from cluster.client import AsyncClient, Client
from cluster.domain.errors import AbortReason, RequestAborted
from cluster.v1 import inference_pb2

TOKEN = inference_pb2.GenerateResponse(chunk=inference_pb2.Chunk(text="a", token_ids=[5]))


class Broken(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return ""

    def trailing_metadata(self) -> tuple[()]:
        return ()


class Call:
    """One token, then its router is gone."""

    def __iter__(self) -> Iterator[inference_pb2.GenerateResponse]:
        yield TOKEN
        raise Broken

    async def __aiter__(self) -> AsyncIterator[inference_pb2.GenerateResponse]:
        yield TOKEN
        raise Broken

    def cancel(self) -> None: ...


class Stub:
    def __init__(self) -> None:
        self.calls = 0

    def Generate(self, *_: Any, **__: Any) -> Call:
        self.calls += 1
        return Call()


def test_a_closed_client_makes_no_further_call(monkeypatch: pytest.MonkeyPatch) -> None:
    client, stub = Client("127.0.0.1:1"), Stub()
    monkeypatch.setattr(client, "_stub", lambda _address: stub)
    stream = client.generate([1])
    next(stream)
    client.close()
    with pytest.raises(RequestAborted, match="closed") as caught:
        next(stream)
    assert (caught.value.abort_reason, stub.calls) == (AbortReason.CLIENT, 1)


async def test_nor_does_one_on_an_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    client, stub = AsyncClient("127.0.0.1:1"), Stub()
    monkeypatch.setattr(client, "_stub", lambda _address: stub)
    stream = client.generate([1])
    await anext(stream)
    await client.close()
    with pytest.raises(RequestAborted, match="closed"):
        await anext(stream)
    assert stub.calls == 1


def test_a_closed_client_begins_nothing() -> None:
    client = Client("127.0.0.1:1")
    client.close()
    for begin in (lambda: next(client.generate([1])), client.list_models, lambda: client.tokenize("a")):
        with pytest.raises(RequestAborted, match="was closed"):
            begin()
    with pytest.raises(RequestAborted, match="was closed"):
        client.wait_ready(3600)
    assert not client._channels


async def test_nor_does_one_that_was_closed_on_an_event_loop() -> None:
    client = AsyncClient("127.0.0.1:1")
    await client.close()
    for begin in (lambda: anext(client.generate([1])), client.list_models, lambda: client.wait_ready(3600)):
        with pytest.raises(RequestAborted, match="was closed"):
            await begin()
    assert not client._channels


BEGIN = {"generate": lambda client: list(client.generate([1])), "ask": lambda client: client.list_models()}


@pytest.mark.parametrize("begin", BEGIN.values(), ids=BEGIN)
def test_closing_in_another_thread_just_before_a_call_is_the_typed_error(
    monkeypatch: pytest.MonkeyPatch, begin: Callable[[Client], object]
) -> None:
    client = Client("127.0.0.1:1")
    stub = client._stub

    def stub_then_close(address: str) -> Any:
        found = stub(address)
        client.close()
        return found

    monkeypatch.setattr(client, "_stub", stub_then_close)
    with pytest.raises(RequestAborted, match="was closed"):
        begin(client)


def test_other_value_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client("127.0.0.1:1")

    def refuse(_address: str) -> Any:
        raise ValueError("no such thing")

    monkeypatch.setattr(client, "_stub", refuse)
    with pytest.raises(ValueError, match="no such thing"):
        client.list_models()
    client.close()


@pytest.fixture
async def mute() -> AsyncIterator[str]:
    """The address of a server that says nothing."""
    gone = asyncio.Event()

    async def hold(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await gone.wait()
        writer.close()

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    gone.set()
    server.close()


ASYNC_BEGIN = {"generate": lambda client: anext(client.generate([1])), "ask": lambda client: client.list_models()}


async def called(
    address: str, begin: Callable[[AsyncClient], Awaitable[object]]
) -> tuple[AsyncClient, asyncio.Future[object]]:
    """A client whose call is under way."""
    client = AsyncClient(address)
    calling = asyncio.ensure_future(begin(client))
    async with asyncio.timeout(5):
        while not client._channels:
            await asyncio.sleep(0)
    return client, calling


@pytest.mark.parametrize("begin", ASYNC_BEGIN.values(), ids=ASYNC_BEGIN)
async def test_closing_under_a_call_on_an_event_loop_is_the_typed_error(
    mute: str, begin: Callable[[AsyncClient], Awaitable[object]]
) -> None:
    client, calling = await called(mute, begin)
    await client.close()
    with pytest.raises(RequestAborted, match="closed"):
        await asyncio.wait_for(calling, 5)
    assert not calling.cancelled()


@pytest.mark.parametrize("begin", ASYNC_BEGIN.values(), ids=ASYNC_BEGIN)
async def test_a_task_that_is_cancelled_stays_cancelled(
    mute: str, begin: Callable[[AsyncClient], Awaitable[object]]
) -> None:
    client, calling = await called(mute, begin)
    calling.cancel()
    await client.close()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(calling, 5)
    assert calling.cancelled()
