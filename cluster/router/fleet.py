"""The sessions of the current endpoint table: one owner for who is there, who is up, and who gets the next request."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import islice

from cluster.domain.clock import Clock, MonotonicClock
from cluster.domain.endpoint import Endpoint, EndpointTable
from cluster.domain.errors import ModelNotFound, RejectReason, RequestRejected
from cluster.domain.ids import Incarnation
from cluster.router.endpoint_table import Standing, TableChange, supersedes, table_change
from cluster.router.fleet_groups import FleetGroups, Standings
from cluster.router.fleet_health import FleetHealth
from cluster.router.holders import Holders
from cluster.router.policy.checkpoints import CheckpointRoom, roomiest
from cluster.router.policy.contracts import Choice, Demand, Profile
from cluster.router.policy.group import Group
from cluster.router.policy.profiles import DEFAULT
from cluster.router.policy.selector import Selector, Verdict
from cluster.router.prefix_index import PrefixIndex
from cluster.router.sequence_stream import LossReason
from cluster.router.session import EngineSession, ServedModel, SessionSettings
from cluster.telemetry.logs import Logger
from cluster.v1 import engine_pb2

BLOCK_MESSAGES_PER_S = 500  # from all replicas together: so news of blocks take a small part of a core
LOAD_MESSAGES_PER_S = 200  # from all replicas together, beside those that bring tokens
REGROUPED_MAX = 16  # endpoints that change with one table, for which groups are changed rather than made anew
EXPECTED_BLOCKS_MAX = 2048  # of one prompt: what a longer one holds beyond is known when its replica tells it
ASKED_FOR_PLACES_MAX = 16  # endpoints of each checkpoint, where there are several
NAME_CHARACTERS = 128  # of an unknown name, in an answer: a status has to fit into headers
NO_HOLDERS = Holders((), (), {})


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
        rng = rng or random.Random(0)  # noqa: S311 - breaks ties, keeps no secrets
        self._selector = Selector(profile, rng)
        self._lots = copy(rng)  # of its own: whose places are asked moves no pick, which an explanation foretells
        self._standings: Standings = standings or settings.health
        self._clock: Clock = clock or MonotonicClock()
        self._table: EndpointTable | None = None
        self._models: tuple[str, ...] = ()
        self._sessions: dict[Incarnation, EngineSession] = {}
        self._paced_for = 0  # endpoints, when their sessions were last told how often to send news
        self._replicas: frozenset[str] = frozenset()
        self._taking: dict[str, set[Incarnation]] = {}  # endpoints that take new work, by model
        self._kinds: dict[str, tuple[_Kind, ...]] = {}  # of what serves a model; found when asked for
        self._groups = FleetGroups(profile, self._standings)
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
            self._groups.leave(endpoint.incarnation)
            session.forget_blocks()
            self._close(session)
        for endpoint in change.updated:
            self._sessions[endpoint.incarnation].endpoint = endpoint
        pauses = self._pace(len(table.endpoints))
        for endpoint in change.opened:
            index = self.index_of(endpoint) if self._selector.profile.uses_blocks else None
            changed = partial(self._session_changed, endpoint.incarnation)
            session = EngineSession(
                endpoint, self._settings, changed, self._log, index, self._room_at, self._places_elsewhere, pauses
            )
            self._sessions[endpoint.incarnation] = session
            self._groups.seat(session)
        self._replicas = frozenset(session.replica_name for session in self._sessions.values())
        keys = {_index_key(session.endpoint) for session in self._sessions.values()}
        self._indexes = {key: index for key, index in self._indexes.items() if key in keys}
        self._follow(change)
        self._changed()
        return True

    def _pace(self, endpoints: int) -> engine_pb2.Pauses:
        """The pauses of that many; who is there already is told when they are twice or half as many as then."""
        pauses = engine_pb2.Pauses(
            block_events_s=endpoints / BLOCK_MESSAGES_PER_S, load_s=endpoints / LOAD_MESSAGES_PER_S
        )
        if not self._paced_for < 2 * endpoints < 4 * self._paced_for:
            self._paced_for = endpoints
            for session in self._sessions.values():
                session.pace(pauses)
        return pauses

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
        return any(self._taking.values())

    @property
    def replicas(self) -> frozenset[str]:
        """The replicas of the endpoint table, by name."""
        return self._replicas

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that is served or wanted, sorted."""
        return self._models

    def resolve(self, model: str) -> str | None:
        """The name of the model that a request for ``model`` means, "" being the only one; None when there is none."""
        known = self._models
        if model in known:
            return model
        return known[0] if not model and len(known) == 1 else None

    def ready_replicas(self, model: str) -> int:
        return len(self._taking.get(model, ()))

    def served(self, model: str, checkpoint_digest: str = "") -> ServedModel:
        """What ``model`` is, "" being the only one; that with ``checkpoint_digest``, if it is given.

        ModelNotFound, or RequestRejected NO_ENDPOINT.
        """
        named = self.resolve(model)
        if named is None:
            if not self._models:
                raise RequestRejected(RejectReason.NO_ENDPOINT, "No model is served yet; try again in a moment.")
            names = ", ".join(self._models)
            called = f"No model is called {model[:NAME_CHARACTERS]!r}"
            what = called if model else "Several models are served, so the request must name one"
            raise ModelNotFound(f"{what}; served are: {names}.")
        kinds = self._kinds.get(named) or self._find_kinds(named)
        if not kinds:
            message = f"No replica of model {named} is ready; try again in a moment."
            raise RequestRejected(RejectReason.NO_ENDPOINT, message)
        if checkpoint_digest:
            kinds = tuple(kind for kind in kinds if kind.checkpoint_digest == checkpoint_digest)
            if not kinds:
                text = f"No replica of model {named} serves what this request began with any more"
                raise RequestRejected(RejectReason.NO_ENDPOINT, f"{text}; send it anew, without its tokens.")
        return kinds[0].served if len(kinds) == 1 else kinds[roomiest([self._room_of(kind) for kind in kinds])].served

    def room_elsewhere(self, model: str, checkpoint_digest: str) -> float:
        """Free places at sound endpoints of other checkpoints, as far as some of them tell."""
        kinds = self._kinds.get(model) or self._find_kinds(model)
        if len(kinds) == 1:
            return 0.0
        others = (kind for kind in kinds if kind.checkpoint_digest != checkpoint_digest)
        return sum(self._room_of(kind).free_places for kind in others)

    def _room_of(self, kind: _Kind) -> CheckpointRoom:
        asked: Sequence[EngineSession] = kind.sessions
        if len(asked) > ASKED_FOR_PLACES_MAX:  # others each time: those that came together may be unsound together
            asked = self._lots.sample(asked, ASKED_FOR_PLACES_MAX)
        sound = [s for s in asked if self._standings.standing(s.endpoint.incarnation) is Standing.HEALTHY]
        places = sum(session.load.places for session in sound)
        return CheckpointRoom(len(kind.sessions), len(asked), len(sound), places)

    def _find_kinds(self, model: str) -> tuple[_Kind, ...]:
        """By checkpoint: several while replicas of another one take over. Of those that take new work, if any does."""
        up = [s for s in self._sessions.values() if s.endpoint.model == model and s.up and s.served is not None]
        taking = [session for session in up if not session.endpoint.draining]
        found: dict[str, list[EngineSession]] = {}
        for session in taking or up:
            found.setdefault(session.endpoint.checkpoint_digest, []).append(session)
        kinds = self._kinds[model] = tuple(_Kind(tuple(sessions)) for sessions in found.values())
        return kinds

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
        """The session that ``demand`` goes to, at once; None when no endpoint qualifies now.

        The choice is to be told when it is ``not_used``.
        """
        group = self._groups.of(demand)
        choice = self._selector.choose(group, demand, self._holders(group, demand))
        if choice is None:
            return None
        endpoint = choice.candidate.endpoint
        undo = []
        unpicked = self._standings.picked(endpoint.incarnation)
        if unpicked is not None:
            undo.append(unpicked)
        if self._selector.profile.uses_blocks and demand.blocks is not None and len(group) > 1:
            index = self.index_of(endpoint)
            names = list(islice(demand.blocks.leading(endpoint.block_size), EXPECTED_BLOCKS_MAX))
            expectation = index.expect(endpoint.incarnation, names, self._clock.now())
            if expectation is not None:
                undo.append(partial(index.withdraw, expectation))
        if undo:
            choice = Choice(choice.candidate, choice.scorer, tuple(undo))
        return self._sessions[endpoint.incarnation], choice

    def explain(self, demand: Demand) -> list[Verdict]:
        """What the policy thinks of every endpoint now, and which one ``choose`` would take; changes nothing."""
        group = self._groups.of(demand)
        others = self._groups.others(group)
        return self._selector.explain(group, others, demand, self._holders(group, demand))

    def _holders(self, group: Group, demand: Demand) -> Holders:
        """Of the demand's prompt. Nobody where endpoints cannot be compared: other weights or sizes of blocks."""
        comparable = demand.checkpoint_digest and group.block_size
        if demand.blocks is None or not comparable or not self._selector.profile.uses_blocks:
            return NO_HOLDERS
        index = self._indexes.get((demand.model, demand.checkpoint_digest, group.block_size))
        if index is None or index.empty:
            return NO_HOLDERS
        return index.holders(demand.blocks.leading(group.block_size))

    def serves(self, demand: Demand) -> bool:
        """Whether some endpoint would take ``demand`` if it had room; changes nothing."""
        members = self._groups.of(demand).members
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

    def _follow(self, change: TableChange) -> None:
        """Groups and readiness after a new table: one by one where little has changed."""
        changed = (*change.closed, *change.updated, *change.opened)
        if len(changed) > REGROUPED_MAX:
            self._groups.clear()
        for endpoint in changed:
            self._note_readiness(endpoint.incarnation)
            self._groups.changed(endpoint.incarnation)
        self._taking = {model: taking for model, taking in self._taking.items() if taking}

    def _session_changed(self, incarnation: Incarnation) -> None:
        """Its session has gone up or down."""
        self._note_readiness(incarnation)
        self._groups.changed(incarnation)
        self._changed()

    def _note_readiness(self, incarnation: Incarnation) -> None:
        session, model = self._sessions.get(incarnation), incarnation.replica.model
        self._kinds.pop(model, None)
        taking = self._taking.setdefault(model, set())
        if session is not None and session.up and not session.endpoint.draining:
            taking.add(incarnation)
        else:
            taking.discard(incarnation)

    def _changed(self) -> None:
        """Some endpoint has."""
        for waiter in tuple(self._waiters):
            if not waiter.done():
                waiter.set_result(None)
        self._on_change()
        self._on_fleet()

    def _room_at(self, session: EngineSession) -> None:
        self._on_room(session)

    def _places_elsewhere(self, session: EngineSession, wanted: int) -> int:
        """How many sequences sound endpoints of the same model and weights would begin soon: no more than ``wanted``.

        O(fleet).
        """
        endpoint, places = session.endpoint, 0
        for other in self._sessions.values():
            if (
                other is not session
                and other.up
                and not other.endpoint.draining
                and other.endpoint.model == endpoint.model
                and other.endpoint.checkpoint_digest == endpoint.checkpoint_digest
                and self._standings.standing(other.endpoint.incarnation) is Standing.HEALTHY
            ):
                places += other.load.places
                if places >= wanted:
                    return wanted
        return places


@dataclass(frozen=True, slots=True)
class _Kind:
    """Sessions, one at least, with endpoints of one model and checkpoint."""

    sessions: tuple[EngineSession, ...]

    @property
    def served(self) -> ServedModel:
        served = self.sessions[0].served
        assert served is not None, "it was asked"
        return served

    @property
    def checkpoint_digest(self) -> str:
        return self.sessions[0].endpoint.checkpoint_digest


def _index_key(endpoint: Endpoint) -> tuple[str, str, int]:
    return endpoint.model, endpoint.checkpoint_digest, endpoint.block_size
