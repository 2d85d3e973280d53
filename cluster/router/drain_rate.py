"""How fast waiting work leaves a queue, from what has left it. Pure."""

from __future__ import annotations

import math

WINDOW_S = 3.0  # what was measured longer ago counts for less than half (1 / e)
SURE_AFTER = 4  # departures before the rate says anything
SURE_AFTER_S = 0.1  # and seconds of waiting
FORGOTTEN_AFTER_S = 30.0  # without a queue: what was measured then says nothing about now
HIGHER_SHARE_MAX = (
    0.75  # of the rate is at most taken off for what overtakes: who never left says nothing about leaving
)


class DrainRate:
    """Virtual tokens per second while somebody waits; times are a clock's seconds.

    Only such time counts: without a queue the rate is that of the arrivals, and says nothing about capacity.
    """

    def __init__(self) -> None:
        self._tokens = [0.0, 0.0, 0.0]  # of negative, zero and positive priorities
        self._seconds = 0.0
        self._departures = 0
        self._since_s: float | None = None
        self._idle_since_s: float | None = None

    def waiting(self, now_s: float, *, somebody: bool) -> None:
        """Whether somebody waits from now on."""
        self._advance(now_s)
        if somebody:
            if self._idle_since_s is not None and now_s - self._idle_since_s > FORGOTTEN_AFTER_S:
                self._tokens, self._seconds, self._departures = [0.0, 0.0, 0.0], 0.0, 0
            self._since_s, self._idle_since_s = now_s, None
        else:
            self._since_s = None
            if self._idle_since_s is None:
                self._idle_since_s = now_s

    def left(self, tokens: float, priority: int, now_s: float) -> None:
        """A request of so many virtual tokens went to an endpoint while others wait or it has waited itself."""
        self._advance(now_s)
        self._tokens[_kind(priority)] += tokens
        self._departures += 1

    def per_second(self, priority: int, now_s: float) -> float | None:
        """What is left for this priority when those that come meanwhile overtake it as they did; None: not known yet.

        Priorities are told apart by their sign.
        """
        self._advance(now_s)
        total = sum(self._tokens)
        if self._departures < SURE_AFTER or self._seconds < SURE_AFTER_S or total <= 0:
            return None
        higher = sum(self._tokens[_kind(priority) + 1 :]) / total
        return total * (1.0 - min(HIGHER_SHARE_MAX, higher)) / self._seconds

    def _advance(self, now_s: float) -> None:
        if self._since_s is None or now_s <= self._since_s:
            return
        passed_s, self._since_s = now_s - self._since_s, now_s
        kept = math.exp(-passed_s / WINDOW_S)
        self._tokens = [tokens * kept for tokens in self._tokens]
        self._seconds = WINDOW_S - (WINDOW_S - self._seconds) * kept


def _kind(priority: int) -> int:
    return 1 + (priority > 0) - (priority < 0)
