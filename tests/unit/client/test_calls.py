"""Both clients make the same calls: what they ask after one that broke, where new requests begin, and until when."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import pytest

from cluster.client import AsyncClient, Client, Completion
from cluster.client import async_client as async_module
from cluster.client import sync_client as sync_module
from cluster.client.address_memory import AddressMemory
from cluster.domain.clock import ManualClock
from cluster.domain.errors import AbortReason, ClusterError, RejectReason, RequestAborted, RequestRejected
from cluster.v1 import inference_pb2
from cluster.wire.status import to_rpc_status

TOKEN = inference_pb2.GenerateResponse(chunk=inference_pb2.Chunk(text="a", token_ids=[5]))
END = inference_pb2.GenerateResponse(end=inference_pb2.End())
GONE = object()  # the connection breaks
FULL = RequestRejected(RejectReason.QUEUE_FULL, "full", retry_after_s=30.0)
NO_ENDPOINT = RequestRejected(RejectReason.NO_ENDPOINT, "nobody computes")
Script = dict[str, list[list[Any]]]


class Broken(grpc.RpcError):
    def __init__(self, error: Any, deadline: bool = False) -> None:
        self._status = None if error is GONE else to_rpc_status(error)
        self._code = grpc.StatusCode.DEADLINE_EXCEEDED if deadline else grpc.StatusCode.UNAVAILABLE

    def code(self) -> grpc.StatusCode:
        return self._status.code if self._status else self._code

    def details(self) -> str:
        return self._status.details if self._status else ""

    def trailing_metadata(self) -> Any:
        return self._status.trailing_metadata if self._status else ()


class Call:
    def __init__(self, events: list[Any], timeout_s: float | None) -> None:
        self._events, self._timeout_s = events, timeout_s

    def __iter__(self) -> Iterator[inference_pb2.GenerateResponse]:
        if self._timeout_s is not None and self._timeout_s <= 0:
            raise Broken(GONE, deadline=True)
        for event in self._events:
            if not isinstance(event, inference_pb2.GenerateResponse):
                raise Broken(event)
            yield event

    async def __aiter__(self) -> AsyncIterator[inference_pb2.GenerateResponse]:
        for event in self:
            yield event

    def cancel(self) -> None: ...


class Routers:
    """What the calls at each address bring, one after the other, and then the last of them again and again."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.asked: list[str] = []
        self.outcomes: list[Any] = []  # what the client gave or raised

    def events_at(self, address: str) -> list[Any]:
        self.asked.append(address)
        calls = self._script[address]
        return calls.pop(0) if len(calls) > 1 else calls[0]

    def stub(self, address: str, *, is_async: bool) -> Any:
        routers = self

        class Stub:
            def Generate(self, _request: Any, timeout: float | None, **_: Any) -> Call:
                return Call(routers.events_at(address), timeout)

            def ListModels(self, _request: Any, **_: Any) -> Any:
                answer = inference_pb2.ListModelsResponse()
                events = routers.events_at(address)
                if not is_async:
                    return told(events, answer)

                async def later() -> Any:
                    return told(events, answer)

                return later()

        return Stub()


def told(events: list[Any], answer: Any) -> Any:
    if not isinstance(events[0], inference_pb2.GenerateResponse):
        raise Broken(events[0])
    return answer


class Kind:
    """One of the two clients, with the calls of ``script``."""

    def __init__(self, client: type[Client | AsyncClient], monkeypatch: pytest.MonkeyPatch) -> None:
        self._client, self._monkeypatch = client, monkeypatch

    def use(self, script: Script, do: Callable[[Any], Any], times: int = 1, **arguments: Any) -> Routers:
        """Does something with a client of all routers, ``times`` after each other."""
        routers = Routers(script)
        if self._client is Client:
            client = Client(list(script), **arguments)
            self._monkeypatch.setattr(client, "_stub", lambda address: routers.stub(address, is_async=False))
            for _ in range(times):
                try:
                    routers.outcomes.append(do(client))
                except ClusterError as error:
                    routers.outcomes.append(error)
            return routers

        async def main() -> None:
            client = AsyncClient(list(script), **arguments)
            self._monkeypatch.setattr(client, "_stub", lambda address: routers.stub(address, is_async=True))
            for _ in range(times):
                try:
                    routers.outcomes.append(await do(client))
                except ClusterError as error:
                    routers.outcomes.append(error)

        asyncio.run(main())
        return routers


