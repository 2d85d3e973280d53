"""Who of the waiting requests is next: continuations, then levels, then tenants by service, then arrival. Pure.

A level is a priority, apart for what is late: that stands behind all that is not, and before batch work. Between
tenants of one level the one with the lowest virtual token counter is next (``served_tokens``), so a tenant
that sends 50 times as much gets no more than its share while others wait, and all there is when nobody does. Within a
tenant arrival counts. Whoever begins to wait is lifted to the counters of those who wait already.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterator

from cluster.router.served_tokens import ServedTokens
from cluster.router.waiting_rank import Entry, Level, WaitingRank

PUSHED_OUT_MAX = 8  # waiting requests of its own level that make room for one newcomer


class FairQueue:
    """Entries in the order of this module; ``requests`` and ``prompt_tokens`` are those that bounds count.

    Nothing takes longer than O(log waiting), amortised, but for what goes over the distinct levels that wait.
    """

    def __init__(self, served: ServedTokens) -> None:
        self._served = served
        self._exempt: dict[int, Entry] = {}
        self._exempt_in_order = True  # as long as they came so: put in order when somebody looks
        self._ranks: dict[Level, WaitingRank] = {}
        self._levels: list[Level] = []  # rising
        self._tenants: dict[str, int] = {}  # requests that wait on any level
        self._numbers = 0
        self.requests = 0
        self.prompt_tokens = 0

    def __len__(self) -> int:
        return self.requests + len(self._exempt)

    def __iter__(self) -> Iterator[Entry]:
        """All, continuations first; else in no promised order."""
        yield from self._exempt.values()
        for rank in self._ranks.values():
            yield from rank

    @property
    def continuations(self) -> int:
        """How many of those that wait are ``exempt``."""
        return len(self._exempt)

    @property
    def exempt(self) -> tuple[Entry, ...]:
        """The continuations, oldest first. O(n log n) for n of them."""
        if not self._exempt_in_order:
            self._exempt, self._exempt_in_order = dict(sorted(self._exempt.items())), True
        return tuple(self._exempt.values())

    def head(self) -> Entry | None:
        """Who is next of those that are not exempt."""
        return self._ranks[self._levels[-1]].head(self._served.counter) if self._levels else None

    def add(self, entry: Entry) -> None:
        """Takes ``entry`` in; one that was in before keeps its place before those that came later."""
        assert not entry.queued, "a request waits twice"
        entry.queued = True
        if entry.number < 0:
            entry.number, self._numbers = self._numbers, self._numbers + 1
        if entry.exempt:
            self._exempt_in_order &= not self._exempt or next(reversed(self._exempt)) < entry.number
            self._exempt[entry.number] = entry
            return
        if entry.tenant not in self._tenants:
            self._served.lift(entry.tenant, self.least_counter(entry.level))
        self._tenants[entry.tenant] = self._tenants.get(entry.tenant, 0) + 1
        self._rank(entry.level).add(entry, self._served.counter(entry.tenant))
        self.requests += 1
        self.prompt_tokens += entry.prompt_tokens

    def remove(self, entry: Entry) -> None:
        assert entry.queued, "a request leaves twice"
        entry.queued = False
        if entry.exempt:
            del self._exempt[entry.number]
            return
        self._leave_rank(entry)
        self.requests -= 1
        self.prompt_tokens -= entry.prompt_tokens
        self._tenants[entry.tenant] -= 1
        if not self._tenants[entry.tenant]:
            del self._tenants[entry.tenant]

    def becomes_late(self, entry: Entry) -> None:
        """It goes on behind those who were late before; its tenant's account is as it was."""
        assert entry.queued, "only who waits becomes late"
        assert not entry.exempt, "what goes on after a loss is never late"
        self._leave_rank(entry)
        entry.late, entry.number = True, self._numbers
        self._numbers += 1
        self._rank(entry.level).add(entry, self._served.counter(entry.tenant))

    def least_counter(self, level: Level) -> float:
        """Where a tenant that begins to wait there is put: beside the last of those who wait on that level.

        Where nobody does, on any; where nobody waits at all, beside the tenant that was served last.
        """
        if not self._ranks:
            return self._served.floor
        rank = self._ranks.get(level)
        ranks = self._ranks.values() if rank is None else (rank,)
        return min(one.least_counter(self._served) for one in ranks)

    def gained(self, tenant: str) -> None:
        """The counter of ``tenant`` has become less: its turn may come sooner."""
        counter = self._served.counter(tenant)
        for rank in self._ranks.values():
            rank.gained(tenant, counter)

    def cost_ahead(self, tenant: str, level: Level) -> float:
        """Virtual tokens that are served before one more request of ``tenant``, if nobody else comes; no continuations.

        All of higher levels and of its own; of each other tenant what that is given until the counters are equal.
        """
        ahead = sum(self._ranks[other].cost for other in self._levels if other > level)
        rank = self._ranks.get(level)
        return ahead if rank is None else ahead + rank.cost_ahead(tenant, self._served)

    def pushed_out_by(self, entry: Entry, requests: int, prompt_tokens: int) -> tuple[Entry, ...] | None:
        """Who has to leave so that ``requests`` and ``prompt_tokens`` less wait; None when ``entry`` may not ask that.

        Lowest level first, and there the youngest of the tenant that has the most waiting: of lower levels as many as
        it takes, within the newcomer's own level a few, and only of tenants that keep at least as many as its own would
        have. O(log waiting) for each of them.
        """
        chosen: list[Entry] = []
        for level in self._levels:
            if level > entry.level:
                break
            rank = self._ranks[level]
            among_equals = level == entry.level
            keep, most = (rank.waiting(entry.tenant) + 1, PUSHED_OUT_MAX) if among_equals else (0, self.requests)
            for victim in rank.youngest_of_longest(keep, most):
                chosen.append(victim)
                requests -= 1
                prompt_tokens -= victim.prompt_tokens
                if requests <= 0 and prompt_tokens <= 0:
                    return tuple(chosen)
        return None

    def _rank(self, level: Level) -> WaitingRank:
        rank = self._ranks.get(level)
        if rank is None:
            rank = self._ranks[level] = WaitingRank()
            insort(self._levels, level)
        return rank

    def _leave_rank(self, entry: Entry) -> None:
        rank = self._ranks[entry.level]
        rank.remove(entry)
        if not rank:
            del self._ranks[entry.level]
            self._levels.remove(entry.level)

    def check(self) -> None:
        """Every invariant, for tests."""
        entries = [entry for rank in self._ranks.values() for entry in rank]
        assert self.requests == len(entries), "requests are miscounted"
        assert self.prompt_tokens == sum(e.prompt_tokens for e in entries), "prompt tokens are miscounted"
        assert all(e.queued for e in self), "an entry does not know that it waits"
        assert self._tenants == Counter(e.tenant for e in entries), "tenants are miscounted"
        assert self._levels == sorted(self._ranks), "the levels are out of order"
        for rank in self._ranks.values():
            assert rank, "a level without anybody is kept"
            rank.check(self._served)
