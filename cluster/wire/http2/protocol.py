"""h2's state of a connection, with our limits: of a server whose streams are many and long, and of a client."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import cast

from h2.config import H2Configuration
from h2.connection import AllowedStreamIDs, ConnectionInputs, ConnectionState, H2Connection, _decode_headers
from h2.errors import ErrorCodes
from h2.events import DataReceived, Event, RequestReceived, StreamEnded, WindowUpdated
from h2.exceptions import DenialOfServiceError, FrameTooLargeError, ProtocolError, TooManyStreamsError
from h2.settings import ChangedSetting, SettingCodes, Settings
from h2.stream import H2Stream, StreamInputs, StreamState
from h2.windows import WindowManager
from hpack.struct import Header
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PushPromiseFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from cluster.wire.http2.header_decoder import KeepingDecoder
from cluster.wire.http2.headers import METADATA_BYTES_MAX

STREAMS_MAX = 65536  # calls of one connection at a time
STREAM_WINDOW = 2**20  # bytes that a client may send on a stream before it hears from us
CONNECTION_WINDOW = 2**22
HEADER_BYTES_MAX = 2**20  # of a header block that is read at all; a call is refused long before
SETTINGS_MAX = 100  # frames of settings between two looks
PAYLOAD_BYTES = 1024  # of a frame whose head is no noise
_HEAD = struct.Struct(">HBBBI")  # of a frame: the length in three bytes, kind, flags, stream
_END_STREAM, _END_HEADERS = 0x1, 0x4
_WHOLE_BLOCKS = frozenset({_END_HEADERS, _END_HEADERS | _END_STREAM})
_INCREMENT = struct.Struct(">I")  # of a window
_MOST = 2**31 - 1  # that a window may be, and a stream's number
_OF_BLOCKS = (HeadersFrame.type, PushPromiseFrame.type, ContinuationFrame.type)
_THEY_SEND = (StreamState.OPEN, StreamState.HALF_CLOSED_LOCAL)  # states of streams that the other side has not ended
_WE_SEND = (StreamState.OPEN, StreamState.HALF_CLOSED_REMOTE)  # of those that we have not ended
_PREFACE_BYTES = 24  # with which a client's connection begins
_CALLS = (DataFrame, HeadersFrame)  # those that bring calls further
LOOKS_AT_ONCE = 64  # new streams before the open ones are counted anew


class ConnectionProtocol(H2Connection):
    """Either end. What is sent is ours: spelled right already.

    What comes is looked at where it is read: h2 would end the whole connection, and with it the calls of others, for a
    blank that one of them has sent.
    """

    def __init__(self, *, client_side: bool) -> None:
        super().__init__(
            H2Configuration(
                client_side=client_side, header_encoding=None, normalize_outbound_headers=False,
                validate_outbound_headers=False, normalize_inbound_headers=False, validate_inbound_headers=False,
            )
        )  # fmt: skip
        wanted = {
            SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW, SettingCodes.MAX_HEADER_LIST_SIZE: METADATA_BYTES_MAX,
            **({SettingCodes.ENABLE_PUSH: 0} if client_side else {SettingCodes.MAX_CONCURRENT_STREAMS: STREAMS_MAX}),
        }  # fmt: skip
        self.local_settings = Settings(client=client_side, initial_values=wanted)
        self.decoder = KeepingDecoder()
        self.decoder.max_header_list_size = HEADER_BYTES_MAX
        self._is_client = client_side
        self._preface_left = 0 if client_side else _PREFACE_BYTES
        self._open = ConnectionState.CLIENT_OPEN if client_side else ConnectionState.SERVER_OPEN
        self._rest = b""  # of a frame that is not whole
        # What the last request asked, as far as h2 has found it sound and without a length of its content.
        self._asked: Iterable[Header] | None = None
        self._in_block = False  # of headers, which goes on in the next frame
        self.peer_leaves, self.peer_took = False, 2**31 - 1  # in peace, with streams up to that one
        self.noise_bytes = 0  # that came beside what DATA and HEADERS carry; whoever looks sets it back

    def initiate_connection(self) -> None:
        super().initiate_connection()
        self.increment_flow_control_window(CONNECTION_WINDOW - self.inbound_flow_control_window)

    # What every message costs, without the objects and checks that h2 has for what we never send. Its state of the
    # connection and the streams goes on as if it had sent the frames itself: where its tables say that nothing
    # changes, which is nearly always, they are not asked.

    def _check(self, step: ConnectionInputs) -> None:
        """Of the steps that calls take, none changes the state of a connection that is open; ProtocolError."""
        if self.state_machine.state is not self._open:
            self.state_machine.process_input(step)

    def put_headers(self, stream_id: int, block: bytes, *, last: bool) -> None:
        """``send_headers``, encoded without tables, on a stream that the other side has opened; ProtocolError."""
        self._check(ConnectionInputs.SEND_HEADERS)
        stream = self._get_stream_by_id(stream_id).state_machine
        stream.process_input(StreamInputs.SEND_HEADERS)
        if last:
            stream.process_input(StreamInputs.SEND_END_STREAM)
        if self.encoder.table_size_changes:  # which have to be told, though nothing is in it
            self.encoder.header_table.resized = True  # hpack forgets that where one of them changed nothing
            block = self.encoder.encode(()) + block
        size = self.max_outbound_frame_size
        kind, flags = HeadersFrame.type, _END_STREAM if last else 0
        while len(block) > size:
            self._put(kind, flags, stream_id, block[:size])
            block, kind, flags = block[size:], ContinuationFrame.type, 0
        self._put(kind, flags | _END_HEADERS, stream_id, block)

    def put_data(self, stream_id: int, data: memoryview) -> None:
        """``send_data`` of no more than there is room for in the windows and a frame; ProtocolError."""
        self._check(ConnectionInputs.SEND_DATA)
        stream = self._get_stream_by_id(stream_id)
        if stream.state_machine.state not in _WE_SEND:
            stream.state_machine.process_input(StreamInputs.SEND_DATA)
        stream.outbound_flow_control_window -= len(data)
        self.outbound_flow_control_window -= len(data)
        assert min(stream.outbound_flow_control_window, self.outbound_flow_control_window) >= 0, "there was room"
        self._put(DataFrame.type, 0, stream_id, data)

    def give_back(self, stream_id: int, size: int) -> None:
        """``acknowledge_received_data``: so many bytes of a stream's DATA are done with."""
        self._open_inbound(0, self._inbound_flow_control_window_manager, size)
        stream = self.streams.get(stream_id)
        if stream is not None and stream.state_machine.state in _THEY_SEND:
            self._open_inbound(stream_id, stream._inbound_window_manager, size)  # noqa: SLF001

    def _open_inbound(self, stream_id: int, window: WindowManager, size: int) -> None:
        increment = window.process_bytes(size)
        if increment:
            self._put(WindowUpdateFrame.type, 0, stream_id, _INCREMENT.pack(increment))

    def _put(self, kind: int | None, flags: int, stream_id: int, body: bytes | memoryview) -> None:
        size = len(body)
        self._data_to_send += _HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream_id)
        self._data_to_send += body

    def take_in(self, data: bytes) -> list[Event]:
        """``receive_data``; what every call sends does not go through h2's buffer of frames first. ProtocolError."""
        events: list[Event] = []
        if self._preface_left:
            preface, data = data[: self._preface_left], data[self._preface_left :]
            self._preface_left -= len(preface)
            events += self.receive_data(preface)
        if self._rest:
            data = self._rest + data
        start, size = 0, len(data)
        while size - start >= _HEAD.size:
            high, low, kind, flags, stream_id = _HEAD.unpack_from(data, start)
            body, length = start + _HEAD.size, (high << 8) + low
            if length > self.max_inbound_frame_size:
                self._terminate_connection(ErrorCodes.FRAME_SIZE_ERROR)
                raise FrameTooLargeError(f"a frame of {length} bytes")
            if body + length > size:
                break
            start = body + length
            quick = self._take_quickly(kind, flags, stream_id, data[body:start]) if not self._in_block else None
            if quick is not None:
                events += quick
                continue
            events += self.receive_data(data[body - _HEAD.size : start])
            if kind in _OF_BLOCKS:
                self._in_block = not flags & _END_HEADERS
        self._rest = data[start:]
        return events

    def _take_quickly(self, kind: int, flags: int, stream_id: int, body: bytes) -> list[Event] | None:
        """What every call sends, without h2's buffer of frames; None for what is unusual: that is h2's to judge."""
        try:
            if kind == DataFrame.type:
                stream = None if flags & ~_END_STREAM else self.streams.get(stream_id)
                if stream is not None and stream.state_machine.state in _THEY_SEND:
                    return self._receive_plain(stream, body, ended=bool(flags))
            elif kind == WindowUpdateFrame.type:
                return self._open_window(stream_id, body)
            elif kind == HeadersFrame.type and flags in _WHOLE_BLOCKS and self._may_begin(stream_id):
                return self._begin(stream_id, body, ended=bool(flags & _END_STREAM))
        except ProtocolError as error:
            self._terminate_connection(error.error_code)
            raise
        return None

    def _may_begin(self, stream_id: int) -> bool:
        """Whether the other side may begin this stream next."""
        return not self._is_client and self.highest_inbound_stream_id < stream_id <= _MOST and stream_id % 2 == 1

    def _begin(self, stream_id: int, block: bytes, *, ended: bool) -> list[Event]:
        """A request's header block, the first frame of its stream."""
        self.noise_bytes += _HEAD.size
        if self.open_inbound_streams >= STREAMS_MAX:
            raise TooManyStreamsError(f"{STREAMS_MAX} streams are open, which is the limit")
        fields = _decode_headers(self.decoder, block)
        self._check(ConnectionInputs.RECV_HEADERS)
        stream = self._begin_new_stream(stream_id, AllowedStreamIDs.ODD)
        if fields is self._asked and not ended:
            machine = stream.state_machine
            machine.state, machine.client, machine.headers_received = StreamState.OPEN, False, True
            return [_request(stream_id, fields)]
        ends = stream.receive_headers(fields, ended, None)[1][1:]
        self._asked = fields if stream._expected_content_length is None else None  # noqa: SLF001
        began = _request(stream_id, fields)
        began.stream_ended = cast("StreamEnded", ends[0]) if ends else None
        return [began, *ends]

    def _open_window(self, stream_id: int, body: bytes) -> list[Event] | None:
        stream = self.streams.get(stream_id)
        window = self.outbound_flow_control_window if stream is None else stream.outbound_flow_control_window
        if (stream is None and stream_id) or len(body) != _INCREMENT.size:
            return None
        (increment,) = _INCREMENT.unpack(body)
        if not 1 <= increment <= _MOST - max(window, 0):
            return None
        self.noise_bytes += _HEAD.size + len(body)
        self._check(ConnectionInputs.RECV_WINDOW_UPDATE)
        if stream is None:
            self.outbound_flow_control_window += increment
        elif stream.open:
            stream.outbound_flow_control_window += increment
        else:
            return stream.receive_window_update(increment)[1]
        return [WindowUpdated(stream_id=stream_id, delta=increment)]

    def _receive_plain(self, stream: H2Stream, body: bytes, *, ended: bool) -> list[Event]:
        """DATA without padding, for a stream whose other side may send them."""
        size, machine = len(body), stream.state_machine
        if size < PAYLOAD_BYTES:
            self.noise_bytes += _HEAD.size
        self._check(ConnectionInputs.RECV_DATA)
        self._inbound_flow_control_window_manager.window_consumed(size)
        if not machine.headers_received:
            machine.process_input(StreamInputs.RECV_DATA)
        stream._inbound_window_manager.window_consumed(size)  # noqa: SLF001
        stream._track_content_length(size, ended)  # noqa: SLF001
        news = DataReceived(stream_id=stream.stream_id, data=body, flow_controlled_length=size)
        if not ended:
            return [news]
        return [news, *machine.process_input(StreamInputs.RECV_END_STREAM)]

    @property
    def has_outgoing(self) -> bool:
        """Whether ``data_to_send`` has anything."""
        return bool(self._data_to_send)

    def stream_has_room(self, stream_id: int) -> bool:
        """Whether the window of the stream itself is open, whatever the connection's is."""
        stream = self.streams.get(stream_id)
        return stream is None or stream.outbound_flow_control_window > 0

    def _local_settings_acked(self) -> dict[SettingCodes | int, ChangedSetting]:
        changed = super()._local_settings_acked()
        self.decoder.max_header_list_size = HEADER_BYTES_MAX
        return changed

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        """Who leaves in peace opens no more streams and goes on with those that there are."""
        if frame.error_code == ErrorCodes.NO_ERROR:
            self.peer_leaves, self.peer_took = True, frame.last_stream_id
            return [], []
        return super()._receive_goaway_frame(frame)


