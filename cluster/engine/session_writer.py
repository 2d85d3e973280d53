"""Takes what a session's outbox has and sends it, as far as its router reads."""

from __future__ import annotations

from collections.abc import Callable

from cluster.engine.sessions import Outbox
from cluster.v1 import engine_pb2
from cluster.wire.http2.sending import PushedCall


class SessionWriter:
    """Sends in the turn of the event loop that brings the news, or the room for them: no task wakes for a step.

    ``beat`` makes the message when one is due.
    """

    def __init__(
        self, outbox: Outbox, call: PushedCall[engine_pb2.SessionResponse], beat: Callable[[], engine_pb2.Beat]
    ) -> None:
        self._outbox, self._call, self._beat = outbox, call, beat

    def begin(self, welcome: engine_pb2.Welcome) -> None:
        """The first message; from now on whatever there is."""
        self._call.push(engine_pb2.SessionResponse(welcome=welcome))
        self._outbox.on_news = self._call.on_room = self._send

    def _send(self) -> None:
        """News of blocks go when nothing else waits, one message at a time."""
        while self._call.writable and (message := self._next()) is not None:
            self._call.push(message)

    def _next(self) -> engine_pb2.SessionResponse | None:
        outbox = self._outbox
        step = outbox.take()
        if step is not None:
            return step
        if outbox.take_beat():
            return engine_pb2.SessionResponse(beat=self._beat())
        blocks = outbox.take_blocks()
        return None if blocks is None else engine_pb2.SessionResponse(blocks=blocks)
