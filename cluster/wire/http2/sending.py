"""What a call of either side has in common: its messages go out in order, and of one of them the rest may wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVar

Message_contra = TypeVar("Message_contra", contravariant=True)


class PushedCall(Protocol[Message_contra]):
    """A call of either side, for whoever pushes its messages on it: look whether it is ``writable`` before each."""

    on_room: Callable[[], None] | None

    @property
    def writable(self) -> bool: ...
    def push(self, message: Message_contra) -> None: ...


class Sending:
    """A call, as the connection's outbox sees it, and two ways to send on it.

    By a task that waits for room, or by ``push``ing while the call is ``writable``: the pusher hears of room by
    ``on_room``, in the turn of the event loop that brings it, and no task has to wake for a message. One call is sent
    on in one of the two ways.
    """

    __slots__ = ("_drained", "on_room", "stream_id", "unsent", "unsent_began")

    def __init__(self) -> None:
        self.stream_id = 0
        self.unsent: memoryview | None = None  # of the message that is being written
        self.unsent_began = False  # a part of that message is out
        self.on_room: Callable[[], None] | None = None  # whatever there was no room for is out
        self._drained: asyncio.Future[None] | None = None

    def drained(self) -> None:
        """All that was unsent is out."""
        self.unsent, self.unsent_began = None, False
        self._wake_writer()
        if self.on_room is not None:
            self.on_room()

    def _wake_writer(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    async def _until_drained(self) -> None:
        mine = self._drained = asyncio.get_running_loop().create_future()
        try:
            await mine
        finally:
            if self._drained is mine:  # whoever cancelled this write may wait by now
                self._drained = None
