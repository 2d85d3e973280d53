"""Who holds how much of one prompt: what a look-up in the prefix index answers. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import compress, islice
from typing import Protocol

from cluster.domain.ids import Incarnation

_ASCII_TO_BITS = bytes(int(code == ord("1")) for code in range(256))


class Numbered(Protocol):
    """An endpoint by its number in the index: ``bit`` is 1 shifted left so often."""

    @property
    def bit(self) -> int: ...


class Holders(Mapping[Incarnation, int]):
    """How many leading blocks of a prompt each endpoint holds, for those that hold the first; the longest come first.

    Nothing is listed before it is asked for: thousands of endpoints may share a system prompt. ``longest`` costs only
    what it returns, ``get`` one look-up. Valid until the index changes: use it at once.
    """

    __slots__ = ("_incarnations", "_levels", "_numbers")

    def __init__(
        self,
        levels: Sequence[tuple[int, int]],
        incarnations: Sequence[Incarnation | None],
        numbers: Mapping[Incarnation, Numbered],
    ) -> None:
        self._levels, self._incarnations, self._numbers = levels, incarnations, numbers

    def __getitem__(self, incarnation: Incarnation) -> int:
        depth = self.get(incarnation, 0)
        if not depth:
            raise KeyError(incarnation)
        return depth

    def get(self, incarnation: Incarnation, default: int = 0) -> int:  # type: ignore[override]
        who = self._numbers.get(incarnation)
        if who is not None:
            for depth, mask in self._levels:
                if mask & who.bit:
                    return depth
        return default

    def __iter__(self) -> Iterator[Incarnation]:
        for _, mask in self._levels:
            yield from self._listed(mask)

    def __len__(self) -> int:
        return sum(mask.bit_count() for _, mask in self._levels)

    @property
    def depth(self) -> int:
        """The most leading blocks that any endpoint holds; 0 when nobody holds the first."""
        return self._levels[0][0] if self._levels else 0

    def longest(self, limit: int, start: int = 0) -> list[tuple[Incarnation, int]]:
        """At most ``limit`` endpoints with their blocks, most blocks first.

        Among those with equally many it begins at number ``start`` modulo the numbers in use and goes round, so that
        random starts treat all alike.
        """
        start %= len(self._incarnations) or 1
        return list(islice(self._from(start), limit))

    def _from(self, start: int) -> Iterator[tuple[Incarnation, int]]:
        for depth, mask in self._levels:
            high = mask >> start << start
            for part in (high, mask ^ high):
                left = part
                while left:
                    lowest = left & -left
                    left ^= lowest
                    incarnation = self._incarnations[lowest.bit_length() - 1]
                    assert incarnation is not None, "a dead endpoint holds something"
                    yield incarnation, depth

    def _listed(self, mask: int) -> Iterator[Incarnation]:
        flags = f"{mask:b}"[::-1].encode().translate(_ASCII_TO_BITS)
        for incarnation in compress(self._incarnations, flags):
            assert incarnation is not None, "a dead endpoint holds something"
            yield incarnation
