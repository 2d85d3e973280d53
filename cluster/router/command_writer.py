"""What a router has to say to an engine: gathered in a turn of the event loop, sent as far as the engine takes it."""

from __future__ import annotations

import asyncio
from collections import deque

from cluster.router.command_batches import COMMANDS_BYTES_MAX, batches
from cluster.v1 import engine_pb2
from cluster.wire.http2.sending import PushedCall

WAITING_MAX = 16384  # submits that wait for an engine to take them


class CommandWriter:
    """Nothing here waits: what is said leaves once per turn of the event loop, in one message unless it is large.

    What the engine does not take stays, and goes on when it does. Nothing leaves but between ``begin`` and ``end``.
    """

    def __init__(self, bytes_max: int = COMMANDS_BYTES_MAX) -> None:
        self._bytes_max = bytes_max  # of one message's submits, a lone one apart
        self._submits: dict[int, engine_pb2.Submit] = {}
        self._cancels: list[int] = []
        self._asides: dict[str, engine_pb2.SessionRequest] = {}  # beside commands, the last of each kind
        self._gathered: deque[engine_pb2.SessionRequest] = deque()
        self._call: PushedCall[engine_pb2.SessionRequest] | None = None
        self._at_the_end = False  # of this turn, something is sent

    @property
    def full(self) -> bool:
        """Whether it takes no more submits."""
        return len(self._submits) >= WAITING_MAX

    def submit(self, submit: engine_pb2.Submit) -> None:
        assert not self.full, "look first"
        self._submits[submit.sequence_id] = submit
        self._send_soon()

    def take_back(self, sequence_id: int) -> bool:
        """Whether its submit has not left, and will not."""
        return self._submits.pop(sequence_id, None) is not None

    def cancel(self, sequence_id: int) -> None:
        self._cancels.append(sequence_id)
        self._send_soon()

    def say(self, kind: str, request: engine_pb2.SessionRequest) -> None:
        """``request`` in place of whatever of its kind has not left."""
        self._asides[kind] = request
        self._send_soon()

    def begin(self, call: PushedCall[engine_pb2.SessionRequest]) -> None:
        """From now on all goes out on ``call``."""
        self._call, call.on_room = call, self._send
        self._send_soon()

    def end(self) -> None:
        """The call is over, and so is what was on its way."""
        self._call = None
        self._gathered.clear()

    def forget_commands(self) -> None:
        self._submits, self._cancels = {}, []

    def forget_asides(self) -> None:
        """A stream that begins says all of it by itself."""
        self._asides = {}

    def _send_soon(self) -> None:
        if not self._at_the_end and self._call is not None:
            self._at_the_end = True
            asyncio.get_running_loop().call_soon(self._send)

    def _send(self) -> None:
        self._at_the_end, call = False, self._call
        while call is not None and call.writable:  # else it hears of room
            if not self._gathered and not self._gather():
                return
            call.push(self._gathered.popleft())

    def _gather(self) -> bool:
        if not (self._submits or self._cancels or self._asides):
            return False
        submits, self._submits = self._submits, {}
        cancels, self._cancels = self._cancels, []
        asides, self._asides = self._asides, {}
        if submits or cancels:
            self._gathered.extend(batches(tuple(submits.values()), cancels, self._bytes_max))
        self._gathered.extend(asides.values())
        return True
