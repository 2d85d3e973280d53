"""Which streams leave an endpoint that is much slower than its peers, how many, and where those go that find no place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from cluster.domain.endpoint import Endpoint, EndpointTable, LoadSnapshot
from cluster.domain.ids import Incarnation, ReplicaId
from cluster.router.endpoint_table import LiveLoad, Standing
from cluster.router.fleet import Fleet
from cluster.router.fleet_health import FleetHealth
from cluster.router.policy.contracts import Demand
from cluster.router.policy.profiles import PROFILES
from cluster.router.sequence_stream import SequenceLost, SequenceStream
from cluster.router.session import EngineSession, ServedModel, SessionSettings
from cluster.router.tokenizer_cache import TokenizerCache
from cluster.telemetry.logs import get_logger
from cluster.v1 import engine_pb2

SLOTS = 4  # of each endpoint; one more sequence may wait in it


class Site:
    """Three endpoints that are up, and say of themselves what they are told to; the first one is slow."""

    def __init__(self, profile: str = "default") -> None:
        self.standings = {0: Standing.SLOW}
        health = FleetHealth()
        cast("Any", health).standing = lambda one: self.standings.get(one.replica.slot, Standing.HEALTHY)
        settings = SessionSettings("r", 1.0, 1.0, TokenizerCache(), health)
        self.fleet = Fleet(settings, get_logger(), lambda: None, profile=PROFILES[profile])
        self.incarnations = [Incarnation(ReplicaId("a", slot), 1) for slot in range(3)]
        self.draining = False
        self.epoch = 0
        self.apply()
        for session in self.fleet._sessions.values():
            session.served = ServedModel(engine_pb2.ModelCard(name="a"), None)
            session.load.max_num_seqs = SLOTS
            session._came_up()
        self.slow, self.second, self.third = self.fleet._sessions.values()

    def apply(self) -> None:
        self.epoch += 1
        endpoints = [
            Endpoint(one, "127.0.0.1:1", "sha256:a", 16, draining=self.draining and one.replica.slot == 2)
            for one in self.incarnations
        ]
        assert self.fleet.apply(EndpointTable(self.epoch, tuple(endpoints), ("a",), "s"))

    def running(self, *sequences: int) -> None:
        for session, count in zip((self.slow, self.second, self.third), sequences, strict=True):
            session.load.reported(LoadSnapshot(running_sequences=count))

    def taken(self, **demand: object) -> int | None:
        found = self.fleet.choose(Demand("a", "sha256:a", needs_room=True, **demand))  # type: ignore[arg-type]
        return None if found is None else found[0].endpoint.incarnation.replica.slot


@pytest.fixture
async def make_site(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[type[Site]]:
    async def keep_open(_session: EngineSession) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(EngineSession, "_keep_open", keep_open)
    made: list[Site] = []

    class Kept(Site):
        def __init__(self, profile: str = "default") -> None:
            super().__init__(profile)
            made.append(self)

    yield Kept
    for site in made:
        await site.fleet.close()


class Pulse:
    """Lets ``wanted`` sequences leave, as far as they are there; keeps what it is told."""

    def __init__(self, wanted: int) -> None:
        self.wanted, self.seen, self.left = wanted, [], []

    def leaving(self, open_sequences: int) -> int:
        self.seen.append(open_sequences)
        return min(self.wanted, open_sequences)

    def moved(self, sequences: int) -> None:
        self.left.append(sequences)

    def submitted(self, _attempt: int) -> None: ...

    def closed(self, _sequences: int) -> None: ...


def streams_on(session: EngineSession, count: int, pulse: Pulse) -> list[SequenceStream]:
    cast("Any", session)._pulse = pulse
    return [session.submit(engine_pb2.Submit(attempt=1), 10, 100)[1] for _ in range(count)]


async def failed(stream: SequenceStream) -> bool:
    task = asyncio.create_task(stream.receive())
    await asyncio.sleep(0)  # it has begun
    await asyncio.sleep(0)
    if not task.done():
        task.cancel()
        return False
    return isinstance(task.exception(), SequenceLost)


@pytest.mark.parametrize(
    ("slots", "running", "waiting", "held", "places"),
    [(4, 0, 0, 0, 5), (4, 3, 0, 0, 2), (4, 4, 0, 0, 1), (4, 4, 1, 0, 0), (4, 3, 0, 1, 1), (16, 4, 0, 0, 14),
     (0, 3, 0, 0, 1)],
)  # fmt: skip
def test_the_places_of_an_endpoint(slots: int, running: int, waiting: int, held: int, places: int) -> None:
    load = LiveLoad(16)
    load.max_num_seqs = slots
    load.reported(LoadSnapshot(running_sequences=running, waiting_sequences=waiting))
    for _ in range(held):
        load.hold(5)
    assert (load.places, load.has_room) == (places, places > 0)
    if places:
        for _ in range(places if slots else 0):
            assert load.has_room
            load.sent(1)
        assert load.has_room is not bool(slots)


def test_an_endpoint_that_has_just_refused_has_no_place() -> None:
    load = LiveLoad(16)
    load.max_num_seqs = SLOTS
    load.refused()
    assert load.places == 0


async def test_no_more_leave_than_find_a_place_at_a_sound_peer(make_site: type[Site]) -> None:
    site = make_site()
    for running, expected in (((3, 4, 5), 1), ((3, 4, 3), 3), ((3, 5, 5), 0), ((3, 0, 0), 4), ((0, 5, 4), 1)):
        site.running(*running)
        assert site.fleet._places_elsewhere(site.slow, 4) == expected
    site.running(0, 4, 4)
    site.standings[1] = Standing.SLOW
    assert site.fleet._places_elsewhere(site.slow, 4) == 1, "another slow one's places do not count"
    site.draining = True
    site.apply()
    assert site.fleet._places_elsewhere(site.slow, 4) == 0


async def test_those_that_leave_are_the_youngest_that_go_on_and_they_alone_are_counted(make_site: type[Site]) -> None:
    site, pulse = make_site(), Pulse(2)
    site.running(6, 0, 0)
    streams = streams_on(site.slow, 7, pulse)
    streams[6].deliver(engine_pb2.SequenceUpdate(attempt=1, end=engine_pb2.SEQUENCE_END_LENGTH))
    for _ in range(4):  # no request takes its stream's end: all of them wait for slow clients
        site.slow._relieve()
    assert (pulse.seen, pulse.left) == ([6, 4, 2, 0], [2, 2, 2])
    assert [await failed(stream) for stream in streams] == [True] * 6 + [False]


async def test_the_youngest_leave_first_and_only_for_the_places_there_are(make_site: type[Site]) -> None:
    site, pulse = make_site(), Pulse(4)
    streams = streams_on(site.slow, 6, pulse)
    site.running(6, 5, 4)
    site.slow._relieve()
    assert [await failed(stream) for stream in streams] == [False] * 5 + [True]
    site.running(5, 5, 5)
    site.slow._relieve()
    assert pulse.left == [1], "nobody has room"


@pytest.mark.parametrize("profile", sorted(PROFILES))
async def test_who_left_a_slow_endpoint_comes_back_when_the_sound_are_full(make_site: type[Site], profile: str) -> None:
    site = make_site(profile)
    site.running(3, 5, 5)
    assert site.taken() is None, "a new request, or one whose replica broke, waits for a sound one"
    assert site.taken(settles=True) == 0
    site.running(3, 5, 4)
    assert site.taken(settles=True) == 2
    site.running(5, 5, 5)
    assert site.taken(settles=True) is None
    site.running(3, 5, 5)
    site.standings = {0: Standing.EJECTED}
    assert site.taken(settles=True) is None, "a broken one is no place to come back to"
    site.standings |= {1: Standing.SLOW}
    site.running(3, 3, 5)
    assert site.taken(settles=True) == 1