def _request(stream_id: int, fields: Iterable[Header]) -> RequestReceived:
    """Callers that ask alike share their fields, which nobody adds to: h2 would copy them into a list."""
    return RequestReceived(stream_id=stream_id, headers=fields)  # type: ignore[arg-type]


class ServerProtocol(ConnectionProtocol):
    """h2 counts the open streams one by one for each new one; here it does so for each twice as many."""

    def __init__(self) -> None:
        super().__init__(client_side=False)
        self._counted = self._since = 0
        self.settings_seen = 0  # frames of them; likewise

    @property
    def open_inbound_streams(self) -> int:
        """Never too few; h2 forgets those that have ended when it counts."""
        self._since += 1
        if self._since > self._counted + LOOKS_AT_ONCE or self._counted + self._since >= STREAMS_MAX:
            self._counted, self._since = super().open_inbound_streams, 0
        return self._counted + self._since

    # h2's own dispatch, with what a server of many callers on one connection needs otherwise.

    def _receive_frame(self, frame: Frame) -> list[Event]:
        self.noise_bytes += _HEAD.size if isinstance(frame, _CALLS) else _HEAD.size + frame.body_len
        return super()._receive_frame(frame)

    def _receive_settings_frame(self, frame: SettingsFrame) -> tuple[list[Frame], list[Event]]:
        """Each costs as much as there are streams."""
        self.settings_seen += 1
        if self.settings_seen > SETTINGS_MAX:
            raise DenialOfServiceError("too many settings")
        return super()._receive_settings_frame(frame)
