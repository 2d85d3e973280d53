"""What a fleet keeps in step with every change, beside what it would find if it looked at all endpoints anew."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, cast

import pytest

from cluster.domain.endpoint import Endpoint, EndpointTable, LoadSnapshot
from cluster.domain.errors import RequestRejected
from cluster.domain.ids import Incarnation, ReplicaId
from cluster.router.endpoint_table import Standing
from cluster.router.fleet import ASKED_FOR_PLACES_MAX, Fleet
from cluster.router.fleet_health import FleetHealth
from cluster.router.policy.contracts import Demand
from cluster.router.policy.prompt_blocks import PromptBlocks
from cluster.router.sequence_stream import LossReason, SequenceLost
from cluster.router.session import EngineSession, ServedModel, SessionSettings
from cluster.router.tokenizer_cache import TokenizerCache
from cluster.telemetry.logs import get_logger
from cluster.v1 import engine_pb2

MODELS = ("a", "b")
DIGESTS = ("sha256:1", "sha256:2")
BLOCK = 4


class Site:
    """A fleet whose sessions go up and down by word of ours."""

    def __init__(self) -> None:
        self.health = FleetHealth()
        self.told = 0
        self.fleet = Fleet(SessionSettings("r", 1.0, 1.0, TokenizerCache(), self.health), get_logger(), self.tell)
        self.table: dict[Incarnation, Endpoint] = {}
        self.epoch = 0

    def tell(self) -> None:
        self.told += 1

    def apply(self, *endpoints: Endpoint) -> None:
        self.table = {endpoint.incarnation: endpoint for endpoint in endpoints}
        self.epoch += 1
        assert self.fleet.apply(EndpointTable(self.epoch, endpoints, MODELS, "s"))

    @property
    def sessions(self) -> dict[Incarnation, EngineSession]:
        return self.fleet._sessions

    def up(self, incarnation: Incarnation) -> None:
        session = self.sessions[incarnation]
        if not session.up:
            session.served = ServedModel(engine_pb2.ModelCard(name=incarnation.replica.model), None)
            session._came_up()

    def down(self, incarnation: Incarnation) -> None:
        self.sessions[incarnation]._went_down(LossReason.REMOVED)

    def check(self) -> None:
        taking = [s for s in self.sessions.values() if s.up and not s.endpoint.draining]
        assert self.fleet.ready == bool(taking)
        assert self.fleet.replicas == {str(s.endpoint.incarnation.replica) for s in self.sessions.values()}
        for model in MODELS:
            mine = [s for s in taking if s.endpoint.model == model]
            assert self.fleet.ready_replicas(model) == len(mine)
            for digest in ("", *DIGESTS):
                group = self.fleet._groups.of(Demand(model, digest))
                expected = [s.endpoint.incarnation for s in mine if digest in ("", s.endpoint.checkpoint_digest)]
                assert [member.incarnation for member in group.members] == expected, "as the table has them"
                assert list(group.positions) == expected
                assert all(member.candidate(has_room=True).endpoint in self.table.values() for member in group.members)


@pytest.fixture
async def site(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    async def keep_open(_session: EngineSession) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(EngineSession, "_keep_open", keep_open)
    site = Site()
    yield site
    await site.fleet.close()


def endpoint(model: str, slot: int, generation: int = 1, **other: object) -> Endpoint:
    fields = {"address": "127.0.0.1:1", "checkpoint_digest": DIGESTS[0], "block_size": BLOCK} | other
    return Endpoint(Incarnation(ReplicaId(model, slot), generation), **fields)  # type: ignore[arg-type]


def another_table(rng: random.Random, table: list[Endpoint], slots: int) -> list[Endpoint]:
    """Some endpoints leave, drain, are built anew or come."""
    left = []
    for one in table:
        drawn = rng.random()
        if drawn < 0.1:
            continue
        where = one.incarnation
        if drawn < 0.2:
            left.append(endpoint(where.replica.model, where.replica.slot, where.generation, draining=not one.draining))
        elif drawn < 0.3:
            left.append(endpoint(where.replica.model, where.replica.slot, where.generation + 1))
        elif drawn < 0.35:
            left.append(endpoint(where.replica.model, where.replica.slot, where.generation, address="127.0.0.1:2"))
        else:
            left.append(one)
    known = {one.incarnation.replica for one in left}
    for _ in range(rng.randrange(3)):
        new = endpoint(rng.choice(MODELS), rng.randrange(slots), 99, checkpoint_digest=rng.choice(DIGESTS))
        if new.incarnation.replica not in known:
            left.append(new)
            known.add(new.incarnation.replica)
    return left


@pytest.mark.parametrize("seed", range(4))
async def test_groups_and_readiness_are_those_of_the_table_and_the_sessions(site: Site, seed: int) -> None:
    rng = random.Random(seed)
    slots = 4 if seed % 2 else 40  # few changes with each table, or many
    site.apply(*(endpoint(model, slot) for model in MODELS for slot in range(slots)))
    for _ in range(60):
        site.check()
        if rng.random() < 0.3:
            site.apply(*another_table(rng, list(site.table.values()), slots))
        for incarnation in rng.sample(sorted(site.table), min(3, len(site.table))):
            (site.up if rng.random() < 0.7 else site.down)(incarnation)
    site.check()


async def test_who_tells_what_a_model_is_may_leave(site: Site) -> None:
    site.apply(endpoint("a", 0), endpoint("a", 1))
    for slot in (0, 1):
        site.up(Incarnation(ReplicaId("a", slot), 1))
    first, second = site.sessions.values()
    assert site.fleet.served("a") is first.served
    site.apply(endpoint("a", 1))
    assert site.fleet.served("a") is second.served
    site.down(second.endpoint.incarnation)
    site.apply(endpoint("a", 1), endpoint("a", 2))
    site.up(Incarnation(ReplicaId("a", 2), 1))
    assert site.fleet.served("a") is site.sessions[Incarnation(ReplicaId("a", 2), 1)].served


async def test_of_two_checkpoints_the_one_with_more_room_is_what_a_model_is(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = endpoint("a", 0), [endpoint("a", slot, 2, checkpoint_digest=DIGESTS[1]) for slot in (1, 2)]
    site.apply(old, *new)
    for incarnation in site.table:
        site.up(incarnation)
        site.sessions[incarnation].load.max_num_seqs = 4
    session, (newer, newest) = site.sessions[old.incarnation], [site.sessions[e.incarnation] for e in new]
    assert site.fleet.served("a") is newer.served
    for each, running in ((newer, 4), (newest, 3)):
        each.load.reported(LoadSnapshot(running_sequences=running))
    assert site.fleet.served("a") is session.served, "5 places against 3"
    assert site.fleet.served("a", DIGESTS[1]) is newer.served
    with pytest.raises(RequestRejected, match="what this request began with"):
        site.fleet.served("a", "sha256:3")
    monkeypatch.setattr(
        site.health, "standing", lambda one: Standing.EJECTED if one == old.incarnation else Standing.HEALTHY
    )
    assert site.fleet.served("a") is newer.served, "whoever is ejected has room because nobody goes there"
    monkeypatch.undo()
    site.apply(replace(old, draining=True), *new)
    assert site.fleet.served("a") is newer.served, "the old one takes nothing new, however much room it has"
    site.apply(replace(old, draining=True))
    assert site.fleet.served("a") is session.served, "nobody else could say what it is"


async def test_a_choice_that_is_not_used_leaves_no_trace(site: Site) -> None:
    site.apply(endpoint("a", 0), endpoint("a", 1))
    for incarnation in site.table:
        site.up(incarnation)
        index = site.fleet.index_of(site.table[incarnation])
        assert index.apply(incarnation, engine_pb2.BlockEvents(sequence_number=1, reset=True))
    prompt = PromptBlocks(range(3 * BLOCK))
    demand = Demand("a", DIGESTS[0], prompt_tokens=3 * BLOCK, blocks=prompt)
    for used in (False, True):
        found = site.fleet.choose(demand)
        assert found is not None
        assert index.holders(prompt.leading(BLOCK)).depth == 3, "the next one of its kind goes there, too"
        if not used:
            found[1].not_used()
        index.check()
        assert index.holders(prompt.leading(BLOCK)).depth == 3 * used


async def test_a_readiness_that_comes_and_goes_is_told_each_time(site: Site) -> None:
    site.apply(endpoint("a", 0))
    told = site.told
    site.up(Incarnation(ReplicaId("a", 0), 1))
    site.down(Incarnation(ReplicaId("a", 0), 1))
    assert site.told == told + 2


async def test_another_checkpoints_room_counts_though_those_that_came_first_are_slow(site: Site) -> None:
    old = [endpoint("a", slot) for slot in range(20)]
    new = [endpoint("a", 100 + slot, checkpoint_digest=DIGESTS[1]) for slot in range(200)]
    site.apply(*old, *new)
    for incarnation, session in site.sessions.items():
        site.up(incarnation)
        session.load.max_num_seqs = 8
        session.load.reported(LoadSnapshot(running_sequences=9 if session.endpoint in old else 0))
    slow = {one.incarnation for one in new[:ASKED_FOR_PLACES_MAX]}
    cast("Any", site.health).standing = lambda one: Standing.SLOW if one in slow else Standing.HEALTHY
    rooms = [site.fleet.room_elsewhere("a", DIGESTS[0]) for _ in range(100)]
    assert min(rooms) > 0
    assert abs(sum(rooms) / len(rooms) - 184 * 9) < 0.05 * 184 * 9, "what the sound ones have"
    assert site.fleet.served("a") is site.sessions[new[0].incarnation].served


async def test_a_session_that_is_closed_does_not_come_up_again(site: Site) -> None:
    stays, leaves = endpoint("a", 0), endpoint("a", 1)
    site.apply(stays, leaves)
    for incarnation in list(site.table):
        site.up(incarnation)
    session = site.sessions[leaves.incarnation]
    with pytest.raises(SequenceLost):
        session._hear(engine_pb2.SessionResponse(beat=engine_pb2.Beat(step_age_s=9)))
    session._went_down(LossReason.STUCK)
    site.apply(stays)
    await asyncio.sleep(0)  # it is being closed, and its stream is yet to hear of it
    session._hear(engine_pb2.SessionResponse(beat=engine_pb2.Beat(step_age_s=0)))
    assert not session.up
    assert list(site.health.slowness._paces) == [stays.incarnation]
