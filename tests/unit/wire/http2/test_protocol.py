"""What is read and put on the wire beside h2's own code is what h2 would have read and put there."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from typing import Any

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import Event, PingReceived, RequestReceived, StreamReset, WindowUpdated
from h2.exceptions import FrameTooLargeError, ProtocolError
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, PushPromiseFrame, WindowUpdateFrame
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.wire.http2 import headers
from cluster.wire.http2.protocol import CONNECTION_WINDOW, ConnectionProtocol, ServerProtocol

HEAD = [(":method", "POST"), (":scheme", "http"), (":path", "/a.B/C"), (":authority", "x"), ("te", "trailers")]


def pair() -> tuple[H2Connection, ServerProtocol]:
    client, server = H2Connection(H2Configuration(client_side=True, header_encoding=None)), ServerProtocol()
    client.initiate_connection()
    server.initiate_connection()
    client.receive_data(server.data_to_send())
    return client, server


def told(events: list[Any]) -> list[tuple[Any, ...]]:
    fields = ("stream_id", "data", "flow_controlled_length", "error_code", "ping_data", "delta")
    return [
        (type(event), *(getattr(event, name, None) for name in fields), list(getattr(event, "headers", ())))
        + ((event.stream_ended is None,) if isinstance(event, RequestReceived) else ())
        for event in events
    ]


def sent_by(client: H2Connection, steps: list[tuple[str, int]]) -> bytes:
    """What a client sends that does ``steps``, each with a number, on its streams."""
    running: list[int] = []
    sent = b""
    for kind, number in steps:
        if kind == "call":
            running.append(client.get_next_available_stream_id())
            # More than a frame of headers now and then, and mostly such as have come before.
            length = 20_000 if number == 0 else number if number % 4 == 0 else number % 2
            of_content = [("content-length", str(number))] if number % 16 == 7 else []
            client.send_headers(running[-1], [*HEAD, ("x-long", "v" * length), *of_content], end_stream=number % 9 == 5)
            if number % 9 == 5:
                running.pop()
        elif kind == "window":
            # Of a stream that runs, of one that has ended or never began, or of the connection.
            stream_id = (*running, 0, 1, 2 * number + 1)[number % (len(running) + 3)] if number % 3 else 0
            sent += client.data_to_send()
            sent += window_update(stream_id, INCREMENTS[number % len(INCREMENTS)])
        elif kind == "ping":
            client.ping(number.to_bytes(8, "big"))
        elif running and kind == "data":
            padding = number if number % 5 == 0 else None
            client.send_data(running[number % len(running)], bytes(number), pad_length=padding)
        elif running:
            over = running.pop(number % len(running))
            if kind == "end":
                client.send_data(over, bytes(number), end_stream=True)
            else:
                client.reset_stream(over)
    return sent + client.data_to_send()


INCREMENTS = (1, 70, 2**16, 1, 2**20, 5, 2**30, 0, 2**31 - 1, 2**31 + 4)  # those behind 2**20 are too much now and then


def window_update(stream_id: int, increment: int) -> bytes:
    return struct.pack(">BHBBII", 0, 4, 8, 0, stream_id, increment)


def all_of(take: Callable[[bytes], list[Event]], pieces: list[bytes]) -> tuple[list[Event], int | None]:
    """The events of all pieces up to one that breaks the protocol, and how."""
    events: list[Event] = []
    for piece in pieces:
        try:
            events += take(piece)
        except ProtocolError as error:
            return events, error.error_code
    return events, None


def windows(connection: H2Connection) -> dict[int, int]:
    return {number: stream.outbound_flow_control_window for number, stream in connection.streams.items()}


def states(connection: H2Connection) -> dict[int, dict[str, Any]]:
    return {number: vars(stream.state_machine) for number, stream in connection.streams.items()}


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["call", "call", "data", "data", "data", "end", "reset", "ping", "window", "window"]),
        st.integers(0, 200),
    ),
    max_size=30,
)


# The third call is known again; then others, which change the tables, and one like the first ones after them.
ALIKE = [*[("call", 1)] * 4, ("data", 3), ("call", 5), ("call", 7), ("end", 1), ("call", 8), *[("call", 1)] * 3]


@settings(deadline=None)
@given(steps=STEPS, cuts=st.lists(st.integers(0, 60_000), max_size=12))
@example(steps=ALIKE, cuts=[])
@example(steps=[*ALIKE, ("reset", 1), *ALIKE], cuts=[300])
@example(steps=[("call", 7)] * 4 + [("data", 11)], cuts=[])  # more than their content-length says
@example(steps=[("call", 1), ("reset", 1), ("window", 1)], cuts=[])
def test_the_same_events_come_out_however_the_bytes_are_cut(steps: list[tuple[str, int]], cuts: list[int]) -> None:
    client, server = pair()
    plain = ServerProtocol()
    plain.initiate_connection()
    plain.data_to_send()
    sent = client.data_to_send() + sent_by(client, steps)
    edges = [0, *sorted(min(cut, len(sent)) for cut in cuts), len(sent)]
    expected, error = all_of(plain.receive_data, [sent[start:end] for start, end in itertools.pairwise(edges)])
    got, refused = all_of(server.take_in, [sent[start:end] for start, end in itertools.pairwise(edges)])
    assert refused == error
    # Of a piece that breaks the protocol h2 tells nothing; its events end the connection as well.
    assert told(got) == told([event for event in expected if not isinstance(event, WindowUpdated | PingReceived)])
    if error is None:
        assert server.opened == [event.stream_id for event in expected if isinstance(event, WindowUpdated)]
    assert server.inbound_flow_control_window == plain.inbound_flow_control_window
    assert server.outbound_flow_control_window == plain.outbound_flow_control_window
    assert windows(server) == windows(plain)
    assert states(server) == states(plain)
    assert server.data_to_send() == plain.data_to_send()


@pytest.mark.parametrize("begun_by", [HeadersFrame(1), PushPromiseFrame(1, promised_stream_id=2)], ids=["head", "push"])
@pytest.mark.parametrize(
    "then", [HeadersFrame(3, flags=("END_HEADERS",)), WindowUpdateFrame(0, 5), DataFrame(1)], ids=str
)
def test_nothing_comes_into_a_block_of_headers_that_goes_on(
    begun_by: HeadersFrame | PushPromiseFrame, then: Frame
) -> None:
    client, server = pair()
    block = client.encoder.encode(HEAD)
    begun_by.data = block
    if isinstance(then, HeadersFrame):
        then.data = block
    sent = client.data_to_send() + begun_by.serialize() + then.serialize()
    with pytest.raises(ProtocolError, match="header block"):
        server.take_in(sent)


@pytest.mark.parametrize("late", [False, True])
def test_a_frame_beyond_the_limit_is_refused_before_it_has_come(*, late: bool) -> None:
    client, server = pair()
    if late:
        server.take_in(sent_by(client, [("call", 1)]))
    frame = DataFrame(1)
    frame.data = bytes(20_000)
    with pytest.raises(FrameTooLargeError):
        server.take_in(frame.serialize()[:9] if late else client.data_to_send() + frame.serialize()[:9])
    assert ErrorCodes.FRAME_SIZE_ERROR.to_bytes(4, "big") in server.data_to_send(), "its sender is told"


def test_data_behind_the_end_of_a_stream_cost_that_stream_only() -> None:
    client, server = pair()
    server.take_in(sent_by(client, [("call", 1), ("end", 1)]))
    server.data_to_send()
    late = DataFrame(1)
    late.data = b"late"
    server.take_in(late.serialize())
    told_back = client.receive_data(server.data_to_send())
    assert [(event.stream_id, event.error_code) for event in told_back if isinstance(event, StreamReset)] == [
        (1, ErrorCodes.STREAM_CLOSED)
    ]
    server.take_in(sent_by(client, [("call", 1)]))


def test_more_data_than_the_window_end_the_connection() -> None:
    client, server = pair()
    server.take_in(sent_by(client, [("call", 1)]))
    frame = DataFrame(1)
    frame.data = bytes(16_384)
    with pytest.raises(ProtocolError):
        server.take_in(frame.serialize() * 65)
    assert ErrorCodes.FLOW_CONTROL_ERROR.to_bytes(4, "big") in server.data_to_send()


@pytest.mark.parametrize("size", [10, 40_000])
def test_answers_are_read_as_they_were_meant(size: int) -> None:
    client, server = pair()
    server.take_in(sent_by(client, [("call", 1), ("end", 1)]))
    client.receive_data(server.data_to_send())
    server.put_headers(1, headers.beginning((("x-a", "v" * size),)), last=False)
    server.put_data(1, memoryview(b"payload"))
    server.put_headers(1, headers.ending(headers.grpc.StatusCode.OK, ""), last=True)
    first, data, last, end = client.receive_data(server.data_to_send())
    assert (b"x-a", b"v" * size) in first.headers
    assert (data.data, dict(last.headers)) == (b"payload", {b"grpc-status": b"0"})
    assert end.stream_id == 1
    assert server.streams[1].closed
    assert server.outbound_flow_control_window == client.inbound_flow_control_window


def test_windows_are_opened_when_h2_would_open_them() -> None:
    frame, bytes_each = DataFrame(1), 16_384
    frame.data = bytes(bytes_each)
    (client, server), (other, plain) = pair(), pair()
    for side, taker in ((client, server), (other, plain)):
        taker.take_in(sent_by(side, [("call", 1), ("call", 1)]))
    sent = []
    for _ in range(400):
        frame.stream_id = 4 - frame.stream_id  # 1 and 3 in turns
        for taker in (server, plain):
            taker.take_in(frame.serialize())
        server.give_back(frame.stream_id, bytes_each)
        plain.acknowledge_received_data(bytes_each, frame.stream_id)
        sent.append(server.data_to_send())
        assert sent[-1] == plain.data_to_send()
    opened = [int.from_bytes(update[5:9], "big") for update in sent if update]
    assert {0, 1, 3} == set(opened), "the connection's and both streams'"


@pytest.mark.parametrize("size", [16_384, 10_000, 1_023])
@pytest.mark.parametrize("unread", [1, 3])
def test_streams_that_nobody_reads_stop_no_others_while_there_is_room(unread: int, size: int) -> None:
    client, server = pair()
    server.take_in(sent_by(client, [("call", 1)] * (unread + 1)))
    *kept, read = sorted(server.streams)
    for stream_id in kept:
        while room := min(client.local_flow_control_window(stream_id), size):
            client.send_data(stream_id, bytes(room))
    server.take_in(client.data_to_send())
    passed = 0
    while passed < 3 * CONNECTION_WINDOW:
        room = min(client.local_flow_control_window(read), size)
        assert room, f"nothing goes on after {passed} bytes"
        client.send_data(read, bytes(room))
        server.take_in(client.data_to_send())
        server.give_back(read, room)
        client.receive_data(server.data_to_send())
        passed += room


def test_bytes_of_streams_that_are_over_are_given_back_to_the_others() -> None:
    client, server = pair()
    frame = DataFrame(1)
    frame.data = bytes(16_384)
    for stream_id in (1, 3, 5, 7):
        frame.stream_id = stream_id
        server.take_in(sent_by(client, [("call", 1)]) + frame.serialize() * 40)
        client.reset_stream(stream_id)
        server.take_in(client.data_to_send())
    server.data_to_send()
    server.give_back(1, 40 * 16_384)
    assert server.data_to_send() == b"", "the stream itself gets nothing back, and of the connection's it is too little"
    for stream_id in (3, 5, 7):
        server.give_back(stream_id, 40 * 16_384)
    (update,) = [event for event in client.receive_data(server.data_to_send()) if isinstance(event, WindowUpdated)]
    assert update.stream_id == 0
    assert update.delta == 4 * 40 * 16_384


@pytest.mark.parametrize("by_us", [True, False])
def test_nothing_comes_or_goes_on_a_connection_that_is_over(*, by_us: bool) -> None:
    client, server = pair()
    server.take_in(sent_by(client, [("call", 1)] * 3))
    if by_us:
        server.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
    else:
        server.take_in(GoAwayFrame(0, last_stream_id=0, error_code=1).serialize())
    for attempt in (
        lambda: server.put_data(1, memoryview(b"x")),
        lambda: server.put_headers(3, headers.beginning(), last=True),
        lambda: server.take_in(sent_by(client, [("call", 1)])),
        lambda: server.take_in(DataFrame(1).serialize()),
        lambda: server.take_in(window_update(0, 1)),
    ):
        with pytest.raises(ProtocolError):
            attempt()


def test_a_client_takes_no_data_before_headers() -> None:
    client = ConnectionProtocol(client_side=True)
    client.initiate_connection()
    client.send_headers(1, headers.asking("/a.B/C", b"x"))
    frame = DataFrame(1)
    frame.data = b"x"
    with pytest.raises(ProtocolError, match="before headers"):
        client.take_in(frame.serialize())


def test_callers_that_ask_alike_are_read_once() -> None:
    client, server = pair()
    asked = [
        event.headers
        for _ in range(4)
        for event in server.take_in(client.data_to_send() + sent_by(client, [("call", 1)]))
        if isinstance(event, RequestReceived)
    ]
    assert asked[1] is asked[2] is asked[3]
    assert list(asked[0]) == list(asked[1])


def test_nothing_is_put_on_a_stream_that_is_over() -> None:
    client, server = pair()
    server.take_in(sent_by(client, [("call", 1), ("reset", 0)]))
    for put in (
        lambda: server.put_data(1, memoryview(b"x")),
        lambda: server.put_headers(1, headers.beginning(), last=True),
        lambda: server.put_headers(3, headers.beginning(), last=True),
    ):
        with pytest.raises(ProtocolError):
            put()
    assert b"x" not in server.data_to_send()
