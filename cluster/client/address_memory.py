"""Which addresses were away a moment ago: what one request has found out spares the others the try. Pure."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from cluster.domain.errors import RejectReason

AWAY_S = 5.0
FORGET_S = 60.0  # after that long nobody cares; addresses of pods come and go
_AWAY_REASONS = ("", RejectReason.DRAINING.value)  # nobody of ours has answered, or one that leaves


class AddressMemory:
    """What the calls of all clients of a process have met; threads may share it.

    Addresses are preferred in the order that they are named in. One that was away is left out for ``away_s``; then one
    request tries it again, and the others wait another ``away_s`` for what comes of it.
    """

    def __init__(self, away_s: float = AWAY_S) -> None:
        self._away_s = away_s
        self._away_until_s: dict[str, float] = {}
        self._lock = threading.Lock()

    def pick(self, addresses: Sequence[str], now_s: float) -> str:
        """The address to ask now: the first that is not away, or else the one that was asked the longest ago."""

        def away_until_s(address: str) -> float:
            until_s = self._away_until_s.get(address, now_s)
            return until_s if until_s > now_s else 0.0

        with self._lock:
            picked = min(addresses, key=away_until_s)
            if picked in self._away_until_s:  # this call is the one that tries it
                self._away_until_s[picked] = now_s + self._away_s
        return picked

    def answered(self, address: str) -> None:
        if address in self._away_until_s:
            with self._lock:
                self._away_until_s.pop(address, None)

    def failed(self, address: str, code: str, reason: str, now_s: float) -> None:
        """A call ended with the status ``code`` and the router's ``reason``, "" where no router has given one.

        A router that refuses a request is there; one that is draining is as good as away.
        """
        if code == "UNAVAILABLE" and reason in _AWAY_REASONS:
            with self._lock:
                kept = {other: until_s for other, until_s in self._away_until_s.items() if until_s > now_s - FORGET_S}
                self._away_until_s = kept | {address: now_s + self._away_s}
        elif reason:
            self.answered(address)


PROCESS_MEMORY = AddressMemory()
