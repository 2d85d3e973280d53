"""Adapter: whether this process's event loop still runs, for those who ask in another thread."""

from __future__ import annotations

import asyncio

from cluster.domain.clock import Clock
from cluster.telemetry.exposition import Page

BEAT_S = 0.5
LATE_S = 5.0  # a loop that has run nothing for so long hangs: no step of a router takes as long


class LoopBeat:
    """The running event loop leaves a mark every half second; ``page`` tells how old the last one is.

    To be built on the loop, and closed there. A page of metrics is a thread's and comes from a hanging process, too.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._beat()

    def _beat(self) -> None:
        self._beaten_s = self._clock.now()
        self._next = self._loop.call_later(BEAT_S, self._beat)

    def page(self) -> Page:
        """200 while the loop runs, 503 when it has not for ``LATE_S``; any thread may ask."""
        age_s = self._clock.now() - self._beaten_s
        return Page(200, b"ok\n") if age_s < LATE_S else Page(503, f"no beat for {age_s:.1f} s\n".encode())

    def close(self) -> None:
        self._next.cancel()
