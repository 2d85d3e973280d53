"""The routing simulation: production profiles, selector, index and load accounts over simulated replicas. Pure.

Time is virtual. What routers know is late, as it is with real engines: blocks are announced ``news_s`` after they
changed; loads come with the tokens of a router's own sequences, step by step, every ``beat_s``, and otherwise when
sequences came, went or were computed, but not more often than ``load_pause_s`` allows. What a router cannot place
waits in it, first come first served, as requests without priorities would.
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.domain.endpoint import LoadSnapshot
from cluster.domain.ids import Incarnation
from cluster.engine.load_news import LoadNews
from cluster.engine.sessions import TELL_LOADS_S
from cluster.router.endpoint_table import Candidate, LiveLoad, Standing
from cluster.router.fleet import LOAD_MESSAGES_PER_S
from cluster.router.policy.contracts import Demand, Profile
from cluster.router.policy.group import Group
from cluster.router.policy.selector import Selector
from cluster.router.prefix_index import PrefixIndex
from ops.bench.routing.replica import Hardware, Job, SimulatedReplica
from ops.bench.routing.traces import BLOCK_SIZE, Conversation, Trace, Turn

DIGEST = "sha256:a"


@dataclass(frozen=True)
class Site:
    """What is simulated; the same for all choosers that are compared."""

    replicas: int = 8
    routers: int = 1
    hardware: Hardware = field(default_factory=Hardware)
    news_s: float = 0.1
    wire_s: float = 0.001
    beat_s: float = 0.5
    load_pause_s: float | None = 8 / LOAD_MESSAGES_PER_S  # as a router of eight asks for it; None: no news but beats


@dataclass(frozen=True)
class Report:
    """What came of a trace. ``hit_rate``: of all prompt tokens, those that were not computed."""

    hit_rate: float
    ttft_p50_s: float
    ttft_p99_s: float
    ttft_mean_s: float
    imbalance: float  # tokens computed by the busiest replica, over the mean
    requests: int


class Seat:
    """One replica as one router sees it; its standing is not judged but set."""

    standing = Standing.HEALTHY

    def __init__(self, replica: SimulatedReplica) -> None:
        self.replica = replica
        self.incarnation: Incarnation = replica.endpoint.incarnation
        self.load = LiveLoad(BLOCK_SIZE)
        self.load.max_num_seqs = replica.hardware.max_num_seqs

    @property
    def has_room(self) -> bool:
        return self.load.has_room

    def candidate(self, cached_tokens: int = 0, *, has_room: bool, at_home: bool = False) -> Candidate:
        load = self.load
        return Candidate(
            self.replica.endpoint,
            session_up=True,
            tokens=load.tokens,
            cached_tokens=cached_tokens,
            has_room=has_room,
            standing=self.standing,
            queued_tokens=load.queued_tokens,
            at_home=at_home,
        )


class Router:
    """One router; ``choose`` gives the seat of a turn, None when nobody has room."""

    def __init__(self, replicas: Sequence[SimulatedReplica]) -> None:
        self.seats = {replica.endpoint.incarnation: Seat(replica) for replica in replicas}
        self.waiting: deque[tuple[Conversation, int, float]] = deque()

    def choose(self, conversation: Conversation, turn: Turn, now_s: float) -> tuple[Seat, int] | None:
        raise NotImplementedError

    def heard(self, replica: SimulatedReplica, news: object) -> None:
        """Blocks came and went."""


class ProfileRouter(Router):
    """The production choice."""

    def __init__(self, replicas: Sequence[SimulatedReplica], profile: Profile, rng: random.Random) -> None:
        super().__init__(replicas)
        self.index = PrefixIndex()
        self._selector = Selector(profile, rng)
        self._group = Group(tuple(self.seats.values()), BLOCK_SIZE)

    def choose(self, conversation: Conversation, turn: Turn, now_s: float) -> tuple[Seat, int] | None:
        demand = Demand(
            "demo",
            DIGEST,
            needs_room=True,
            prompt_tokens=len(turn.prompt),
            blocks=turn.blocks,
            session_key=conversation.name if len(conversation.turns) > 1 else "",
        )
        names = turn.blocks.leading(BLOCK_SIZE)
        choice = self._selector.choose(self._group, demand, self.index.holders(names))
        if choice is None:
            return None
        incarnation = choice.candidate.endpoint.incarnation
        self.index.expect(incarnation, names, now_s)
        return self.seats[incarnation], choice.candidate.cached_tokens

    def heard(self, replica: SimulatedReplica, news: object) -> None:
        assert self.index.apply(replica.endpoint.incarnation, news)  # type: ignore[arg-type]


class RandomRouter(Router):
    """Anybody with room."""

    def __init__(self, replicas: Sequence[SimulatedReplica], rng: random.Random) -> None:
        super().__init__(replicas)
        self._rng = rng

    def choose(self, _conversation: Conversation, _turn: Turn, _now_s: float) -> tuple[Seat, int] | None:
        free = [seat for seat in self.seats.values() if seat.has_room]
        return (self._rng.choice(free), 0) if free else None


class GreedyRouter(Router):
    """Whoever holds most of the prompt, whatever waits there; of equals the one with the fewest tokens waiting.

    It knows true caches and loads at this very moment, blocks still to be computed included, and has the same bound of
    load as everybody: what affinity alone comes to.
    """

    def choose(self, _conversation: Conversation, turn: Turn, now_s: float) -> tuple[Seat, int] | None:
        free = [seat for seat in self.seats.values() if seat.has_room]
        if not free:
            return None
        names = turn.blocks.leading(BLOCK_SIZE)

        def rank(seat: Seat) -> tuple[int, int, int]:
            load = seat.replica.load(now_s)
            return -seat.replica.leading_hits_soon(names), load.queued_prompt_tokens, load.kv_blocks_used

        best = min(free, key=rank)
        return best, names.cached_tokens(best.replica.leading_hits_soon(names))


MakeRouter = Callable[[Sequence[SimulatedReplica], int], Router]


def of_profile(profile: Profile, seed: int) -> MakeRouter:
    return lambda replicas, number: ProfileRouter(replicas, profile, random.Random(f"{seed} {number}"))


def at_random(seed: int) -> MakeRouter:
    return lambda replicas, number: RandomRouter(replicas, random.Random(f"{seed} {number}"))


def greedy() -> MakeRouter:
    return lambda replicas, _number: GreedyRouter(replicas)


class Simulation:
    """One trace through one kind of routers; ``run`` once."""

    def __init__(self, trace: Trace, make: MakeRouter, site: Site, seed: int = 0) -> None:
        self._trace, self._site = trace, site
        self._rng = random.Random(f"clients {seed}")
        self.replicas = [SimulatedReplica(slot, site.hardware) for slot in range(site.replicas)]
        self.routers = [make(self.replicas, number) for number in range(site.routers)]
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.now_s = 0.0
        self._telling: set[SimulatedReplica] = set()
        self._stepping: set[SimulatedReplica] = set()
        self._beating: set[SimulatedReplica] = set()
        self._sites: dict[Job, Router] = {}
        self._load_news = {(r, to): LoadNews(site.load_pause_s) for r in self.replicas for to in self.routers}
        self._catching_up: set[SimulatedReplica] = set()
        self.jobs: list[Job] = []
        self._ends: dict[Job, Callable[[], None]] = {}

    def run(self) -> Report:
        for conversation in self._trace:
            self._at(conversation.start_s, lambda c=conversation: self._arrive(c, 0))  # type: ignore[misc]
        while self._events:
            self.now_s, _, act = heapq.heappop(self._events)
            act()
        assert len(self.jobs) == sum(len(conversation.turns) for conversation in self._trace), "a request was lost"
        ttfts = sorted(job.first_token_s - job.arrived_s for job in self.jobs)
        computed = [replica.computed_tokens for replica in self.replicas]
        prompt_tokens = sum(len(job.turn.prompt) for job in self.jobs)
        return Report(
            hit_rate=sum(job.cached_tokens for job in self.jobs) / prompt_tokens,
            ttft_p50_s=ttfts[len(ttfts) // 2],
            ttft_p99_s=ttfts[len(ttfts) * 99 // 100],
            ttft_mean_s=statistics.fmean(ttfts),
            imbalance=max(computed) / statistics.fmean(computed),
            requests=len(self.jobs),
        )

    def _at(self, when_s: float, act: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (when_s, self._count, act))

    def _arrive(self, conversation: Conversation, number: int) -> None:
        router = self._rng.choice(self.routers)
        router.waiting.append((conversation, number, self.now_s))
        self._place(router)

    def _place(self, router: Router) -> None:
        while router.waiting:
            conversation, number, arrived_s = router.waiting[0]
            turn = conversation.turns[number]
            found = router.choose(conversation, turn, self.now_s)
            if found is None:
                return
            router.waiting.popleft()
            seat, cached_tokens = found
            seat.load.sent(len(turn.prompt), min(cached_tokens, len(turn.prompt)))
            job = Job(turn, arrived_s)
            self.jobs.append(job)

            def ended(c: Conversation = conversation, n: int = number, s: Seat = seat, r: Router = router) -> None:
                s.load.ended(len(c.turns[n].prompt))
                if n + 1 < len(c.turns):
                    self._at(self.now_s + c.turns[n + 1].pause_s, lambda: self._arrive(c, n + 1))
                self._place(r)

            self._sites[job] = router
            seat.replica.submit(job)
            self._begin(seat.replica, {job: ended})
            self._load_changed(seat.replica, router)
            self._beat(seat.replica)

    def _begin(self, replica: SimulatedReplica, ends: dict[Job, Callable[[], None]]) -> None:
        self._ends.update(ends)
        begun = replica.begin(self.now_s)
        if begun is not None:
            job, until_s = begun
            self._at(until_s, lambda: self._computed(replica, job))
        self._tell(replica)

    def _computed(self, replica: SimulatedReplica, job: Job) -> None:
        self._at(replica.computed(job, self.now_s), lambda: self._ended(replica, job))
        self._begin(replica, {})
        self._load_changed(replica)
        self._step(replica)

    def _ended(self, replica: SimulatedReplica, job: Job) -> None:
        replica.ended(job)
        self._begin(replica, {})
        router = self._sites.pop(job)
        self._report(replica, router)
        self._load_changed(replica, router)
        self._ends.pop(job)()

    def _tell(self, replica: SimulatedReplica) -> None:
        """Blocks that changed become known after a while."""
        if replica.has_news and replica not in self._telling:
            self._telling.add(replica)
            self._at(self.now_s + self._site.news_s, lambda: self._told(replica))

    def _told(self, replica: SimulatedReplica) -> None:
        self._telling.discard(replica)
        news = replica.news()
        for router in self.routers:
            router.heard(replica, news)

    def _report(self, replica: SimulatedReplica, router: Router) -> None:
        """``router`` hears the load of this moment."""
        load = replica.load(self.now_s)
        self._load_news[replica, router].told()
        self._at(self.now_s + self._site.wire_s, lambda: self._reported(replica, router, load))

    def _reported(self, replica: SimulatedReplica, router: Router, load: LoadSnapshot) -> None:
        router.seats[replica.endpoint.incarnation].load.reported(load)
        self._place(router)

    def _step(self, replica: SimulatedReplica) -> None:
        """Tokens go to the routers of those who decode, with the load."""
        if replica not in self._stepping:
            self._stepping.add(replica)
            self._at(self.now_s + replica.step_s, lambda: self._stepped(replica))

    def _stepped(self, replica: SimulatedReplica) -> None:
        self._stepping.discard(replica)
        decoding = [job for job in replica.running if job is not replica.computing]
        for router in dict.fromkeys(self._sites[job] for job in decoding):
            self._report(replica, router)
        if decoding:
            self._step(replica)

    def _beat(self, replica: SimulatedReplica) -> None:
        """Everybody hears of a replica that works."""
        if replica not in self._beating:
            self._beating.add(replica)
            self._at(self.now_s + self._site.beat_s, lambda: self._beaten(replica))

    def _beaten(self, replica: SimulatedReplica) -> None:
        self._beating.discard(replica)
        for router in self.routers:
            self._report(replica, router)
        if replica.running or replica.waiting:
            self._beat(replica)

    def _load_changed(self, replica: SimulatedReplica, cause: Router | None = None) -> None:
        """All but the ``cause`` hear of it, those later who have heard much of late."""
        self._tell_load(replica, [router for router in self.routers if router is not cause])

    def _tell_load(self, replica: SimulatedReplica, routers: Sequence[Router]) -> None:
        for router in routers:
            news = self._load_news[replica, router]
            if news.changed(self.now_s):
                self._report(replica, router)
            elif news.late and replica not in self._catching_up:
                self._catching_up.add(replica)
                self._at(self.now_s + TELL_LOADS_S, lambda: self._catch_up(replica))

    def _catch_up(self, replica: SimulatedReplica) -> None:
        self._catching_up.discard(replica)
        self._tell_load(replica, [router for router in self.routers if self._load_news[replica, router].late])


def run(trace: Trace, make: MakeRouter, site: Site | None = None, seed: int = 0) -> Report:
    return Simulation(trace, make, site or Site(), seed).run()


def best_hit_rate(trace: Trace) -> float:
    """What no choice can exceed: one cache that never forgets, and holds each prompt as soon as it is sent."""
    known: set[int] = set()
    hits = tokens = 0
    for conversation in trace:
        for turn in conversation.turns:
            names = turn.blocks.leading(BLOCK_SIZE)
            found = next((count for count, name in enumerate(names) if name not in known), len(names))
            hits += names.cached_tokens(found)
            tokens += len(turn.prompt)
            known.update(names, turn.after)
    return hits / tokens


def capture(hit_rate: float, chance: float, best: float) -> float:
    """The share of the hits that can be had by choosing well: 0 as by chance, 1 as the best there can be."""
    return (hit_rate - chance) / (best - chance) if best > chance else math.nan