@pytest.fixture(params=[Client, AsyncClient])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kind:
    return Kind(request.param, monkeypatch)


def complete(**arguments: Any) -> Callable[[Any], Any]:
    return lambda client: client.complete([1], **arguments)


def test_new_requests_begin_where_one_was_answered(kind: Kind) -> None:
    routers = kind.use({"a": [[GONE]], "b": [[GONE]], "c": [[TOKEN, END]]}, complete(), 300, memory=AddressMemory())
    assert routers.asked == ["a", "b", *["c"] * 300]


def test_so_do_other_questions(kind: Kind) -> None:
    script: Script = {"a": [[GONE]], "b": [[NO_ENDPOINT]], "c": [[TOKEN]]}
    routers = kind.use(script, lambda client: client.list_models(), 3, memory=AddressMemory())
    assert routers.asked == [*"abc", *"bc", *"bc"]


def test_an_address_that_is_back_is_asked_first_again(kind: Kind) -> None:
    clock = ManualClock()

    def ask(client: Any) -> Any:
        clock.advance(2.6)
        return client.list_models()

    script: Script = {"a": [[GONE], [TOKEN]], "b": [[TOKEN]]}
    assert kind.use(script, ask, 4, clock=clock, memory=AddressMemory(5.0)).asked == [*"ab", "b", "a", "a"]


def test_clients_of_a_process_share_what_they_know(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sync_module, async_module):
        monkeypatch.setattr(module, "PROCESS_MEMORY", AddressMemory())
    assert kind.use({"a": [[GONE]], "b": [[TOKEN, END]]}, complete()).asked == ["a", "b"]
    assert kind.use({"a": [[TOKEN, END]], "b": [[TOKEN, END]]}, complete()).asked == ["b"]


def test_both_kinds_of_clients_share_it() -> None:
    assert Client("a")._memory is AsyncClient("b")._memory is Client("c")._memory


def test_a_stream_goes_on_with_what_it_has(kind: Kind) -> None:
    script: Script = {"a": [[TOKEN, GONE], [GONE]], "b": [[TOKEN, TOKEN, GONE], [TOKEN, END]]}
    routers = kind.use(script, complete(), memory=AddressMemory())
    (completion,) = routers.outcomes
    assert isinstance(completion, Completion)
    assert (completion.token_ids, completion.usage.resumes) == ((5, 5, 5, 5), 3)
    assert routers.asked == [*"abab"]


def test_one_address_is_tried_again_before_a_request_has_started(kind: Kind) -> None:
    assert kind.use({"a": [[GONE], [TOKEN, END]]}, complete()).asked == [*"aa"]
    assert kind.use({"a": [[GONE], [GONE], [GONE], [TOKEN, END]]}, complete()).asked == [*"aaaa"]


@pytest.mark.parametrize(("ends_with", "calls"), [(GONE, 4), (NO_ENDPOINT, 1)], ids=["gone", "refused"])
def test_a_request_that_no_router_takes_ends_soon(kind: Kind, ends_with: Any, calls: int) -> None:
    began_s = time.monotonic()
    routers = kind.use({"a": [[ends_with]]}, complete())
    assert time.monotonic() - began_s < 1.5
    assert routers.asked == ["a"] * calls
    assert isinstance(routers.outcomes[0], RequestRejected)


def test_a_pause_ends_with_the_time_of_the_request(kind: Kind) -> None:
    began_s = time.monotonic()
    routers = kind.use({"a": [[TOKEN, FULL]]}, complete(timeout_s=0.2))
    assert 0.15 < time.monotonic() - began_s < 5.0
    assert isinstance(routers.outcomes[0], RequestAborted)
    assert routers.outcomes[0].abort_reason is AbortReason.DEADLINE


async def test_closing_ends_a_long_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    client, routers = AsyncClient("a"), Routers({"a": [[TOKEN, FULL]]})
    monkeypatch.setattr(client, "_stub", lambda address: routers.stub(address, is_async=True))
    pausing = asyncio.create_task(client.complete([1]))
    await asyncio.sleep(0.05)
    assert not pausing.done()
    await client.close()
    with pytest.raises(RequestAborted, match="closed"):
        await asyncio.wait_for(pausing, 5)
    assert routers.asked == ["a"]
