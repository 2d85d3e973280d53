"""A client that is closed while a stream pauses between two calls makes no further call."""

from collections.abc import AsyncIterator, Iterator
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
