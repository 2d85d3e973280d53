"""The sessions of the current endpoint table: one owner for who is there, who is up, and who gets the next request."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Protocol

from cluster.domain.clock import Clock, MonotonicClock
from cluster.domain.endpoint import Endpoint, EndpointTable
from cluster.domain.errors import ModelNotFound, RejectReason, RequestRejected
from cluster.domain.ids import Incarnation
from cluster.router.endpoint_table import Candidate, Standing, supersedes, table_change
from cluster.router.fleet_health import FleetHealth
from cluster.router.policy.contracts import Choice, Demand, Profile
from cluster.router.policy.group import Group
from cluster.router.policy.profiles import DEFAULT
from cluster.router.policy.selector import Selector, Verdict
from cluster.router.prefix_index import Holders, PrefixIndex
from cluster.router.sequence_stream import LossReason
from cluster.router.session import EngineSession, ServedModel, SessionSettings
from cluster.telemetry.logs import Logger

BLOCK_MESSAGES_PER_S = 500  # from all replicas together: so news of blocks take a small part of a core
EXPECTED_BLOCKS_MAX = 2048  # of one prompt: what a longer one holds beyond is known when its replica tells it
NAME_CHARACTERS = 128  # of an unknown name, in an answer: a status has to fit into headers
NO_HOLDERS = Holders((), (), {})


class Standings(Protocol):
    """Who judges how endpoints behave."""

    def standing(self, incarnation: Incarnation) -> Standing: ...

    def picked(self, incarnation: Incarnation) -> None:
        """A request is on its way there."""


class Seat:
    """One session as a policy asks for it."""

    __slots__ = ("_standings", "incarnation", "session")

    def __init__(self, session: EngineSession, standings: Standings) -> None:
        self.session = session
        self.incarnation = session.endpoint.incarnation
        self._standings = standings

    @property
    def has_room(self) -> bool:
        return self.session.load.has_room

    def candidate(self, cached_tokens: int = 0, *, has_room: bool, at_home: bool = False) -> Candidate:
        session, load = self.session, self.session.load
        return Candidate(
            endpoint=session.endpoint,
            session_up=session.up,
            tokens=load.tokens,
            cached_tokens=cached_tokens,
            has_room=has_room,
            standing=self._standings.standing(self.incarnation),
            queued_tokens=load.queued_tokens,
            at_home=at_home,
        )


class Fleet:
    """Opens and closes sessions as tables come; ``on_change`` hears of every change of readiness.

    ``choose`` looks at a group: the endpoints of a model and checkpoint that take new work, gathered once for as long
    as no endpoint comes, goes or changes.
    """

    def __init__(
        self,
        settings: SessionSettings,
        log: Logger,
        on_change: Callable[[], None],
        rng: random.Random | None = None,
        profile: Profile = DEFAULT,
        standings: Standings | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._settings = settings
        self._log = log
        self._on_change = on_change
        # Breaks ties, keeps no secrets.
        self._selector = Selector(profile, rng or random.Random(0))  # noqa: S311
        self._standings: Standings = standings or settings.health
        self._clock: Clock = clock or MonotonicClock()
        self._table: EndpointTable | None = None
        self._models: tuple[str, ...] = ()
        self._sessions: dict[Incarnation, EngineSession] = {}
        self._groups: dict[tuple[str, str], Group] = {}
        self._indexes: dict[tuple[str, str, int], PrefixIndex] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._waiters: set[asyncio.Future[None]] = set()
        self._on_room: Callable[[EngineSession], None] = lambda _: None
        self._on_fleet: Callable[[], None] = lambda: None

    def apply(self, table: EndpointTable) -> bool:
        """Makes ``table`` the current one; False when it is older than that."""
        if not supersedes(table, self._table):
            return False
        change = table_change(tuple(s.endpoint for s in self._sessions.values()), table)
        self._table = table
        # Asked for by every request, so not looked for among thousands of endpoints each time.
        self._models = tuple(sorted({*table.models, *(endpoint.model for endpoint in table.endpoints)}))
        for endpoint in change.closed:
            session = self._sessions.pop(endpoint.incarnation)
            session.forget_blocks()
            self._close(session)
        for endpoint in change.updated:
            self._sessions[endpoint.incarnation].endpoint = endpoint
        for endpoint in change.opened:
            index = self.index_of(endpoint) if self._selector.profile.uses_blocks else None
            if index is not None:
                index.pause_s = len(table.endpoints) / BLOCK_MESSAGES_PER_S
            changed = partial(self._changed, endpoint.model)
            session = EngineSession(endpoint, self._settings, changed, self._log, index, self._room_at)
            self._sessions[endpoint.incarnation] = session
        keys = {_index_key(session.endpoint) for session in self._sessions.values()}
        self._indexes = {key: index for key, index in self._indexes.items() if key in keys}
        self._changed()
        return True

    @property
    def health(self) -> FleetHealth:
        """How the endpoints have behaved, and what may be tried again."""
        return self._settings.health

    @property
    def epoch(self) -> int:
        return self._table.epoch if self._table else 0

    @property
    def ready(self) -> bool:
        """Whether some endpoint takes new work."""
        return any(session.up and not session.endpoint.draining for session in self._sessions.values())

    @property
    def replicas(self) -> frozenset[str]:
        """The replicas of the endpoint table, by name."""
        return frozenset(str(incarnation.replica) for incarnation in self._sessions)

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that is served or wanted, sorted."""
        return self._models

    def resolve(self, model: str) -> str | None:
        """The name of the model that a request for ``model`` means, "" being the only one; None when there is none."""
        known = self.models
        if not model and len(known) == 1:
            return known[0]
        return model if model in known else None

    def ready_replicas(self, model: str) -> int:
        return sum(s.up and not s.endpoint.draining and s.endpoint.model == model for s in self._sessions.values())

    def served(self, model: str) -> ServedModel:
        """What ``model`` is, "" being the only one. ModelNotFound, or RequestRejected NO_ENDPOINT."""
        known, named = self.models, self.resolve(model)
        if not known:
            raise RequestRejected(RejectReason.NO_ENDPOINT, "No model is served yet; try again in a moment.")
        if named is None:
            names = ", ".join(known)
            called = f"No model is called {model[:NAME_CHARACTERS]!r}"
            what = called if model else "Several models are served, so the request must name one"
            raise ModelNotFound(f"{what}; served are: {names}.")
        for session in self._sessions.values():
            if session.endpoint.model == named and session.up and session.served is not None:
                return session.served
        raise RequestRejected(RejectReason.NO_ENDPOINT, f"No replica of model {named} is ready; try again in a moment.")

    @property
    def profile(self) -> Profile:
        """The policy in force."""
        return self._selector.profile

    def index_of(self, endpoint: Endpoint) -> PrefixIndex:
        """Who holds which blocks among the endpoints like this one."""
        key = _index_key(endpoint)
        index = self._indexes.get(key)
        if index is None:
            index = self._indexes[key] = PrefixIndex(self._settings.max_index_blocks)
        return index

    def choose(self, demand: Demand) -> tuple[EngineSession, Choice] | None:
        """The session that ``demand`` goes to, at once; None when no endpoint qualifies now."""
        group = self._group(demand)
        choice = self._selector.choose(group, demand, self._holders(group, demand))
        if choice is None:
            return None
        endpoint = choice.candidate.endpoint
        self._standings.picked(endpoint.incarnation)
        if self._selector.profile.uses_blocks and demand.blocks is not None and len(group) > 1:
            names = list(islice(demand.blocks.leading(endpoint.block_size), EXPECTED_BLOCKS_MAX))
            self.index_of(endpoint).expect(endpoint.incarnation, names, self._clock.now())
        return self._sessions[endpoint.incarnation], choice

    def explain(self, demand: Demand) -> list[Verdict]:
        """What the policy thinks of every endpoint now, and which one ``choose`` would take; changes nothing."""
        group = self._group(demand)
        inside = group.positions
        seats = [self._seat(s) for s in self._sessions.values() if s.endpoint.incarnation not in inside]
        others = [seat.candidate(has_room=seat.has_room) for seat in seats]
        return self._selector.explain(group, others, demand, self._holders(group, demand))

    def _group(self, demand: Demand) -> Group:
        key = demand.model, demand.checkpoint_digest
        group = self._groups.get(key)
        if group is None:
            rules = [rule.keep for rule in self._selector.profile.filters if rule.static]
            seats = [
                self._seat(session)
                for session in self._sessions.values()
                if all(keep(session.candidate, demand) for keep in rules)
            ]
            sizes = {seat.session.endpoint.block_size for seat in seats}
            group = self._groups[key] = Group(seats, sizes.pop() if len(sizes) == 1 else 0)
        return group

    def _seat(self, session: EngineSession) -> Seat:
        return Seat(session, self._standings)

    def _holders(self, group: Group, demand: Demand) -> Holders:
        """Of the demand's prompt. Nobody where endpoints cannot be compared: other weights or sizes of blocks."""
        comparable = demand.checkpoint_digest and group.block_size
        if demand.blocks is None or not comparable or not self._selector.profile.uses_blocks:
            return NO_HOLDERS
        index = self._indexes.get((demand.model, demand.checkpoint_digest, group.block_size))
        return NO_HOLDERS if index is None else index.holders(demand.blocks.leading(group.block_size))

    def serves(self, demand: Demand) -> bool:
        """Whether some endpoint would take ``demand`` if it had room; changes nothing."""
        members = self._group(demand).members
        return any(m.incarnation not in demand.refused for m in members) if demand.refused else bool(members)

    def watch_room(self, at: Callable[[EngineSession], None], anywhere: Callable[[], None]) -> None:
        """``at`` hears whenever a session's load changed, which is often; ``anywhere`` of every other change."""
        self._on_room, self._on_fleet = at, anywhere

    def change(self) -> asyncio.Future[None]:
        """A future that the next change of any endpoint completes; cancel it when it is no longer wanted."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        waiter.add_done_callback(self._waiters.discard)
        return waiter

    @property
    def open_sequences(self) -> int:
        return sum(session.open_sequences for session in self._sessions.values())

    @property
    def outstanding_tokens(self) -> int:
        return sum(session.load.outstanding_tokens for session in self._sessions.values())

    async def close(self) -> None:
        for session in self._sessions.values():
            self._close(session)
        self._sessions = {}
        if self._closing:
            await asyncio.wait(self._closing)

    def _close(self, session: EngineSession) -> None:
        task = asyncio.get_running_loop().create_task(session.close(LossReason.REMOVED))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _changed(self, model: str | None = None) -> None:
        """Some endpoint has; ``model`` when it is of that one."""
        if model is None:
            self._groups.clear()
        else:
            self._groups = {key: group for key, group in self._groups.items() if key[0] != model}
        for waiter in tuple(self._waiters):
            if not waiter.done():
                waiter.set_result(None)
        self._on_change()
        self._on_fleet()

    def _room_at(self, session: EngineSession) -> None:
        self._on_room(session)


def _index_key(endpoint: Endpoint) -> tuple[str, str, int]:
    return endpoint.model, endpoint.checkpoint_digest, endpoint.block_size
