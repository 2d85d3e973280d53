"""When a session hears of its replica's load beside tokens and beats. Pure: the time is an argument."""

from __future__ import annotations

import math

BURST = 4  # messages of a session that come at once after a quiet time
_PAUSE_MIN_S = 0.001


class LoadNews:
    """For one session: changes are told at once, on average not more often than every ``pause_s``.

    A virtual schedule (GCRA, ITU-T I.371): each message moves it on by the pause, and it may be ahead of the clock
    by ``BURST`` - 1 of them. ``pause_s`` None: the session does not want to know. ``late``: it has not heard of some
    change.
    """

    def __init__(self, pause_s: float | None) -> None:
        self.wanted = pause_s is not None
        self.late = False
        self._scheduled_s = -math.inf
        self.pace(pause_s or 0.0)

    def changed(self, now_s: float) -> bool:
        """Whether the session is to be told now; otherwise it is late, if it wants to know at all."""
        if not self.wanted:
            return False
        # Farther ahead it is only where the pause was longer when the last one was told.
        self._scheduled_s = min(max(self._scheduled_s, now_s), now_s + BURST * self._pause_s)
        self.late = self._scheduled_s > now_s + (BURST - 1) * self._pause_s
        if not self.late:
            self._scheduled_s += self._pause_s
        return not self.late

    def pace(self, pause_s: float) -> None:
        """From now on; whether the session wants to know stays as it is."""
        self._pause_s = max(_PAUSE_MIN_S, pause_s)

    def told(self) -> None:
        """A message with tokens has brought the load too."""
        self.late = False
