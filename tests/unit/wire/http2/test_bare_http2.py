"""The server before a client that speaks bare HTTP/2 and sends what it likes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import grpc.aio
import h2.connection
import h2.events
import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe.frame import GoAwayFrame

from cluster.wire.http2 import call as calls
from cluster.wire.http2 import connection as connections
from cluster.wire.http2.messages import framed
from cluster.wire.http2.outbox import Outbox
from tests.unit.wire.http2.front_site import (
    DEADLINE_S,
    Site,
    Start,
    eventually,
)


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


@pytest.mark.parametrize(
    ("window", "code"), [(0, None), (3, ErrorCodes.CANCEL)], ids=["nothing is out", "half of it is out"]
)
async def test_an_answer_that_nobody_reads_is_not_kept_for_ever(
    start: Start, window: int, code: ErrorCodes | None
) -> None:
    site = await start(answer_stall_s=0.05)
    async with bare(site) as client:
        client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
        stream_id = client.request()
        client.h2.send_data(stream_id, framed(bytes(10_000)), end_stream=True)
        if code is None:
            assert (await client.status(stream_id))["grpc-status"] == "1"
        else:
            await client.until(lambda: bool(client.of(h2.events.StreamReset, stream_id)))
            assert client.of(h2.events.StreamReset, stream_id)[0].error_code == code
        (connection,) = site.server._connections
        assert connection.calls == 0


async def test_an_answer_is_kept_for_as_long_as_some_of_it_is_read(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times the limit passes, and each time less is left than before."""
    left = [b"three", b"two", b"1", b""]

    async def until_drained(call: calls.ServerCall) -> None:
        call.unsent = memoryview(left.pop(0)) if len(left) > 1 else None
        if call.unsent is not None:
            raise TimeoutError

    monkeypatch.setattr(calls.ServerCall, "_until_drained", until_drained)
    async with bare(await start()) as client:
        client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
        stream_id = client.request()
        client.h2.send_data(stream_id, framed(bytes(100)), end_stream=True)
        assert (await client.status(stream_id))["grpc-status"] == "0"
    assert left == [b""]


async def test_calls_that_no_handler_has_seen_are_told_of(start: Start) -> None:
    site = await start()
    told: list[tuple[str, grpc.StatusCode | None]] = []
    site.server.on_unserved = lambda path, code: told.append((path, code))
    async with bare(site) as client:
        for more, body in (
            ((), b""),  # no message
            ((), b"\x00\x7f\xff\xff\xffx"),  # too long
            ((("grpc-encoding", "gzip"),), b"\x01\x00\x00\x00\x01x"),  # not what it says
            ((("grpc-encoding", "lzw"),), None),
            ((("grpc-timeout", "1n"),), None),
            ((("grpc-timeout", "soon"),), None),
        ):
            stream_id = client.request(*more)
            if body is not None:
                client.h2.send_data(stream_id, body, end_stream=True)
            await client.status(stream_id)
        left = client.request()
        client.h2.send_data(left, framed(b"x"), end_stream=True)
        client.h2.reset_stream(left)
        served = client.request()
        client.h2.send_data(served, framed(b"x"), end_stream=True)
        assert (await client.status(served))["grpc-status"] == "0"
    codes = grpc.StatusCode
    expected = [codes.INVALID_ARGUMENT, codes.RESOURCE_EXHAUSTED, codes.INVALID_ARGUMENT, codes.UNIMPLEMENTED,
                codes.DEADLINE_EXCEEDED, codes.INVALID_ARGUMENT, None]  # fmt: skip
    await eventually(lambda: told == [("/t.T/echo", code) for code in expected], "all but the last")


async def test_a_good_message_comes_before_a_bad_one(start: Start) -> None:
    site = await start(largest_message=100)
    async with bare(site) as client:
        call = client.request(path="/t.T/talk")
        client.h2.send_data(call, framed(b"good") + framed(bytes(101)))
        status = await client.status(call)
        assert status["grpc-status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        assert [data.data for data in client.of(h2.events.DataReceived, call)] == [framed(b"GOOD")]


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
