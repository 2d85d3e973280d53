"""Rendezvous ports, handed out in order: a port comes back only when the whole range has been used."""

from __future__ import annotations

from dataclasses import dataclass

# Offered beside those that are needed, for ports that somebody else listens on.
SPARE = 6


@dataclass(frozen=True, slots=True)
class PortRange:
    """Ports ``first`` to ``last``; ``cursor`` counts those handed out so far, over all times."""

    first: int
    last: int
    cursor: int = 0

    def __post_init__(self) -> None:
        assert 0 < self.first <= self.last <= 65535, (self.first, self.last)
        assert self.cursor >= 0, self.cursor

    def take(self, count: int) -> tuple[tuple[int, ...], PortRange]:
        """The next ``count`` ports (all there are, in a smaller range) and the range after them."""
        size = self.last - self.first + 1
        count = min(count, size)
        ports = tuple(self.first + (self.cursor + i) % size for i in range(count))
        return ports, PortRange(self.first, self.last, self.cursor + count)
