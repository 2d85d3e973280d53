"""What waits on one level: a line for each tenant, and whose turn it is among them. Pure.

Two heaps answer who is next and who has the most waiting. Their items may be out of date in one direction only, towards
the top: when such an item comes up it is put where it belongs now.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, takewhile

from cluster.router.served_tokens import ServedTokens

LINES_ASKED = 64  # for an estimate; of more tenants these stand for all
STALE_MAX = 64  # items of a heap beside two for each line
Level = tuple[int, int]  # whether it is in time, and its priority


@dataclass(slots=True, eq=False)
class Entry:
    """One request that may wait. Times are a clock's seconds.

    ``deadline_s``: its client's. ``due_s``: by when it has to be placed, or becomes late; ``admission`` sets it.
    ``late``: its first token cannot be good any more, so it stands behind all that can. ``exempt``: it goes on after a
    loss, before all others and outside of every bound. ``cost``: virtual tokens it is charged with.
    """

    tenant: str
    priority: int
    prompt_tokens: int
    max_tokens: int
    arrived_s: float
    deadline_s: float = math.inf
    exempt: bool = False
    due_s: float = math.inf
    cost: float = 0.0
    number: int = -1  # in order of arrival
    queued: bool = False
    known: bool = False  # its tenant's account counts it
    charged: bool = False
    late: bool = False

    @property
    def level(self) -> Level:
        """Higher goes first: what can still be good by priority, then what is late or has a negative priority."""
        return int(self.priority >= 0 and not self.late), self.priority


@dataclass(slots=True)
class _Line:
    """What one tenant has waiting, oldest first."""

    entries: OrderedDict[int, Entry] = field(default_factory=OrderedDict)
    cost: float = 0.0

    @property
    def first(self) -> Entry:
        return next(iter(self.entries.values()))


class WaitingRank:
    """The lines of one level. ``cost``: virtual tokens of all of them."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._turns: list[tuple[float, int, str]] = []  # counter, number of the oldest, tenant
        self._lengths: list[tuple[int, str]] = []  # requests, negative, and tenant
        self.cost = 0.0

    def __bool__(self) -> bool:
        return bool(self._lines)

    def __contains__(self, tenant: str) -> bool:
        return tenant in self._lines

    def __iter__(self) -> Iterator[Entry]:
        for line in self._lines.values():
            yield from line.entries.values()

    def waiting(self, tenant: str) -> int:
        """How many requests of ``tenant`` wait here."""
        return len(self._lines[tenant].entries) if tenant in self._lines else 0

    def add(self, entry: Entry, counter: float) -> None:
        line = self._lines.setdefault(entry.tenant, _Line())
        insert(line.entries, entry)
        line.cost += entry.cost
        self.cost += entry.cost
        heapq.heappush(self._lengths, (-len(line.entries), entry.tenant))
        if line.first is entry:
            heapq.heappush(self._turns, (counter, entry.number, entry.tenant))
        self._tidy()

    def remove(self, entry: Entry) -> None:
        line = self._lines[entry.tenant]
        del line.entries[entry.number]
        line.cost -= entry.cost
        self.cost -= entry.cost
        if not line.entries:
            del self._lines[entry.tenant]

    def gained(self, tenant: str, counter: float) -> None:
        """The counter of ``tenant`` has become less."""
        line = self._lines.get(tenant)
        if line is not None:
            heapq.heappush(self._turns, (counter, line.first.number, tenant))
            self._tidy()

    def head(self, counter: Callable[[str], float]) -> Entry:
        """The oldest of the tenant with the lowest counter; of equal ones the oldest of all. There is somebody."""
        while True:
            known = self._turns[0]
            tenant = known[2]
            line = self._lines.get(tenant)
            if line is None:
                heapq.heappop(self._turns)
                continue
            first = line.first
            now = counter(tenant), first.number, tenant
            if now == known:
                return first
            heapq.heapreplace(self._turns, now)

    def least_counter(self, served: ServedTokens) -> float:
        """Of those who wait here. There is somebody."""
        return served.counter(self.head(served.counter).tenant)

    def cost_ahead(self, tenant: str, served: ServedTokens) -> float:
        """Virtual tokens of this level that are served before one more request of ``tenant``."""
        own = self._lines.get(tenant)
        turn = served.counter(tenant)
        if own is None and self._lines:
            turn = max(turn, self.least_counter(served))
        own_cost = 0.0 if own is None else own.cost
        turn += own_cost
        asked, ahead = 0, 0.0
        for other, line in islice(self._lines.items(), LINES_ASKED):
            if line is own:
                continue
            asked += 1
            lead = turn - served.counter(other)
            if lead >= 0:
                ahead += min(line.cost, lead + line.first.cost)
        others = len(self._lines) - (own is not None)
        return own_cost + (min(ahead * others / asked, self.cost) if asked else 0.0)

    def youngest_of_longest(self, keep: int, most: int) -> Iterator[Entry]:
        """At most so many, each of whoever has the most left by then; nobody is left with fewer than ``keep``."""
        left: dict[str, int] = {}
        youngest: dict[str, Iterator[Entry]] = {}
        try:
            for _ in range(most):
                tenant = self._longest(left)
                if tenant is None or left.get(tenant, self.waiting(tenant)) <= keep:
                    return
                entries = youngest.setdefault(tenant, reversed(self._lines[tenant].entries.values()))
                left[tenant] = left.get(tenant, self.waiting(tenant)) - 1
                yield next(entries)
        finally:
            for tenant in left:
                heapq.heappush(self._lengths, (-self.waiting(tenant), tenant))
            self._tidy()

    def _longest(self, left: dict[str, int]) -> str | None:
        """Who has the most waiting, as far as ``left`` says nothing else."""
        while self._lengths:
            known, tenant = self._lengths[0]
            now = left.get(tenant, self.waiting(tenant))
            if not now:
                heapq.heappop(self._lengths)
            elif now == -known:
                return tenant
            else:
                heapq.heapreplace(self._lengths, (-now, tenant))
        return None

    def _tidy(self) -> None:
        """Forgets items that stand for nothing, once there are many."""
        limit = STALE_MAX + 2 * len(self._lines)
        if len(self._turns) > limit:
            lowest: dict[str, tuple[float, int, str]] = {}
            for item in self._turns:
                if item[2] in self._lines:
                    lowest[item[2]] = min(item, lowest.get(item[2], item))
            self._turns = list(lowest.values())
            heapq.heapify(self._turns)
        if len(self._lengths) > limit:
            self._lengths = [(-len(line.entries), tenant) for tenant, line in self._lines.items()]
            heapq.heapify(self._lengths)

    def check(self, served: ServedTokens) -> None:
        """Every invariant, for tests."""
        for tenant, line in self._lines.items():
            assert line.entries, "a tenant without anybody is kept"
            assert list(line.entries) == sorted(line.entries), "somebody was overtaken within its tenant"
            assert math.isclose(line.cost, sum(e.cost for e in line.entries.values()), abs_tol=1e-6)
            now = served.counter(tenant), line.first.number, tenant
            assert any(item <= now for item in self._turns if item[2] == tenant), "a turn would come too late"
            assert any(-n >= len(line.entries) for n, t in self._lengths if t == tenant), "a long line is overlooked"
        assert math.isclose(self.cost, sum(line.cost for line in self._lines.values()), abs_tol=1e-6)
        assert max(len(self._turns), len(self._lengths)) <= STALE_MAX + 1 + 2 * max(1, len(self._lines)) + 64


def insert(entries: OrderedDict[int, Entry], entry: Entry) -> None:
    """By arrival. Who comes back was at the front, so there are few before it."""
    last = next(reversed(entries), -1)
    entries[entry.number] = entry
    if last > entry.number:
        for number in (entry.number, *reversed(list(takewhile(lambda n: n < entry.number, entries)))):
            entries.move_to_end(number, last=False)
