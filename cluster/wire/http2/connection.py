"""One client's HTTP/2 connection: h2 keeps the protocol's state, this moves bytes, and calls hang on it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import grpc
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes
from hyperframe.frame import GoAwayFrame

from cluster.wire.http2 import headers
from cluster.wire.http2.call import ServerCall
from cluster.wire.http2.link import Link
from cluster.wire.http2.messages import CallRefused
from cluster.wire.http2.protocol import ServerProtocol

_LOG = logging.getLogger(__name__)
UNFINISHED_BYTES_MAX = 2**28  # of messages of one connection whose end has not come
IDLE_BYTES_MAX = 2**16  # beside payload, while no message moves, within ``keepalive_s``: what no honest client sends
PARSED_BYTES = 2**14  # between two looks at that
OUT_BYTES_MAX = 2**20  # of what is no message, to a client that does not read
HEAD_KEPT_BYTES = 4096  # of the last call's, in case the next one's is the same
_RESET_BYTES = 13  # a RST_STREAM
FIRST_BYTES_S = 20.0  # to begin as HTTP/2 does


class Front(Protocol):
    """The server, as a connection uses it."""

    largest_message: int
    answer_stall_s: float
    keepalive_s: float
    keepalive_timeout_s: float

    @property
    def leaving(self) -> bool:
        """Whether new calls are for somebody else."""
        ...

    def method_at(self, path: str) -> grpc.RpcMethodHandler[Any, Any]:
        """Of the method ``path``; CallRefused when there is none."""
        ...

    def opened(self, connection: Connection) -> None: ...

    def closed(self, connection: Connection) -> None: ...

    def call_ended(self, call: ServerCall) -> None: ...

    def unserved(self, path: str, code: grpc.StatusCode) -> None:
        """A call was refused before there was one."""
        ...


class Connection(Link):
    """Whatever a client sends ends nothing but its own calls or, where HTTP/2 was broken, its own connection."""

    def __init__(self, front: Front) -> None:
        self._h2 = ServerProtocol()
        super().__init__(self._h2)
        self._front, self.largest_message, self.answer_stall_s = front, front.largest_message, front.answer_stall_s
        self._calls: dict[int, ServerCall] = {}
        self._unfinished = 0  # bytes of calls that have not begun
        self._idle_bytes = 0
        self._last_stream = 0
        self._gone_away = False
        self._heard_s = self._idle_since_s = self._loop.time()
        self._pinged = False
        self._watch = self._loop.call_later(min(FIRST_BYTES_S, front.keepalive_s), self._look)
        self._began = False
        self._last_head: tuple[Iterable[tuple[bytes, bytes]], headers.CallHead] | None = None
        self._on: dict[type[Event], Callable[[Any], None]] = {
            RequestReceived: self._request, DataReceived: self._data, StreamEnded: self._stream_ended,
            StreamReset: self._stream_reset, RemoteSettingsChanged: self._settings,
            ConnectionTerminated: self._terminated,
        }  # fmt: skip

    @property
    def calls(self) -> int:
        return len(self._calls)

    # ------------------------------------------------------------------------------------------------ asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._front.opened(self)
        if self._front.leaving:
            self.go_away()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._transport = None
        self._watch.cancel()
        self._leave()
        self._front.closed(self)

    def _leave(self) -> None:
        """The client is gone, for all of its calls."""
        self._outbox.clear()
        for call in tuple(self._calls.values()):
            call.leave()
            if call.task is None:
                self.drop(call)

    def data_received(self, data: bytes) -> None:
        self._heard_s, self._pinged = self._loop.time(), False
        if self._heard_s - self._idle_since_s > self._front.keepalive_s:
            self._idle_since_s, self._idle_bytes, self._h2.settings_seen = self._heard_s, 0, 0
        try:
            for start in range(0, len(data), PARSED_BYTES):
                self._parse(data[start : start + PARSED_BYTES])
        except ProtocolError as error:
            self._break(str(error))
        except Exception:  # boundary: what a stranger sends must not be able to do more than this
            _LOG.exception("a client's bytes could not be read")
            self._break("")
        if self._h2.has_outgoing:
            self.flush()
        transport = self._transport
        if self._outbox.paused and transport is not None and transport.get_write_buffer_size() > OUT_BYTES_MAX:
            transport.pause_reading()  # it is to read first; who never does is given up as any silent client is

    def _parse(self, data: bytes) -> None:
        """Takes in ``data``; ProtocolError."""
        h2 = self._h2
        events = h2.take_in(data)
        self._began = True
        self._idle_bytes += h2.noise_bytes
        h2.noise_bytes = 0
        for event in events:
            take = self._on.get(type(event))
            if take is not None:
                take(event)
        self._outbox.resume_if_opened()
        if self._idle_bytes > IDLE_BYTES_MAX:
            h2.close_connection(ErrorCodes.ENHANCE_YOUR_CALM, b"too much that brings no call further")
            raise ProtocolError("too much that brings no call further")

    def resume_writing(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()
        super().resume_writing()

    # --------------------------------------------------------------------------------------------------- h2's events

    def _request(self, event: RequestReceived) -> None:
        stream_id = event.stream_id
        if self._front.leaving:
            self.reset(stream_id, ErrorCodes.REFUSED_STREAM)  # which says that nothing was done: another may do it
            return
        self._last_stream = stream_id
        try:
            head = self._head(event.headers)
            call = ServerCall(self, stream_id, head, self._front.method_at(head.path))
        except headers.NotGrpc as refused:
            self._answer(event, headers.refusal(refused.status))
            return
        except CallRefused as refused:
            self._answer(event, headers.beginning() + headers.ending(refused.code, str(refused)))
            path = dict(event.headers).get(b":path", b"")
            self._front.unserved(path.decode("latin-1"), refused.code)
            return
        self._calls[stream_id] = call
        self._unfinished += call.held
        if call.can_start:
            self._start(call)

    def _head(self, fields: Iterable[tuple[bytes, bytes]]) -> headers.CallHead:
        """``call_head``, once for calls one after the other that ask alike (``KeepingDecoder``)."""
        if self._last_head is not None and self._last_head[0] is fields:
            return self._last_head[1]
        head = headers.call_head(fields)
        self._last_head = (fields, head) if head.size <= HEAD_KEPT_BYTES else None
        return head

    def _answer(self, event: RequestReceived, block: bytes) -> None:
        self.send_headers(event.stream_id, block, last=True)
        if event.stream_ended is None:
            self.reset(event.stream_id, ErrorCodes.NO_ERROR)

    def _start(self, call: ServerCall) -> None:
        self._idle_bytes = 0
        self._unfinished -= call.held
        call.held = 0
        call.start()

    def _data(self, event: DataReceived) -> None:
        size, stream_id = event.flow_controlled_length, event.stream_id
        call = self._calls.get(stream_id)
        if call is None:
            if size:
                self.acknowledge(stream_id, size)
            return
        call.owed += size
        if call.task is None:
            call.held += len(event.data)
            self._unfinished += len(event.data)
        if self._unfinished > UNFINISHED_BYTES_MAX:
            text = "Too much that is unfinished came on this connection; send fewer long messages at once."
            call.refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
            return
        try:
            if call.receive(event.data):
                self._idle_bytes = 0
        except CallRefused as refused:
            call.refuse(refused.code, str(refused))

    def _stream_ended(self, event: StreamEnded) -> None:
        call = self._calls.get(event.stream_id)
        if call is None:
            return
        try:
            call.receive_end()
        except CallRefused as refused:
            call.refuse(refused.code, str(refused))
        else:
            if call.can_start:
                self._start(call)

    def _stream_reset(self, event: StreamReset) -> None:
        call = self._calls.get(event.stream_id)
        if call is None:
            return
        self._idle_bytes -= _RESET_BYTES  # a call that is given up is no noise
        self.forget_unsent(call)
        call.leave()
        if call.task is None:
            self.drop(call)

    def _settings(self, event: RemoteSettingsChanged) -> None:
        if SettingCodes.INITIAL_WINDOW_SIZE in event.changed_settings:
            self._outbox.windows_changed()

    def _terminated(self, _event: ConnectionTerminated) -> None:
        """The client has broken off; h2 sends nothing more."""
        self._leave()
        self._close()

    # ---------------------------------------------------------------------------------------------------- for calls

    def drop(self, call: ServerCall) -> None:
        """Nobody works on ``call`` any more."""
        if self._calls.pop(call.stream_id, None) is None:
            return
        self.forget_unsent(call)
        self._unfinished -= call.held
        call.close()
        self._front.call_ended(call)
        if self._gone_away and not self._calls:
            self._close()

    # -------------------------------------------------------------------------------------------------- for the server

    def go_away(self) -> None:
        """No new calls; those that run go on, and with the last one the connection ends."""
        if self._gone_away or self._transport is None:
            return
        self._gone_away = True
        self.flush()
        # Not by h2, which would take the connection for closed.
        self._transport.write(GoAwayFrame(0, last_stream_id=self._last_stream, error_code=0).serialize())
        if not self._calls:
            self._close()

    def cancel_calls(self) -> None:
        """Ends those that run."""
        for call in tuple(self._calls.values()):
            call.refuse(grpc.StatusCode.UNAVAILABLE, "The server is shutting down.")

    # --------------------------------------------------------------------------------------------------------- bytes

    def _flush_soon(self) -> None:
        self._idle_bytes = 0  # clients answer what they get with frames of their own
        if not self._flushing:
            super()._flush_soon()

    def _break(self, why: str) -> None:
        """The client has broken the protocol: it is told, and its connection ends."""
        _LOG.debug("the connection of %s ends: %s", self._peer, why)
        self._leave()
        self._close()

    def _look(self) -> None:
        """Whether the client is still there: a ping after a silence, the end after a longer one."""
        front = self._front
        patience_s = front.keepalive_s if self._began else FIRST_BYTES_S
        if self._loop.time() - self._heard_s < patience_s:
            self._watch = self._loop.call_at(self._heard_s + patience_s, self._look)
            return
        if self._pinged or not self._began or self._transport is None or self._transport.is_closing():
            self.abort()
            return
        self._pinged = True
        self._h2.ping(bytes(8))
        self.flush()
        self._watch = self._loop.call_later(front.keepalive_timeout_s, self._look)
