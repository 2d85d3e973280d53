"""Time as an argument: decisions never look at a clock themselves."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds; only differences mean anything."""

    def now(self) -> float: ...


class MonotonicClock:
    """The machine's clock."""

    now = staticmethod(time.monotonic)


class ManualClock:
    """A clock that stands still until told otherwise: for tests and simulations."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        assert seconds >= 0, "time does not run backwards"
        self._now_s += seconds
