"""Writing to one client, which has so long to take each message, without a timer for each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class ClientStalled(Exception):  # noqa: N818 - an event of the router's inside, not a fault of a caller
    """The client has not taken a message for as long as it may."""


class ClientWriter:
    """``write`` with a limit of ``stall_s`` seconds for each message, one at a time.

    A timer is set with the first message and looks whether one has been waiting for too long; if one waits for less, it
    looks again when that one would be due. So a stream costs one timer for each ``stall_s``, not one for each token.
    ``close`` must end it. One task does all writes.
    """

    __slots__ = ("_loop", "_send", "_since_s", "_stall_s", "_task", "_timer", "_why")

    def __init__(self, send: Callable[[object], Awaitable[None]], stall_s: float) -> None:
        self._send, self._stall_s = send, stall_s
        self._loop = asyncio.get_running_loop()
        self._since_s: float | None = None  # when the message that is waiting now began to
        self._task: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._why: Exception | None = None  # we have cancelled the task

    async def write(self, message: object) -> None:
        """Ends when the transport has taken ``message``; ClientStalled when that does not happen in time.

        What ``interrupt`` was told when it came first.
        """
        self._since_s = self._loop.time()
        if self._timer is None:
            self._task = asyncio.current_task()
            self._timer = self._loop.call_at(self._since_s + self._stall_s, self._look)
        try:
            await self._send(message)
        except asyncio.CancelledError:
            # As asyncio.timeout does it: only a cancellation that nobody else asked for as well is ours.
            if self._why is not None and self._task is not None and self._task.uncancel() == 0:
                raise self._why from None
            raise
        finally:
            self._since_s = None

    def interrupt(self, error: Exception) -> bool:
        """A write that waits now ends with ``error``; False when none does."""
        if self._since_s is None or self._why is not None:
            return False
        self._cancel(error)
        return True

    def close(self) -> None:
        """Nothing more is written."""
        if self._timer is not None:
            self._timer.cancel()
        self._task = None

    def _look(self) -> None:
        now_s = self._loop.time()
        since_s = now_s if self._since_s is None else self._since_s
        if now_s - since_s < self._stall_s:
            self._timer = self._loop.call_at(since_s + self._stall_s, self._look)
            return
        if self._why is None:
            self._cancel(ClientStalled())

    def _cancel(self, why: Exception) -> None:
        assert self._task is not None, "it writes"
        self._why = why
        self._task.cancel()
