"""Who may wait for an endpoint, for how long, and who is sent away with what advice. Pure: decisions as data.

One Admission holds what waits for one model. Its bounds are requests and prompt tokens; a newcomer of higher priority,
or of a tenant that has less waiting, pushes others out where they are reached. Nobody waits in vain: the wait of a
newcomer is estimated as the work ahead of it over the measured rate at which such work leaves, and one that cannot
start in time is told so at once, while it can still go elsewhere.

In time means before its client's deadline, and within ``max_wait_s``. Requests with a negative priority are batch work,
which waits for as long as its client does.

A request whose first token cannot come within the objective any more is late: it stands behind all that can still be
good, whatever their priorities, and before batch work. So an overload costs those who came too late for their turn,
not everybody (Facebook's adaptive LIFO, "Fail at Scale", ACM Queue 13(8), has the same aim); and a burst that nobody
else follows is served to its end.

Continuations of requests that had a replica (``Entry.exempt``) are outside of all bounds.
"""

from __future__ import annotations

import enum
import heapq
import math
from dataclasses import dataclass

from cluster.router.drain_rate import DrainRate
from cluster.router.fair_queue import FairQueue
from cluster.router.served_tokens import ServedTokens, cost
from cluster.router.start_times import StartTimes
from cluster.router.waiting_rank import Entry, Level

# The estimate is noisy, so one that would need more than this share of the time there is counts as too late.
SURE_SHARE = 0.5
LEAST_SHARE = 0.25  # of the objective is left for waiting, however long replicas take for a first token
RETRY_MIN_S = 0.05
RETRY_MAX_S = 10.0
RETRY_UNKNOWN_S = 1.0  # advice before any rate is known
STALE_MAX = 64  # entries kept in the order of due times after they have left


class Refusal(enum.Enum):
    """Why a request does not wait, or waits no longer."""

    QUEUE_FULL = "queue_full"  # the bounds are reached
    WAIT = "wait"  # its turn would come too late, or did not come in time
    DEADLINE = "deadline"  # its client would be gone


@dataclass(frozen=True, slots=True)
class SentAway:
    """``entry`` is not in the queue, or not any more.

    ``wait_s``: the estimate, None where there is none; ``retry_after_s``: when another try may succeed, 0 for who has
    no time for one.
    """

    entry: Entry
    refusal: Refusal
    wait_s: float | None
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """``max_wait_s``: the longest wait of a request with priority >= 0."""

    max_requests: int
    max_prompt_tokens: int
    ttft_objective_s: float
    max_wait_s: float = 30.0


