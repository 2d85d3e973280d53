"""Messages of many calls on one connection, as fast as its clients' windows and the transport allow."""

from __future__ import annotations

import logging
from collections.abc import Callable

from h2.exceptions import ProtocolError

from cluster.wire.http2.protocol import ConnectionProtocol
from cluster.wire.http2.sending import Sending

_LOG = logging.getLogger(__name__)


class Outbox:
    """Sends what there is room for; of each call the rest of one message waits, in turns with those of others.

    Calls that wait for the connection or the transport are looked at when these have room, those that wait for the
    window of their own stream when that opens: what a client sends costs no more for the many that wait.
    """

    def __init__(self, h2: ConnectionProtocol, sent: Callable[[int], None]) -> None:
        """``sent`` hears of the bytes of each frame that is ready to go out."""
        self._h2, self._sent = h2, sent
        self.paused = False  # the transport has enough
        self._waiting: dict[int, Sending] = {}
        self._narrow: dict[int, Sending] = {}  # their streams' windows are closed
        self._opened = False  # some window has opened since ``resume``

    def send(self, call: Sending, data: bytes) -> memoryview | None:
        """What there was no room for; it is ``call.unsent`` by the time that there is."""
        rest = self._push(call.stream_id, memoryview(data))
        call.unsent_began = rest is not None and len(rest) < len(data)
        if rest is not None:
            self._wait(call)
        return rest

    def forget(self, call: Sending) -> None:
        self._waiting.pop(call.stream_id, None)
        self._narrow.pop(call.stream_id, None)

    def clear(self) -> None:
        self._waiting.clear()
        self._narrow.clear()

    def windows_changed(self) -> None:
        """Of all streams."""
        self._waiting |= self._narrow
        self._narrow.clear()
        self._opened = True

    def resume_if_opened(self) -> None:
        """After frames have come: they may have opened windows."""
        opened = self._h2.opened
        if opened:
            for stream_id in opened if self._narrow else ():
                call = self._narrow.pop(stream_id, None)
                if call is not None:
                    self._waiting[stream_id] = call
            opened.clear()
            self._opened = True
        if self._opened and self._waiting:
            self.resume()

    def resume(self) -> None:
        """Goes on with those that wait, one after the other, as far as there is room."""
        self._opened = False
        while self._waiting and not self.paused and self._h2.outbound_flow_control_window > 0:
            self._send_rest(next(iter(self._waiting.values())))

    def _send_rest(self, call: Sending) -> None:
        unsent = call.unsent
        assert unsent is not None, "it waits"
        del self._waiting[call.stream_id]
        rest = self._push(call.stream_id, unsent)
        if rest is None:
            call.drained()
            return
        if len(rest) < len(unsent):
            call.unsent, call.unsent_began = rest, True
        self._wait(call)

    def _wait(self, call: Sending) -> None:
        """Behind the others."""
        has_room = self._h2.stream_has_room(call.stream_id)
        (self._waiting if has_room else self._narrow)[call.stream_id] = call

    def _push(self, stream_id: int, data: memoryview) -> memoryview | None:
        """Sends what there is room for; returns the rest."""
        h2 = self._h2
        try:
            while not self.paused:
                sent = h2.put_data(stream_id, data)
                if not sent:
                    break
                self._sent(sent)
                if sent == len(data):
                    return None
                data = data[sent:]
        except ProtocolError as error:  # the stream or the connection is over; whoever works for it is told as well
            _LOG.debug("stream %d: %s", stream_id, error)
            return None
        return data
