"""One HTTP/2 connection, of either side: h2 keeps the protocol's state, this moves its bytes."""

from __future__ import annotations

import asyncio
import logging

from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError

from cluster.wire.http2.outbox import Outbox
from cluster.wire.http2.protocol import ConnectionProtocol
from cluster.wire.http2.sending import Sending

_LOG = logging.getLogger(__name__)
FLUSH_BYTES = 2**16  # of messages that wait for the end of the event loop's turn


class Link(asyncio.Protocol):
    """What both sides send, as calls use it; what comes is for those that inherit it."""

    def __init__(self, h2: ConnectionProtocol) -> None:
        self._loop = asyncio.get_running_loop()
        self._state = h2
        self._outbox = Outbox(h2, self._sent)
        self._transport: asyncio.Transport | None = None
        self._peer = ""
        self._flushing = False
        self._unflushed = 0

    @property
    def peer(self) -> str:
        return self._peer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # of a stream, whatever the loop calls it
        name = transport.get_extra_info("peername")
        self._peer = "" if not name else f"{'ipv6' if ':' in name[0] else 'ipv4'}:{name[0]}:{name[1]}"
        self._state.initiate_connection()
        self.flush()

    def pause_writing(self) -> None:
        self._outbox.paused = True

    def resume_writing(self) -> None:
        self._outbox.paused = False
        self._outbox.resume()

    # ---------------------------------------------------------------------------------------------------- for calls

    def send_headers(self, stream_id: int, block: bytes, *, last: bool) -> None:
        try:
            self._state.put_headers(stream_id, block, last=last)
        except ProtocolError as error:  # the stream or the connection is over; whoever works for it is told as well
            self._over(stream_id, error)
        self._flush_soon()

    def send(self, call: Sending, data: bytes) -> memoryview | None:
        return self._outbox.send(call, data)

    def send_now(self, call: Sending, data: bytes) -> memoryview | None:
        """``send``, and it goes out with all that waits for the end of the event loop's turn."""
        self._flushing = True  # below, and not at that end
        rest = self._outbox.send(call, data)
        self.flush()
        return rest

    def forget_unsent(self, call: Sending) -> None:
        self._outbox.forget(call)

    def acknowledge(self, stream_id: int, size: int) -> None:
        self._state.give_back(stream_id, size)
        if self._state.has_outgoing:
            Link._flush_soon(self)  # a window says nothing to the caller

    def reset(self, stream_id: int, code: ErrorCodes) -> None:
        try:
            self._state.reset_stream(stream_id, code)
        except ProtocolError as error:
            self._over(stream_id, error)
        self._flush_soon()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --------------------------------------------------------------------------------------------------------- bytes

    def _over(self, stream_id: int, error: ProtocolError) -> None:
        _LOG.debug("stream %d of %s: %s", stream_id, self._peer, error)

    def _flush_soon(self) -> None:
        """What is sent in one turn of the event loop goes out in one system call."""
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self.flush)

    def _sent(self, size: int) -> None:
        """Much at once goes out at once, so that the transport can say when it is too much."""
        self._unflushed += size
        if self._unflushed > FLUSH_BYTES:
            self.flush()
        else:
            self._flush_soon()

    def flush(self) -> None:
        self._flushing, self._unflushed = False, 0
        data = self._state.data_to_send()
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _close(self) -> None:
        self.flush()
        if self._transport is not None:
            self._transport.close()
