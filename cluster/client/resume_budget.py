"""How many calls in vain one client may make: when every router is away, its streams must not storm them. Pure."""

from __future__ import annotations

RESERVE = 100
REQUESTS_PER_CALL = 5


class ResumeBudget:
    """Calls that brought nothing, over all requests of a client: one for every five of them, beyond ``reserve``.

    A call after one that brought tokens is free: every stream may go on once when its router dies.
    """

    def __init__(self, reserve: int = RESERVE) -> None:
        self._most = self._left = reserve * REQUESTS_PER_CALL

    def began(self) -> None:
        """A request was made."""
        self._left = min(self._most, self._left + 1)

    def spend(self) -> bool:
        """Whether there may be another call after one in vain."""
        if self._left < REQUESTS_PER_CALL:
            return False
        self._left -= REQUESTS_PER_CALL
        return True
