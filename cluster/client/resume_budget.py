"""How many calls in vain one client may make: when every router is away, its streams must not storm them. Pure."""

from __future__ import annotations

import math
import threading

RESERVE = 100
CALLS_PER_S = 100.0
WAIT_MAX_S = 10.0


class ResumeBudget:
    """Calls after one in vain, over all requests of a client: ``reserve`` at once, ``calls_per_s`` in the long run.

    Threads may share it. A request's first call at each address is not paid from it, nor is the first one after those.
    """

    def __init__(
        self, reserve: int = RESERVE, calls_per_s: float = CALLS_PER_S, wait_max_s: float = WAIT_MAX_S
    ) -> None:
        self._reserve, self._calls_per_s = float(reserve), calls_per_s
        self._least = -wait_max_s * calls_per_s
        self._left = self._reserve  # below 0: calls that wait for their turn
        self._as_of_s = -math.inf
        self._lock = threading.Lock()

    def spend(self, now_s: float) -> bool:
        """Whether another call may be made now; for a request that loses nothing when it may not."""
        with self._lock:
            self._earn(now_s)
            if self._left < 1:
                return False
            self._left -= 1
            return True

    def wait_s(self, now_s: float) -> float:
        """Seconds until the turn of another call, which is made in any case; for a stream, which is never given up.

        Turns are ``calls_per_s`` apart; nobody waits longer than ``wait_max_s``, however many there are.
        """
        with self._lock:
            self._earn(now_s)
            self._left = max(self._least, self._left - 1)
            return max(0.0, -self._left / self._calls_per_s)

    def _earn(self, now_s: float) -> None:
        elapsed_s = max(0.0, now_s - self._as_of_s)
        self._left = min(self._reserve, self._left + elapsed_s * self._calls_per_s)
        self._as_of_s = max(self._as_of_s, now_s)
