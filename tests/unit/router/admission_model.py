"""A model of a router and its replicas in virtual time: the production decisions, no sockets, no clock."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from cluster.router.admission import Admission, AdmissionLimits, SentAway
from cluster.router.endpoint_table import LiveLoad
from cluster.router.waiting_rank import Entry

LIMITS = AdmissionLimits(max_requests=1024, max_prompt_tokens=1_048_576, ttft_objective_s=2.0)


@dataclass(eq=False)
class Arrival:
    """One request of a workload, and what became of it."""

    at_s: float
    prompt_tokens: int
    tokens: int
    tenant: str = ""
    priority: int = 0
    first_token_s: float | None = None
    ended_s: float | None = None
    away: SentAway | None = None
    entry: Entry = field(init=False)

    def __post_init__(self) -> None:
        self.entry = Entry(self.tenant, self.priority, self.prompt_tokens, 4 * self.tokens, self.at_s)

    def good(self, objective_s: float) -> bool:
        return self.first_token_s is not None and self.first_token_s - self.at_s <= objective_s


class Replica:
    """``slots`` sequences at once, a token of each in every ``step_s``; others wait, first come first served."""

    def __init__(self, slots: int, step_s: float) -> None:
        self.slots, self.step_s = slots, step_s
        self.running = 0
        self.waiting: deque[tuple[Arrival, float]] = deque()
        self.load = LiveLoad(16)
        self.load.max_num_seqs = slots


class Model:
    """Runs a workload to its end."""

    def __init__(
        self, replicas: int = 4, slots: int = 16, step_s: float = 0.03, limits: AdmissionLimits = LIMITS
    ) -> None:
        self.admission = Admission(limits)
        self.replicas = [Replica(slots, step_s) for _ in range(replicas)]
        self.now_s = 0.0
        self.most_waiting = 0
        self.arrivals: list[Arrival] = []
        self._by_entry: dict[Entry, Arrival] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def run(self, arrivals: Iterable[Arrival]) -> None:
        self.arrivals = sorted(arrivals, key=lambda a: a.at_s)
        for arrival in self.arrivals:
            self._at(arrival.at_s, lambda arrival=arrival: self._arrive(arrival))
        while self._events:
            self.now_s, _, event = heapq.heappop(self._events)
            event()
            self._look()
        assert not self.admission.queue
        left = [a for a in self.arrivals if (a.ended_s is None) == (a.away is None)]
        assert not left, f"{len(left)} requests did not end in exactly one way"

    def _at(self, at_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), event))

    def _arrive(self, arrival: Arrival) -> None:
        self._by_entry[arrival.entry] = arrival
        replica = None if self.admission.queue else self._room()
        if replica is not None:
            self.admission.pass_through(arrival.entry)
            self._send(arrival, replica)
            return
        for away in self.admission.offer(arrival.entry, self.now_s):
            self._by_entry.pop(away.entry).away = away
        self.most_waiting = max(self.most_waiting, len(self.admission.queue))
        if arrival.entry.queued:
            for at_s in (arrival.entry.due_s, self.now_s + LIMITS.max_wait_s):
                self._at(min(at_s, self.now_s + 1e6), lambda: None)

    def _look(self) -> None:
        for away in self.admission.expire(self.now_s):
            self._by_entry.pop(away.entry).away = away
        while (head := self.admission.queue.head()) is not None and (replica := self._room()) is not None:
            self.admission.take(head, self.now_s)
            self._send(self._by_entry[head], replica)

    def _room(self) -> Replica | None:
        free = [replica for replica in self.replicas if replica.load.has_room]
        return min(free, key=lambda r: r.load.tokens) if free else None

    def _send(self, arrival: Arrival, replica: Replica) -> None:
        replica.load.sent(arrival.prompt_tokens)
        if replica.running < replica.slots:
            self._start(arrival, replica, self.now_s)
        else:
            replica.waiting.append((arrival, self.now_s))

    def _start(self, arrival: Arrival, replica: Replica, sent_s: float) -> None:
        replica.running += 1

        def first() -> None:
            arrival.first_token_s = self.now_s
            self.admission.first_token_after(arrival.entry, self.now_s - sent_s)

        self._at(self.now_s + replica.step_s, first)
        self._at(self.now_s + arrival.tokens * replica.step_s, lambda: self._end(arrival, replica))

    def _end(self, arrival: Arrival, replica: Replica) -> None:
        arrival.ended_s = self.now_s
        replica.running -= 1
        replica.load.ended(arrival.prompt_tokens)
        self.admission.ended(
            self._by_entry.pop(arrival.entry).entry, arrival.prompt_tokens, arrival.tokens, complete=True
        )
        if replica.waiting:
            self._start(*self._next(replica))

    def _next(self, replica: Replica) -> tuple[Arrival, Replica, float]:
        """Replicas have priorities too."""
        first = max(replica.waiting, key=lambda one: one[0].priority)
        replica.waiting.remove(first)
        return first[0], replica, first[1]

    # ---- what came of it

    def goodput(self, begin_s: float, end_s: float, objective_s: float = LIMITS.ttft_objective_s) -> float:
        """Good requests that ended in this time, per second."""
        ended = [a for a in self.arrivals if a.ended_s is not None and begin_s <= a.ended_s < end_s]
        return sum(a.good(objective_s) for a in ended) / (end_s - begin_s)

    def share(self, attribute: str, value: object) -> float:
        """Of the high, or otherwise chosen, requests those in their objective."""
        chosen = [a for a in self.arrivals if getattr(a, attribute) == value]
        return sum(a.good(LIMITS.ttft_objective_s) for a in chosen) / len(chosen)

    def tokens_of(self, begin_s: float, end_s: float) -> Counter[str]:
        """Virtual tokens of what ended in this time, by tenant."""
        totals: Counter[str] = Counter()
        for a in self.arrivals:
            if a.ended_s is not None and begin_s <= a.ended_s < end_s:
                totals[a.tenant] += a.prompt_tokens + 2 * a.tokens
        return totals


def poisson(
    rng: random.Random,
    per_second: float,
    begin_s: float,
    end_s: float,
    *,
    tenant: str = "",
    priority: Callable[[random.Random], int] = lambda _: 0,
    mean_tokens: int = 40,
) -> list[Arrival]:
    """Open-loop arrivals with prompts and answers of varying length."""
    arrivals, at_s = [], begin_s
    while (at_s := at_s + rng.expovariate(per_second)) < end_s:
        tokens = max(1, min(8 * mean_tokens, round(rng.lognormvariate(-0.125, 0.5) * mean_tokens)))
        arrivals.append(Arrival(at_s, rng.randint(10, 500), tokens, tenant, priority(rng)))
    return arrivals