class Admission:
    """One model's queue.

    An entry goes through ``pass_through`` (it never waits) or ``offer``; what waits leaves by ``take``, ``withdraw``,
    ``expire`` or because others push it out. Whatever was taken or passed through may come back in the same ways,
    outside of the bounds: ``exempt`` after a loss, otherwise since its endpoint sent it back. What is ``charged`` in
    the end ends with ``ended``. ``now_s`` never falls.
    """

    def __init__(self, limits: AdmissionLimits) -> None:
        self._limits = limits
        self._served = ServedTokens()
        self._rate = DrainRate()
        self.queue = FairQueue(self._served)
        self._due: list[tuple[float, int, Entry]] = []
        self._starts = StartTimes()
        self._next_turn_s = -math.inf  # when all that was sent away would have had its turn

    @property
    def live(self) -> int:
        """Requests that wait, or run and may come back."""
        return self._served.live

    @property
    def next_due_s(self) -> float:
        """When ``expire`` has something to do, or a moment before; infinity when nothing is due."""
        while self._due and not _is_due(self._due[0]):
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else math.inf

    def pass_through(self, entry: Entry) -> None:
        """``entry`` goes to an endpoint without waiting."""
        if not entry.known:
            self._enter(entry)
        self._charge(entry)

    def offer(self, entry: Entry, now_s: float) -> tuple[SentAway, ...]:
        """``entry`` waits, unless it is among those that are sent away; others may be, in its favour."""
        away: tuple[SentAway, ...] = ()
        newcomer = not entry.known
        if newcomer:
            self._enter(entry)
        if newcomer and not entry.exempt:
            away = self._make_way(entry, now_s)
            if any(one.entry is entry for one in away):
                self._leave(entry)
                return away
        elif not entry.exempt:
            self._sent_back(entry)
        self._wait_until(entry, entry.due_s)
        self.queue.add(entry)
        if self.queue.requests:
            self._rate.waiting(now_s, somebody=True)
        return away

    def take(self, entry: Entry, now_s: float) -> None:
        """A waiting entry goes to an endpoint."""
        self.queue.remove(entry)
        if not entry.exempt:  # continuations wait for other reasons: neither they nor their time measure the queue
            self._rate.left(entry.cost, _urgency(entry.level), now_s)
        self._charge(entry)
        self._after_departure(now_s)

    def withdraw(self, entry: Entry, now_s: float) -> None:
        """Its client, its deadline or somebody else ended a waiting entry."""
        self.queue.remove(entry)
        if not entry.charged:
            self._leave(entry)
        self._after_departure(now_s)

    def expire(self, now_s: float) -> tuple[SentAway, ...]:
        """Those whose time has come while they waited. Others may have become late."""
        away = []
        while self.next_due_s <= now_s:
            _, _, entry = heapq.heappop(self._due)
            if not entry.exempt and now_s < self._last_s(entry):
                self.queue.becomes_late(entry)
                self._wait_until(entry, self._last_s(entry))
                continue
            self.withdraw(entry, now_s)
            away.append(self._away(entry, Refusal.WAIT, now_s))
        return tuple(away)

    def ended(self, entry: Entry, prompt_tokens: int, generated: int, *, complete: bool) -> None:
        """A request that had an endpoint is over: ``prompt_tokens`` were computed for it and so many generated."""
        self._correct(entry, cost(prompt_tokens, generated) - entry.cost)
        if complete:
            self._served.learn(entry.tenant, generated)
        self._leave(entry)

    def first_token_after(self, entry: Entry, seconds: float) -> None:
        """A replica took so long from a submit to a first token."""
        self._starts.took(entry.priority, seconds)

    def wait_s(self, tenant: str, level: Level, now_s: float) -> float | None:
        """How long one more request of ``tenant`` would wait; None while nothing is known."""
        rate = self._rate.per_second(_urgency(level), now_s)
        return None if rate is None else self.queue.cost_ahead(tenant, level) / rate

    def _make_way(self, entry: Entry, now_s: float) -> tuple[SentAway, ...]:
        """Decides about a newcomer, and sends others away in its favour."""
        last_s, due_s = self._last_s(entry), entry.arrived_s + self._patience_s(entry)
        wait_s = self.wait_s(entry.tenant, entry.level, now_s)
        if wait_s is not None and wait_s > SURE_SHARE * (due_s - now_s):
            entry.late, due_s = True, last_s
            wait_s = self.wait_s(entry.tenant, entry.level, now_s)
        if wait_s is not None and wait_s > entry.deadline_s - now_s - self._starts.expected_s(entry.priority):
            return (self._away(entry, Refusal.DEADLINE, now_s),)
        if wait_s is not None and wait_s > last_s - now_s:
            return (self._away(entry, Refusal.WAIT, now_s),)
        pushed_out = self._pushed_out_by(entry)
        if pushed_out is None:
            return (self._away(entry, Refusal.QUEUE_FULL, now_s),)
        for victim in pushed_out:
            self.withdraw(victim, now_s)
        entry.due_s = due_s
        return tuple(self._away(victim, Refusal.QUEUE_FULL, now_s) for victim in pushed_out)

    def _sent_back(self, entry: Entry) -> None:
        """It waits again, and is not charged before it goes to another endpoint."""
        self._correct(entry, -entry.cost)
        entry.charged = False
        last_s = self._last_s(entry)
        entry.due_s = last_s if entry.late else min(entry.due_s, entry.arrived_s + self._patience_s(entry), last_s)

    def _wait_until(self, entry: Entry, due_s: float) -> None:
        entry.due_s = due_s
        if due_s < math.inf:
            heapq.heappush(self._due, (due_s, id(entry), entry))

    def _patience_s(self, entry: Entry) -> float:
        """How long a request may wait from its arrival without being late."""
        if entry.priority < 0:
            return math.inf
        limits = self._limits
        left_s = limits.ttft_objective_s - self._starts.expected_s(entry.priority)
        return min(limits.max_wait_s, max(LEAST_SHARE * limits.ttft_objective_s, left_s))

    def _last_s(self, entry: Entry) -> float:
        """Until when a request may wait."""
        return math.inf if entry.priority < 0 else entry.arrived_s + self._limits.max_wait_s

    def _pushed_out_by(self, entry: Entry) -> tuple[Entry, ...] | None:
        """Who leaves for ``entry``; None when it has to go itself. One that is alone may be larger than the bound."""
        requests = self.queue.requests + 1 - self._limits.max_requests
        tokens = self.queue.prompt_tokens + entry.prompt_tokens - self._limits.max_prompt_tokens
        if requests <= 0 and (tokens <= 0 or not self.queue.requests):
            return ()
        return self.queue.pushed_out_by(entry, requests, min(tokens, self.queue.prompt_tokens))

    def _away(self, entry: Entry, refusal: Refusal, now_s: float) -> SentAway:
        wait_s = self.wait_s(entry.tenant, entry.level, now_s)
        # Whose time is up does not come back: it takes no turn of those that are advised.
        comes_back = refusal is not Refusal.DEADLINE and not entry.exempt
        return SentAway(entry, refusal, wait_s, self._retry_after_s(entry, now_s) if comes_back else 0.0)

    def _retry_after_s(self, entry: Entry, now_s: float) -> float:
        """When another try would be in time, and all that was sent away before has had its turn.

        So those who are sent away together do not come back together, but at the rate at which they can be served.
        """
        again = int(entry.priority >= 0), entry.priority
        wait_s = self.wait_s(entry.tenant, again, now_s)
        rate = self._rate.per_second(entry.priority, now_s)
        if rate is None or wait_s is None:
            return min(RETRY_MAX_S, max(RETRY_UNKNOWN_S, now_s - entry.arrived_s))
        excess_s = max(0.0, wait_s - SURE_SHARE * self._patience_s(entry))
        turn_s = max(self._next_turn_s, now_s + excess_s)
        self._next_turn_s = min(turn_s + entry.cost / rate, now_s + RETRY_MAX_S)
        return min(RETRY_MAX_S, max(RETRY_MIN_S, turn_s - now_s))

    def _enter(self, entry: Entry) -> None:
        entry.cost = self._served.expected_cost(entry.tenant, entry.prompt_tokens, entry.max_tokens)
        self._served.entered(entry.tenant, self.queue.least_counter(entry.level))
        entry.known = True

    def _charge(self, entry: Entry) -> None:
        if not entry.charged:
            entry.charged = True
            self._served.charge(entry.tenant, entry.cost)

    def _correct(self, entry: Entry, tokens: float) -> None:
        self._served.correct(entry.tenant, tokens)
        if tokens < 0:
            self.queue.gained(entry.tenant)

    def _leave(self, entry: Entry) -> None:
        entry.known = entry.charged = False
        self._served.left(entry.tenant)

    def _after_departure(self, now_s: float) -> None:
        if not self.queue.requests:
            self._rate.waiting(now_s, somebody=False)
        if len(self._due) > STALE_MAX + 2 * len(self.queue):
            self._due = [due for due in self._due if _is_due(due)]
            heapq.heapify(self._due)


def _urgency(level: Level) -> int:
    """The priority as which a level's departures are counted: what is late leaves as batch work does."""
    in_time, priority = level
    return priority if in_time else -1


def _is_due(due: tuple[float, int, Entry]) -> bool:
    """Whether an item of the order of due times still stands for a waiting entry."""
    return due[2].queued and due[2].due_s == due[0]
