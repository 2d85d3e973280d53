"""The life of one request between endpoints that follow a script."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from cluster.config.schema import RouterConfig
from cluster.domain.clock import MonotonicClock
from cluster.domain.endpoint import Endpoint, LoadSnapshot
from cluster.domain.errors import AbortReason, EngineFailed, RejectReason, RequestAborted, RequestRejected
from cluster.domain.ids import Incarnation, ReplicaId
from cluster.domain.request import SamplingParams
from cluster.router.endpoint_table import Candidate, LiveLoad
from cluster.router.fleet import Fleet
from cluster.router.fleet_health import FleetHealth
from cluster.router.forwarding import REPLAYED_TOGETHER_MAX, UPDATES_SLACK, Ended, Progress, RequestRun
from cluster.router.placing import SENT_BACK_MAX
from cluster.router.policy.contracts import Choice, Demand
from cluster.router.sequence_stream import LossReason, SequenceLost, SequenceStream
from cluster.router.surroundings import Surroundings
from cluster.router.text import TextStream
from cluster.router.tokenization import Tokenizer
from cluster.router.validation import ValidRequest
from cluster.telemetry.metrics import RouterMetrics
from cluster.v1 import engine_pb2, inference_pb2
from tests.contract import small_tokenizers

LENGTH, FULL = engine_pb2.SEQUENCE_END_LENGTH, engine_pb2.SEQUENCE_END_REJECTED_CAPACITY
INVALID = engine_pb2.SEQUENCE_END_REJECTED_INVALID


@dataclass
class Says:
    """One update of a script; ``attempt`` 0 is the right one."""

    token_ids: Sequence[int] = ()
    end: engine_pb2.SequenceEnd = engine_pb2.SEQUENCE_END_UNSPECIFIED
    attempt: int = 0


@dataclass
class Session:
    """Delivers its whole script at once, then breaks for ``loss`` unless that is None.

    The first ``unsent`` submits do not leave the router.
    """

    slot: int
    script: Sequence[Says]
    loss: LossReason | None = LossReason.BROKEN
    unsent: int = 0
    asked: int = 0
    submits: list[engine_pb2.Submit] = field(default_factory=list)
    released: int = 0
    taken_back: int = 0
    load: LiveLoad = field(default_factory=lambda: LiveLoad(16))

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(Incarnation(ReplicaId("demo", self.slot), 1), "127.0.0.1:1", "sha256:a", 16)

    @property
    def replica_name(self) -> str:
        return f"demo/{self.slot}"

    def take_back(self) -> None:
        self.taken_back += 1

    def submit(
        self, submit: engine_pb2.Submit, _tokens: int, updates_max: int, _cached_tokens: int = 0
    ) -> tuple[int, SequenceStream]:
        self.asked += 1
        if self.asked <= self.unsent:
            raise SequenceLost(LossReason.BROKEN)
        self.submits.append(submit)
        stream = SequenceStream(updates_max, submit.attempt)
        for says in self.script:
            stream.deliver(
                engine_pb2.SequenceUpdate(
                    token_ids=says.token_ids, end=says.end, attempt=says.attempt or submit.attempt
                )
            )
        if self.loss is not None:
            stream.fail(SequenceLost(self.loss))
        return len(self.submits), stream

    def release(self, _sequence_id: int) -> None:
        self.released += 1


class Sessions:
    """A fleet that picks the first session that fits."""

    def __init__(self, *sessions: Session) -> None:
        self.sessions = sessions
        self.health = FleetHealth()
        self.models = ("demo",)
        self.demands: list[Demand] = []

    def choose(self, demand: Demand) -> tuple[Session, Choice] | None:
        self.demands.append(demand)
        for session in self.sessions:
            if not (session.endpoint.incarnation in demand.refused | demand.failed or session.load.refuses):
                candidate = Candidate(session.endpoint, session_up=True)
                return session, Choice(candidate, "only", (session.take_back,))
        return None

    def serves(self, demand: Demand) -> bool:
        return any(s.endpoint.incarnation not in demand.refused for s in self.sessions)

    def watch_room(self, *_: Any) -> None: ...


class Request:
    """Runs one request over ``sessions``; keeps what came."""

    def __init__(
        self,
        *sessions: Session,
        max_tokens: int = 6,
        resumed: tuple[int, ...] = (),
        text: TextStream | None = None,
        **config: Any,
    ) -> None:
        self.registry = CollectorRegistry()
        settings = RouterConfig(**{"failover_wait_s": 0.02, **config})
        fleet = cast("Fleet", Sessions(*sessions))
        around = self.around = Surroundings(fleet, settings, RouterMetrics(self.registry), MonotonicClock())
        sampling = SamplingParams(max_tokens=max_tokens, seed=1)
        valid = ValidRequest("id", "demo", (1, 2), resumed, sampling, (), 0, return_token_ids=True, cache_salt="tenant")
        self.run = RequestRun(valid, text, "sha256:a", around, around.clock.now())
        self.sessions = sessions
        self.token_ids: list[int] = []

    async def ended(self, deadline_s: float | None = None) -> Ended:
        async def emit(progress: Progress) -> None:
            self.token_ids += progress.token_ids

        try:
            return await asyncio.wait_for(self.run.run(emit, deadline_s), 2)
        finally:
            assert all(session.released == len(session.submits) for session in self.sessions)

    def losses(self) -> dict[str, float]:
        (family,) = [f for f in self.registry.collect() if f.name == "cluster_router_failovers"]
        return {s.labels["reason"]: s.value for s in family.samples if s.name.endswith("_total")}


async def test_another_endpoint_is_told_every_token_and_goes_on() -> None:
    first, second = Session(0, [Says([10]), Says([11, 12])]), Session(1, [Says([13, 14, 15], LENGTH)])
    request = Request(first, second)
    ended = await request.ended()
    assert request.token_ids == [10, 11, 12, 13, 14, 15]
    assert list(second.submits[0].generated_token_ids) == [10, 11, 12]
    assert [session.submits[0].cache_salt for session in (first, second)] == ["tenant", "tenant"]
    assert (ended.finish_reason, ended.usage.failovers) == (inference_pb2.FINISH_REASON_LENGTH, 1)
    assert request.losses() == {"broken": 1.0}


async def test_an_overflow_leaves_no_gap() -> None:
    chatter = [Says([10]), *[Says()] * (6 + UPDATES_SLACK), Says([99], LENGTH)]
    request = Request(Session(0, chatter, loss=None), Session(1, [Says([11, 12, 13, 14, 15], LENGTH)]))
    await request.ended()
    assert request.token_ids == [10, 11, 12, 13, 14, 15]
    assert request.losses() == {"overflow": 1.0}


async def test_more_tokens_than_asked_for_are_cut() -> None:
    request = Request(Session(0, [Says(range(10, 30), LENGTH)]))
    assert (await request.ended()).usage.generated_tokens == 6
    assert request.token_ids == [10, 11, 12, 13, 14, 15]


async def test_an_engine_that_breaks_after_the_last_token_is_no_loss() -> None:
    request = Request(Session(0, [Says([10, 11, 12, 13, 14, 15])]))
    assert (await request.ended()).usage.failovers == 0
    assert request.losses() == {}


async def test_updates_of_another_attempt_do_not_count() -> None:
    request = Request(Session(0, [Says([77], attempt=4), Says([10], LENGTH)]))
    await request.ended()
    assert request.token_ids == [10]


async def test_a_resumed_request_that_is_complete_asks_nobody() -> None:
    request = Request(resumed=(1, 2, 3, 4, 5, 6))
    assert (await request.ended()).usage.generated_tokens == 0


async def test_a_new_request_that_is_sent_back_tries_the_others_and_then_waits_its_time() -> None:
    full = [Session(slot, [Says(end=FULL)], loss=None) for slot in range(3)]
    with pytest.raises(RequestRejected, match="max_queue_wait_s"):
        await Request(*full, max_queue_wait_s=0.1).ended()
    assert [len(session.submits) for session in full] == [1, 1, 1]


async def test_a_request_is_not_sent_back_for_ever() -> None:
    full = [Session(slot, [Says(end=FULL)], loss=None) for slot in range(12)]
    with pytest.raises(RequestRejected, match="no room"):
        await Request(*full).ended()
    assert sum(len(session.submits) for session in full) == 1 + SENT_BACK_MAX


async def test_without_endpoints_it_says_so_even_after_one_had_no_room() -> None:
    request = Request(Session(0, [Says(end=FULL)], loss=None))
    cast("Any", request.around.fleet).serves = lambda _demand: False
    with pytest.raises(RequestRejected, match="takes new requests") as caught:
        await request.ended()
    assert caught.value.reject_reason is RejectReason.NO_ENDPOINT


async def test_what_never_left_is_no_loss_and_no_attempt() -> None:
    first, second = Session(0, [], unsent=1), Session(1, [Says([10, 11, 12, 13, 14, 15], LENGTH)])
    request = Request(first, second)
    assert (await request.ended()).usage.failovers == 0
    assert (request.losses(), first.submits, second.submits[0].attempt) == ({}, [], 1)
    assert (first.taken_back, second.taken_back) == (1, 0)
    assert request.registry.get_sample_value("cluster_router_prompt_tokens_total", {"model": "demo"}) == 2


async def test_what_never_left_after_a_loss_goes_elsewhere() -> None:
    broken, away = Session(0, [Says([10])]), Session(1, [], unsent=1)
    request = Request(broken, away, Session(2, [Says([11, 12, 13, 14, 15], LENGTH)]))
    assert (await request.ended()).usage.failovers == 1
    assert (request.token_ids, request.losses()) == ([10, 11, 12, 13, 14, 15], {"broken": 1.0})
    assert (broken.taken_back, away.taken_back) == (0, 1)


@pytest.mark.parametrize("broken", [0, 1])
async def test_a_request_does_not_try_to_leave_for_ever(broken: int) -> None:
    away = [Session(slot, [], unsent=99) for slot in range(1, 20)]
    with pytest.raises(EngineFailed if broken else RequestRejected, match="broke" if broken else "no room"):
        await Request(*[Session(0, [Says([10])])][:broken], *away, max_failovers=2).ended()
    assert sum(session.asked for session in away) == SENT_BACK_MAX + (2 if broken else 1)


async def test_the_engine_is_told_what_is_left_of_the_deadline_after_the_wait() -> None:
    session = Session(0, [Says([10, 11, 12, 13, 14, 15], LENGTH)])
    session.load.refused()
    asyncio.get_running_loop().call_later(0.1, session.load.reported, LoadSnapshot())
    await Request(session).ended(deadline_s=1.9)
    assert 0 < session.submits[0].deadline_s <= 1.8


@pytest.mark.parametrize("resumed", [(), (7, 8, 9)])
async def test_what_was_computed_is_charged_with_the_tokens_of_earlier_calls(resumed: tuple[int, ...]) -> None:
    request = Request(Session(0, [Says(range(6 - len(resumed)), LENGTH)]), resumed=resumed)
    charged: list[int] = []
    cast("Any", request.around.desk).close = lambda _ticket, tokens, _generated, **_: charged.append(tokens)
    await request.ended()
    assert charged == [2 + len(resumed)]


async def test_others_get_their_turn_while_the_text_of_earlier_calls_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    turns, pushed = 0, []
    plain = TextStream.push

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    def push(stream: TextStream, token_ids: Sequence[int]) -> Any:
        pushed.append((turns, len(token_ids)))
        return plain(stream, token_ids)

    monkeypatch.setattr(TextStream, "push", push)
    tokenizer = Tokenizer(small_tokenizers.files(small_tokenizers.byte_level()))
    count = 2 * REPLAYED_TOGETHER_MAX + 5
    text = TextStream(tokenizer.vocabulary, ())
    running = asyncio.create_task(others())
    await Request(max_tokens=count, resumed=(70,) * count, text=text).ended()
    running.cancel()
    assert [length for _, length in pushed] == [REPLAYED_TOGETHER_MAX, REPLAYED_TOGETHER_MAX, 5]
    assert len({turn for turn, _ in pushed}) == 3


async def test_who_left_a_slow_endpoint_may_come_back_to_it_and_is_not_counted_out() -> None:
    slow = Session(0, [Says([10])], loss=LossReason.SLOW)
    request = Request(slow, max_failovers=0)
    assert (await request.ended()).usage.failovers == 5
    assert [len(submit.generated_token_ids) for submit in slow.submits] == [0, 1, 2, 3, 4, 5]
    assert slow.taken_back == 0, "each time it got a token"
    demands = cast("Any", request.around.fleet).demands
    assert [(demand.settles, demand.failed) for demand in demands] == [(False, frozenset()), *[(True, frozenset())] * 5]


async def test_who_lost_a_broken_endpoint_after_a_slow_one_waits_for_a_sound_one() -> None:
    slow, broken = Session(0, [Says([10])], loss=LossReason.SLOW), Session(1, [Says([11])])
    request = Request(slow, broken, Session(2, [Says([12, 13, 14, 15], LENGTH)]))
    fleet = cast("Any", request.around.fleet)
    fleet.sessions = (broken, *request.sessions[2:])
    first = fleet.choose
    fleet.choose = lambda demand: first(demand) if demand.settles or demand.failed else (slow, first(demand)[1])
    await request.ended()
    assert request.losses() == {"slow": 1.0, "broken": 1.0}
    assert (fleet.demands[-1].settles, fleet.demands[-1].failed) == (False, frozenset({broken.endpoint.incarnation}))


class LeftAtOnce(Session):
    """The first sequence there is moved before it has got a token; the next one gets all."""

    def submit(self, *args: Any) -> tuple[int, SequenceStream]:
        self.script, self.loss = ([], LossReason.SLOW) if not self.submits else ([Says(range(6), LENGTH)], None)
        return super().submit(*args)


async def test_an_endpoint_that_is_left_before_the_first_token_was_not_used() -> None:
    slow = LeftAtOnce(0, [])
    await Request(slow).ended()
    assert (len(slow.submits), slow.taken_back) == (2, 1)


async def test_an_endpoint_that_says_nobody_could_serve_it_was_not_used() -> None:
    session = Session(0, [Says(end=INVALID)], loss=None)
    with pytest.raises(RequestRejected) as caught:
        await Request(session).ended()
    assert caught.value.reject_reason is RejectReason.INVALID
    assert session.taken_back == 1


async def test_losses_are_bounded() -> None:
    breaking = [Session(slot, [Says([10 + slot])]) for slot in range(5)]
    with pytest.raises(EngineFailed, match="3 replicas broke"):
        await Request(*breaking, max_failovers=2).ended()
    assert [len(session.submits) for session in breaking] == [1, 1, 1, 0, 0]


async def test_nobody_is_left_to_go_on() -> None:
    with pytest.raises(EngineFailed, match="failover_wait_s"):
        await Request(Session(0, [Says([10])])).ended()


async def test_a_deadline_after_the_first_token() -> None:
    request = Request(Session(0, [Says([10])], loss=None))
    with pytest.raises(RequestAborted) as caught:
        await request.ended(deadline_s=0.02)
    assert caught.value.abort_reason is AbortReason.DEADLINE
    assert request.token_ids == [10]


async def test_tokens_count_once_however_often_they_are_sent() -> None:
    request = Request(Session(0, [Says([10]), Says([11, 12])]), Session(1, [Says([13, 14, 15], LENGTH)]))
    await request.ended()
    labels = {"model": "demo"}
    assert request.registry.get_sample_value("cluster_router_prompt_tokens_total", labels) == 2
    assert request.registry.get_sample_value("cluster_router_generation_tokens_total", labels) == 6
