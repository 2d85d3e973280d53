"""Time in which the controller could hear.

A controller that was stopped for seconds (a starved machine, a paused virtual one) finds every rank silent when it
wakes, before it has read what they said meanwhile. This clock leaves such gaps out: silence is always the other's.
"""

from __future__ import annotations

import asyncio

from cluster.domain.clock import Clock

TICK_S = 0.25
SLACK_S = 1.0


class AttentiveClock:
    """``clock`` without the gaps of more than ``slack_s`` between two ticks."""

    def __init__(self, clock: Clock, slack_s: float = SLACK_S) -> None:
        self._clock, self._slack_s = clock, slack_s
        self._skipped_s = 0.0
        self._ticked_s = clock.now()

    def now(self) -> float:
        """At most ``slack_s`` after the last tick, however late it is."""
        return min(self._clock.now() - self._skipped_s, self._ticked_s + self._slack_s)

    def tick(self) -> None:
        """The event loop runs: from here on time counts again."""
        now_s = self.now()
        self._skipped_s = self._clock.now() - now_s
        self._ticked_s = now_s


async def keep_ticking(clock: AttentiveClock) -> None:
    """Until cancelled; whoever shares its event loop is as attentive as this task."""
    while True:
        clock.tick()
        await asyncio.sleep(TICK_S)
