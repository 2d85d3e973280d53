"""h2's state of a connection, with our limits: of a server whose streams are many and long, and of a client."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import cast

from h2.config import H2Configuration
from h2.connection import ConnectionInputs, ConnectionState, H2Connection, _decode_headers
from h2.errors import ErrorCodes
from h2.events import DataReceived, Event, RequestReceived, StreamEnded
from h2.exceptions import DenialOfServiceError, FlowControlError, FrameTooLargeError, ProtocolError, TooManyStreamsError
from h2.settings import ChangedSetting, SettingCodes, Settings
from h2.stream import H2Stream, StreamClosedBy, StreamInputs, StreamState
from h2.windows import WindowManager
from hpack.struct import Header
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PushPromiseFrame,
    SettingsFrame,
)

from cluster.wire.http2.header_decoder import KeepingDecoder
from cluster.wire.http2.headers import METADATA_BYTES_MAX

STREAMS_MAX = 65536  # calls of one connection at a time
STREAM_WINDOW = 2**20  # bytes that a client may send on a stream before it hears from us
CONNECTION_WINDOW = 2**22
HEADER_BYTES_MAX = 2**20  # of a header block that is read at all; a call is refused long before
SETTINGS_MAX = 100  # frames of settings between two looks
PAYLOAD_BYTES = 1024  # of a frame whose head is no noise
_HEAD = struct.Struct(">IBI")  # of a frame: the length in three bytes and the kind in one, flags, stream
_HEAD_BYTES = _HEAD.size
_DATA, _HEADERS, _PING, _WINDOW_UPDATE, _CONTINUATION = 0x0, 0x1, 0x6, 0x8, 0x9  # kinds (RFC 9113, 6)
_ACK, _END_STREAM, _END_HEADERS = 0x1, 0x1, 0x4
_PING_BYTES = 8
_WHOLE_BLOCKS = frozenset({_END_HEADERS, _END_HEADERS | _END_STREAM})
_INCREMENT = struct.Struct(">I")  # of a window
_MOST = 2**31 - 1  # that a window may be, and a stream's number
_OF_BLOCKS = (_HEADERS, PushPromiseFrame.type, _CONTINUATION)
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
        # Streams whose windows the other side has opened, 0 for the connection's; whoever looks empties it.
        self.opened: list[int] = []
        self._their_window = self.remote_settings.initial_window_size  # of a stream that they begin

    def initiate_connection(self) -> None:
        super().initiate_connection()
        self.increment_flow_control_window(CONNECTION_WINDOW - self.inbound_flow_control_window)

    # What every message costs, without the objects and checks that h2 has for what we never send. Its state of the
    # connection and the streams goes on as if it had sent the frames itself: where its tables say that nothing
    # changes, which is nearly always, they are not asked: none of the steps that calls take changes the state of a
    # connection that is open.

    def put_headers(self, stream_id: int, block: bytes, *, last: bool) -> None:
        """``send_headers``, encoded without tables, on a stream that the other side has opened; ProtocolError."""
        if self.state_machine.state is not self._open:
            self.state_machine.process_input(ConnectionInputs.SEND_HEADERS)
        stream = self.streams.get(stream_id) or self._get_stream_by_id(stream_id)
        machine = stream.state_machine
        if machine.state is StreamState.HALF_CLOSED_REMOTE and not (machine.client or machine.trailers_sent):
            if machine.headers_sent:
                machine.trailers_sent = True
            machine.headers_sent = True
            if last:
                machine.state, machine.stream_closed_by = StreamState.CLOSED, StreamClosedBy.SEND_END_STREAM
        else:
            machine.process_input(StreamInputs.SEND_HEADERS)
            if last:
                machine.process_input(StreamInputs.SEND_END_STREAM)
        if self.encoder.table_size_changes:  # which have to be told, though nothing is in it
            self.encoder.header_table.resized = True  # hpack forgets that where one of them changed nothing
            block = self.encoder.encode(()) + block
        size = self.max_outbound_frame_size
        kind, flags = _HEADERS, _END_STREAM if last else 0
        while len(block) > size:
            self._put(kind, flags, stream_id, block[:size])
            block, kind, flags = block[size:], _CONTINUATION, 0
        self._put(kind, flags | _END_HEADERS, stream_id, block)

    def put_data(self, stream_id: int, data: memoryview) -> int:
        """``send_data`` of as much as there is room for in the windows and a frame; how many bytes. ProtocolError.

        There are some in ``data``.
        """
        if self.state_machine.state is not self._open:
            self.state_machine.process_input(ConnectionInputs.SEND_DATA)
        stream = self.streams.get(stream_id) or self._get_stream_by_id(stream_id)
        if stream.state_machine.state not in _WE_SEND:
            stream.state_machine.process_input(StreamInputs.SEND_DATA)
        room = min(stream.outbound_flow_control_window, self.outbound_flow_control_window, self.max_outbound_frame_size)
        size = len(data)
        if size > room:
            if room <= 0:
                return 0
            data, size = data[:room], room
        stream.outbound_flow_control_window -= size
        self.outbound_flow_control_window -= size
        self._put(_DATA, 0, stream_id, data)
        return size

    def give_back(self, stream_id: int, size: int) -> None:
        """``acknowledge_received_data``: so many bytes of a stream's DATA are done with."""
        self._open_inbound(0, self._inbound_flow_control_window_manager, size)
        stream = self.streams.get(stream_id)
        if stream is not None and stream.state_machine.state in _THEY_SEND:
            self._open_inbound(stream_id, stream._inbound_window_manager, size)  # noqa: SLF001

    def _open_inbound(self, stream_id: int, window: WindowManager, size: int) -> None:
        if window.current_window_size and window._bytes_processed + size < window.max_window_size // 2:  # noqa: SLF001
            window._bytes_processed += size  # noqa: SLF001 - all that h2 would do: the other side has room enough
            return
        increment = window.process_bytes(size)
        if increment:
            self._put(_WINDOW_UPDATE, 0, stream_id, _INCREMENT.pack(increment))

    def _put(self, kind: int, flags: int, stream_id: int, body: bytes | memoryview) -> None:
        out = self._data_to_send
        out += _HEAD.pack(len(body) << 8 | kind, flags, stream_id)
        out += body

    def take_in(self, data: bytes) -> list[Event]:
        """``receive_data``; what every call sends does not go through h2's buffer of frames first. ProtocolError.

        Windows that were opened are in ``opened``, and pings are answered: neither is an event.
        """
        events: list[Event] = []
        if self._preface_left:
            preface, data = data[: self._preface_left], data[self._preface_left :]
            self._preface_left -= len(preface)
            events += self.receive_data(preface)
        if self._rest:
            data = self._rest + data
        start, size, longest = 0, len(data), self.max_inbound_frame_size
        while size - start >= _HEAD_BYTES:
            length_and_kind, flags, stream_id = _HEAD.unpack_from(data, start)
            length, kind, body = length_and_kind >> 8, length_and_kind & 0xFF, start + _HEAD_BYTES
            if length > longest:
                self._terminate_connection(ErrorCodes.FRAME_SIZE_ERROR)
                raise FrameTooLargeError(f"a frame of {length} bytes")
            end = body + length
            if end > size:
                break
            if self._in_block or not self._take_quickly(kind, flags, stream_id, data[body:end], events):
                events += self.receive_data(data[start:end])
                longest, self._their_window = self.max_inbound_frame_size, self.remote_settings.initial_window_size
                if kind in _OF_BLOCKS:
                    self._in_block = not flags & _END_HEADERS
            start = end
        self._rest = data[start:]
        return events

    def _take_quickly(self, kind: int, flags: int, stream_id: int, body: bytes, events: list[Event]) -> bool:
        """Takes what every call sends, without h2's buffer of frames; False for what is unusual: that is h2's."""
        try:
            if kind == _WINDOW_UPDATE:
                return self._open_window(stream_id, body)
            if kind == _DATA:
                stream = None if flags & ~_END_STREAM else self.streams.get(stream_id)
                if stream is not None and stream.state_machine.state in _THEY_SEND:
                    self._receive_plain(stream, body, flags, events)
                    return True
            elif kind == _HEADERS:
                if flags in _WHOLE_BLOCKS and self._may_begin(stream_id):
                    self._begin(stream_id, body, flags & _END_STREAM, events)
                    return True
            elif kind == _PING and not (flags or stream_id) and len(body) == _PING_BYTES:
                self._answer_ping(body)
                return True
        except ProtocolError as error:
            self._terminate_connection(error.error_code)
            raise
        return False

    def _may_begin(self, stream_id: int) -> bool:
        """Whether the other side may begin this stream next."""
        return not self._is_client and self.highest_inbound_stream_id < stream_id <= _MOST and stream_id % 2 == 1

    def _begin(self, stream_id: int, block: bytes, ended: int, events: list[Event]) -> None:
        """A request's header block, the first frame of its stream."""
        self.noise_bytes += _HEAD_BYTES
        if self.open_inbound_streams >= STREAMS_MAX:
            raise TooManyStreamsError(f"{STREAMS_MAX} streams are open, which is the limit")
        fields = _decode_headers(self.decoder, block)
        if self.state_machine.state is not self._open:
            self.state_machine.process_input(ConnectionInputs.RECV_HEADERS)
        stream = H2Stream(stream_id, self.config, STREAM_WINDOW, self._their_window)
        stream.max_outbound_frame_size = self.max_outbound_frame_size
        self.streams[stream_id], self.highest_inbound_stream_id = stream, stream_id
        # Callers that ask alike share their fields, which nobody adds to: h2 would copy them into a list.
        began = RequestReceived(stream_id=stream_id, headers=fields)  # type: ignore[arg-type]
        events.append(began)
        if fields is self._asked and not ended:
            machine = stream.state_machine
            machine.state, machine.client, machine.headers_received = StreamState.OPEN, False, True
            return
        ends = stream.receive_headers(fields, bool(ended), None)[1][1:]
        self._asked = fields if stream._expected_content_length is None else None  # noqa: SLF001
        began.stream_ended = cast("StreamEnded", ends[0]) if ends else None
        events += ends

    def _open_window(self, stream_id: int, body: bytes) -> bool:
        if len(body) != _INCREMENT.size:
            return False
        (increment,) = _INCREMENT.unpack(body)
        stream = None
        if stream_id:
            stream = self.streams.get(stream_id)
            if stream is None or not stream.open:
                return False
            window = stream.outbound_flow_control_window
        else:
            window = self.outbound_flow_control_window
        if not 1 <= increment <= _MOST or window + increment > _MOST:
            return False
        self.noise_bytes += _HEAD_BYTES + _INCREMENT.size
        if self.state_machine.state is not self._open:
            self.state_machine.process_input(ConnectionInputs.RECV_WINDOW_UPDATE)
        if stream is None:
            self.outbound_flow_control_window = window + increment
        else:
            stream.outbound_flow_control_window = window + increment
        self.opened.append(stream_id)
        return True

    def _answer_ping(self, body: bytes) -> None:
        self.noise_bytes += _HEAD_BYTES + _PING_BYTES
        if self.state_machine.state is not self._open:
            self.state_machine.process_input(ConnectionInputs.RECV_PING)
        self._put(_PING, _ACK, 0, body)

    def _receive_plain(self, stream: H2Stream, body: bytes, ended: int, events: list[Event]) -> None:
        """DATA without padding, for a stream whose other side may send them."""
        size, machine, stream_id = len(body), stream.state_machine, stream.stream_id
        if size < PAYLOAD_BYTES:
            self.noise_bytes += _HEAD_BYTES
        if self.state_machine.state is not self._open:
            self.state_machine.process_input(ConnectionInputs.RECV_DATA)
        common, own = self._inbound_flow_control_window_manager, stream._inbound_window_manager  # noqa: SLF001
        common.current_window_size -= size
        own.current_window_size -= size
        if common.current_window_size < 0 or own.current_window_size < 0:
            raise FlowControlError("more came than the window had room for")
        if not machine.headers_received:
            machine.process_input(StreamInputs.RECV_DATA)
        if stream._expected_content_length is not None:  # noqa: SLF001
            stream._track_content_length(size, bool(ended))  # noqa: SLF001
        events.append(DataReceived(stream_id=stream_id, data=body, flow_controlled_length=size))
        if not ended:
            return
        if machine.state is StreamState.OPEN:
            machine.state = StreamState.HALF_CLOSED_REMOTE
            events.append(StreamEnded(stream_id=stream_id))
        else:
            events += machine.process_input(StreamInputs.RECV_END_STREAM)

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
        self.noise_bytes += _HEAD_BYTES if isinstance(frame, _CALLS) else _HEAD_BYTES + frame.body_len
        return super()._receive_frame(frame)

    def _receive_settings_frame(self, frame: SettingsFrame) -> tuple[list[Frame], list[Event]]:
        """Each costs as much as there are streams."""
        self.settings_seen += 1
        if self.settings_seen > SETTINGS_MAX:
            raise DenialOfServiceError("too many settings")
        return super()._receive_settings_frame(frame)
