"""The endpoints of one model and checkpoint that take new work, for as long as none comes, goes or changes."""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Protocol

from cluster.domain.ids import Incarnation, ReplicaId
from cluster.router.endpoint_table import Candidate
from cluster.router.policy.prompt_blocks import key_of

PROBES = 21  # of one key on the ring: the fullest member then gets about 1.05 times its share (cited below)
_MASK = 2**64 - 1


class Member(Protocol):
    """One endpoint, asked for what it is at this moment."""

    @property
    def incarnation(self) -> Incarnation: ...

    @property
    def has_room(self) -> bool:
        """The candidate's own field, without building the candidate."""
        ...

    def candidate(self, cached_tokens: int = 0, *, has_room: bool, at_home: bool = False) -> Candidate: ...


class Ring:
    """Consistent hashing with one point per member and several probes per key.

    Multi-probe consistent hashing (Appleton and O'Reilly 2015): a key goes to the member whose point follows one of
    the key's probes most closely. Members that come or go move only the keys that they win or lose.
    """

    def __init__(self, names: Sequence[str]) -> None:
        points = [_point(name) for name in names]
        self._positions = sorted(range(len(points)), key=points.__getitem__)
        self._points = [points[position] for position in self._positions]

    def home(self, key: int) -> int | None:
        """The first of ``walk``; None where there is nobody."""
        points, nearest, taken = self._points, _MASK + 1, 0
        for probe in range(PROBES) if points else ():
            place = _mixed(key + probe)
            index = bisect.bisect_left(points, place) % len(points)
            distance = (points[index] - place) & _MASK
            if distance < nearest:
                nearest, taken = distance, index
        return self._positions[taken] if points else None

    def walk(self, key: int) -> Iterator[int]:
        """Every position, the key's home first: those its probes met, the nearest first, then all others."""
        count = len(self._points)
        if not count:
            return
        met: dict[int, int] = {}
        for probe in range(PROBES):
            place = _mixed(key + probe)
            index = bisect.bisect_left(self._points, place) % count
            distance = (self._points[index] - place) & _MASK
            met[index] = min(distance, met.get(index, distance))
        nearest = sorted(met, key=met.__getitem__)
        yield from (self._positions[index] for index in nearest)
        for step in range(1, count):
            index = (nearest[0] + step) % count
            if index not in met:
                yield self._positions[index]


class Group:
    """``members`` in the table's order, which is the same for every router. Immutable."""

    def __init__(self, members: Sequence[Member] = (), block_size: int = 0) -> None:
        self.members = tuple(members)
        self.block_size = block_size

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def positions(self) -> dict[Incarnation, int]:
        return {member.incarnation: position for position, member in enumerate(self.members)}

    @cached_property
    def ring(self) -> Ring:
        """By slot, not by incarnation: a replica that was built anew keeps its keys."""
        return Ring([_name(member.incarnation.replica) for member in self.members])

    def shuffled(self, rng: random.Random) -> Iterator[int]:
        """Every position once, all orders alike; each is drawn when it is asked for (Fisher and Yates, swaps kept)."""
        count, swapped = len(self.members), dict[int, int]()
        for step in range(count):
            drawn = step + int(rng.random() * (count - step))
            yield swapped.get(drawn, drawn)
            swapped[drawn] = swapped.pop(step, step)


@lru_cache(maxsize=16_384)
def _name(replica: ReplicaId) -> str:
    return str(replica)


@lru_cache(maxsize=16_384)
def _point(name: str) -> int:
    return key_of(name.encode())


def _mixed(value: int) -> int:
    """A bijection of 64 bits that spreads neighbours all over (splitmix64, Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
