"""Waiting for an endpoint: woken in order, ended from every side, nothing kept. On a fleet of counters."""

import asyncio
import gc
import math
from collections.abc import Callable
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from cluster.config.schema import RouterConfig
from cluster.domain.clock import MonotonicClock
from cluster.domain.endpoint import Endpoint
from cluster.domain.errors import EngineFailed, RejectReason, RequestEvicted, RequestRejected
from cluster.domain.ids import Incarnation, ReplicaId
from cluster.router.admission_desk import CONTINUATIONS_TRIED, AdmissionDesk, Ticket
from cluster.router.endpoint_table import Candidate, LiveLoad
from cluster.router.fleet import Fleet
from cluster.router.interruption import Interruption
from cluster.router.policy.contracts import Choice, Demand
from cluster.router.session import EngineSession
from cluster.router.waiting_rank import Entry
from cluster.telemetry.metrics import RouterMetrics


class Session:
    """So many sequences at once, and one more."""

    def __init__(self, slot: int, slots: int) -> None:
        self.endpoint = Endpoint(Incarnation(ReplicaId("demo", slot), 1), "127.0.0.1:1", "sha256:a", 16)
        self.load = LiveLoad(16)
        self.load.max_num_seqs = slots


class Sessions:
    """A fleet that picks the first with room."""

    models = ("demo",)

    def __init__(self, *slots: int) -> None:
        self.sessions = [Session(slot, count) for slot, count in enumerate(slots)]
        self.picks = 0
        self.taken_back = 0
        self.places_elsewhere = 0

    def take_back(self) -> None:
        self.taken_back += 1

    def choose(self, demand: Demand) -> tuple[Session, Choice] | None:
        self.picks += 1
        for session in self.sessions:
            if session.load.has_room or not demand.needs_room:
                candidate = Candidate(session.endpoint, session_up=True)
                return session, Choice(candidate, "only", (self.take_back,))
        return None

    def serves(self, _demand: Demand) -> bool:
        return bool(self.sessions)

    def room_elsewhere(self, _model: str, _digest: str) -> float:
        return self.places_elsewhere

    def watch_room(self, at: Callable[[Any], None], anywhere: Callable[[], None]) -> None:
        self.room_at, self.changed = at, anywhere


class Desk:
    def __init__(self, *slots: int, **config: Any) -> None:
        self.registry = CollectorRegistry()
        self.fleet = Sessions(*slots)
        self.clock = MonotonicClock()
        settings = RouterConfig(**config)
        self.desk = AdmissionDesk(cast("Fleet", self.fleet), settings, RouterMetrics(self.registry), self.clock)
        self.served: list[str] = []

    def ticket(
        self, priority: int = 0, deadline_s: float = math.inf, tenant: str = "", digest: str = "sha256:a"
    ) -> Ticket:
        now_s = self.clock.now()
        entry = Entry(tenant, priority, 10, 20, now_s, now_s + deadline_s)
        return Ticket("demo", digest, entry, lambda needs_room: Demand("demo", digest, needs_room=needs_room), 10)

    async def placed(self, name: str, ticket: Ticket, interruption: Interruption | None = None) -> EngineSession:
        """Places it and sends it, as a request does."""
        found = await self.desk.place(ticket, interruption or Interruption())
        assert found is not None
        session, _ = found
        session.load.sent(ticket.tokens)
        self.served.append(name)
        return session

    def start(self, name: str, ticket: Ticket, interruption: Interruption | None = None) -> asyncio.Task[EngineSession]:
        return asyncio.create_task(self.placed(name, ticket, interruption))

    def end(self, ticket: Ticket, slot: int = 0) -> None:
        """A request that was placed is over."""
        session = self.fleet.sessions[slot]
        session.load.ended(ticket.tokens)
        self.fleet.room_at(session)
        self.desk.close(ticket, 10, 5, complete=True)

    async def full(self, *slots: int) -> list[Ticket]:
        """Fills every place."""
        tickets = []
        for _ in range(sum(count + 1 for count in slots)):
            tickets.append(self.ticket())
            await self.placed("first", tickets[-1])
        self.served.clear()
        return tickets

    def gauge(self, name: str) -> float | None:
        return self.registry.get_sample_value(f"cluster_router_{name}", {"model": "demo"})

    def check_empty(self) -> None:
        for line in self.desk._lines.values():
            assert not line.waiting
            assert not line.admission.queue
            line.admission.queue.check()
        assert self.gauge("queued_requests") in (None, 0)
        assert self.gauge("queued_prompt_tokens") in (None, 0)
        assert all(session.load._held_sequences == 0 for session in self.fleet.sessions)


async def turns(count: int = 4) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_with_room_nobody_waits_for_a_turn_of_the_loop() -> None:
    desk = Desk(2)
    coroutine = desk.placed("a", desk.ticket())
    with pytest.raises(StopIteration):
        coroutine.send(None)  # no await on the way
    assert desk.served == ["a"]
    desk.check_empty()


async def test_places_go_to_whose_turn_it_is() -> None:
    desk = Desk(1)
    first, second = await desk.full(1)
    tasks = [
        desk.start(name, desk.ticket(priority)) for name, priority in [("b", 0), ("batch", -1), ("a", 1), ("c", 0)]
    ]
    await turns()
    assert (desk.gauge("queued_requests"), desk.gauge("queued_prompt_tokens")) == (4, 40)
    desk.end(first)
    desk.end(second)
    await turns()
    assert desk.served == ["a", "b"]
    desk.end(first)
    await turns()
    desk.end(first)
    await turns()
    assert desk.served == ["a", "b", "c", "batch"]
    await asyncio.gather(*tasks)
    desk.check_empty()


async def test_one_place_is_given_once_however_much_happens_in_a_turn() -> None:
    desk = Desk(1)
    (first, _) = await desk.full(1)
    tasks = [desk.start(str(number), desk.ticket()) for number in range(3)]
    await turns()
    desk.end(first)
    for _ in range(5):
        desk.fleet.room_at(desk.fleet.sessions[0])
        desk.fleet.changed()
    await turns()
    assert desk.served == ["0"]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    desk.check_empty()


async def test_reports_cost_no_pick_while_there_is_no_room_or_nobody_waits() -> None:
    desk = Desk(1)
    first, second = await desk.full(1)
    task = desk.start("a", desk.ticket())
    await turns()
    picks = desk.fleet.picks
    for _ in range(100):
        desk.fleet.room_at(desk.fleet.sessions[0])
        await asyncio.sleep(0)
    assert desk.fleet.picks == picks
    desk.end(first)
    await task
    desk.end(second)
    picks = desk.fleet.picks
    desk.fleet.room_at(desk.fleet.sessions[0])
    await turns()
    assert desk.fleet.picks == picks


@pytest.mark.parametrize("when", ["waiting", "granted"])
@pytest.mark.parametrize("how", ["cancelled", "interrupted"])
async def test_a_request_ends_while_it_waits(when: str, how: str) -> None:
    desk = Desk(1)
    first, _ = await desk.full(1)
    interruption, ticket = Interruption(), desk.ticket()
    task, next_one = desk.start("a", ticket, interruption), desk.start("b", desk.ticket())
    await turns()
    if when == "granted":
        desk.end(first)
        await asyncio.sleep(0)  # the look; the task itself comes in the next turn
        assert ticket.entry.charged
    if how == "cancelled":
        task.cancel()
    else:
        interruption.trip(RequestEvicted("too late"))
    ends = await asyncio.gather(task, return_exceptions=True)
    if (when, how) == ("granted", "interrupted"):
        with pytest.raises(RequestEvicted):
            interruption.check()  # as the search does
    else:
        assert isinstance(ends[0], asyncio.CancelledError | RequestEvicted)
    # Of the choices that were made only the one for a request that was gone by then marks nothing.
    assert desk.fleet.taken_back == ((when, how) == ("granted", "cancelled"))
    if when == "waiting":
        desk.end(first)
        assert not ticket.entry.known
    elif how == "cancelled":
        desk.desk.close(ticket, 0, 0, complete=False)
        assert not ticket.entry.known
    if (when, how) != ("granted", "interrupted"):  # that one was sent in this test, and takes the place
        await asyncio.wait_for(next_one, 1)
    else:
        next_one.cancel()
        await asyncio.gather(next_one, return_exceptions=True)
    desk.check_empty()


async def test_who_is_interrupted_already_does_not_wait() -> None:
    desk = Desk(1)
    await desk.full(1)
    interruption = Interruption()
    interruption.trip(RequestEvicted("too late"))
    with pytest.raises(RequestEvicted):
        await desk.placed("a", desk.ticket(), interruption)
    desk.check_empty()


async def test_a_full_queue_says_when_to_come_back() -> None:
    desk = Desk(1, max_queued_requests=2)
    await desk.full(1)
    waiting = [desk.start(str(number), desk.ticket()) for number in range(2)]
    await turns()
    with pytest.raises(RequestRejected, match="try again in") as caught:
        await desk.placed("late", desk.ticket())
    assert caught.value.reject_reason is RejectReason.QUEUE_FULL
    assert caught.value.retry_after_s
    high = desk.start("high", desk.ticket(priority=1))
    with pytest.raises(RequestRejected, match="not this request's turn"):
        await waiting[1]
    for task in (waiting[0], high):
        task.cancel()
    await asyncio.gather(waiting[0], high, return_exceptions=True)
    desk.check_empty()


async def test_who_waits_for_too_long_is_told_so() -> None:
    desk = Desk(1, max_queue_wait_s=0.05)
    await desk.full(1)
    with pytest.raises(RequestRejected, match="negative priority") as caught:
        await asyncio.wait_for(desk.placed("a", desk.ticket()), 2)
    assert caught.value.retry_after_s
    desk.check_empty()


async def test_continuations_without_an_endpoint_keep_nobody_from_one() -> None:
    """Many streams of weights that nobody serves any more wait; new requests and other continuations go on."""
    desk = Desk(100)
    sound = desk.fleet.choose
    desk.fleet.choose = lambda demand: None if demand.checkpoint_digest == "gone" else sound(demand)  # type: ignore[method-assign]

    def continuation(digest: str) -> Ticket:
        ticket = desk.ticket()  # once of the same checkpoint, as all in one line
        ticket.entry.exempt = True
        ticket.demand = lambda needs_room: Demand("demo", digest, needs_room=needs_room)
        return ticket

    stuck = [desk.start("stuck", continuation("gone")) for _ in range(3 * CONTINUATIONS_TRIED)]
    await turns()
    await asyncio.wait_for(desk.placed("new", desk.ticket()), 2)
    await asyncio.wait_for(desk.placed("other", continuation("")), 2)
    assert desk.served == ["new", "other"]
    for task in stuck:
        task.cancel()
    await asyncio.gather(*stuck, return_exceptions=True)
    desk.check_empty()


async def test_a_deadline_that_the_wait_would_pass_is_told_at_once() -> None:
    desk = Desk(1)
    await desk.full(1)
    tasks = [desk.start(str(number), desk.ticket(-1)) for number in range(10)]
    await turns()
    line = desk.desk._lines["demo", "sha256:a"]
    line.admission._rate.per_second = lambda _priority, _now_s: 100.0  # type: ignore[method-assign]
    with pytest.raises(RequestEvicted, match="longer than its deadline"):
        await desk.placed("a", desk.ticket(-1, deadline_s=0.5))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    desk.check_empty()


async def test_when_the_last_endpoint_is_gone_new_requests_go_and_lost_ones_stay() -> None:
    desk = Desk(1)
    await desk.full(1)
    lost = desk.ticket()
    lost.entry.exempt, lost.entry.due_s = True, desk.clock.now() + 60
    tasks = [desk.start("lost", lost), *(desk.start(str(number), desk.ticket()) for number in range(3))]
    await turns()
    gone, desk.fleet.sessions = desk.fleet.sessions, []
    desk.fleet.changed()
    done, _ = await asyncio.wait(tasks, timeout=0.1, return_when=asyncio.ALL_COMPLETED)
    assert done == set(tasks[1:])
    for task in done:
        with pytest.raises(AssertionError):  # place returned None
            task.result()
    assert await desk.desk.place(desk.ticket(), Interruption()) is None
    desk.fleet.sessions = [Session(1, 1)]
    desk.fleet.changed()
    assert await asyncio.wait_for(tasks[0], 1) is desk.fleet.sessions[0]
    desk.fleet.sessions = gone + desk.fleet.sessions
    desk.check_empty()


async def test_a_lost_request_goes_first_and_gives_up_after_its_time() -> None:
    desk = Desk(1)
    first, second = await desk.full(1)
    new = desk.start("new", desk.ticket(priority=9))
    await turns()
    lost = desk.ticket(priority=-9)
    lost.entry.exempt, lost.entry.due_s = True, desk.clock.now() + 60
    task = desk.start("lost", lost)
    late = desk.ticket()
    late.entry.exempt, late.entry.due_s = True, desk.clock.now() + 0.02
    with pytest.raises(EngineFailed, match="failover_wait_s"):
        await asyncio.wait_for(desk.placed("late", late), 2)
    desk.end(first)
    await task
    desk.end(second)
    await new
    assert desk.served == ["lost", "new"]
    desk.check_empty()


async def test_room_that_nobody_reports_is_found_all_the_same() -> None:
    desk = Desk(1)
    await desk.full(1)
    task = desk.start("a", desk.ticket())
    await turns()
    desk.fleet.sessions[0].load.ended(10)
    await asyncio.wait_for(task, 2)
    desk.check_empty()


async def test_nothing_is_kept_of_models_that_are_gone() -> None:
    desk = Desk(1)
    await desk.placed("a", ticket := desk.ticket())
    desk.fleet.models = ()
    desk.fleet.serves = lambda _demand: False  # type: ignore[method-assign]
    desk.fleet.changed()
    assert len(desk.desk._lines) == 1, "its request may come back"
    desk.end(ticket)
    desk.fleet.changed()
    assert not desk.desk._lines
    gc.collect()
    desk.check_empty()


async def test_a_request_that_runs_comes_back_to_the_line_of_those_that_came_after_it() -> None:
    desk = Desk(4)
    others = [desk.ticket(digest="sha256:a"), desk.ticket(digest="sha256:c")]
    lost, follower = desk.ticket(digest="sha256:b"), desk.ticket(digest="sha256:b")
    for ticket in (*others, lost, follower):
        await desk.placed("first", ticket)
    fleet = cast("Any", desk.fleet)
    fleet.serves = lambda demand: demand.checkpoint_digest != "sha256:b"
    desk.fleet.changed()  # the only replica of that checkpoint has broken, and two others have lines
    fleet.serves = lambda _demand: True
    last = desk.ticket(digest="sha256:b")
    await desk.placed("first", last)  # it is back, and full again
    desk.served.clear()
    lost.entry.exempt, lost.entry.due_s = True, desk.clock.now() + 60
    continuation = desk.start("continuation", lost)
    await turns()
    new = desk.start("new", newcomer := desk.ticket(digest="sha256:b"))
    await turns()
    assert desk.gauge("queued_requests") == 2
    for ticket in (*others, follower, last):
        desk.end(ticket)
    await asyncio.wait_for(asyncio.gather(continuation, new), 5)
    assert desk.served == ["continuation", "new"]
    desk.end(newcomer)
    desk.check_empty()


async def test_a_newcomer_to_a_full_fleet_looks_for_nobody_else() -> None:
    desk = Desk(2, max_queue_wait_s=60.0)
    first = await desk.full(2)
    going_on = [desk.ticket() for _ in range(40)]
    for ticket in going_on:
        ticket.entry.exempt, ticket.entry.due_s = True, desk.clock.now() + 60
    waiting = [desk.start(f"lost {index}", ticket) for index, ticket in enumerate(going_on)]
    await turns()
    before = desk.fleet.picks
    newcomers = [desk.start("new", desk.ticket()) for _ in range(3)]
    await turns(1)
    assert desk.fleet.picks - before <= 3, "one each"
    desk.end(first[0])
    late = desk.start("late", desk.ticket())  # before anybody has looked
    await turns()
    assert desk.served == ["lost 0"]
    for task in (*waiting, *newcomers, late):
        task.cancel()
    await asyncio.wait([*waiting, *newcomers, late])
    desk.check_empty()


async def test_one_look_gives_all_the_places_there_are() -> None:
    desk = Desk(3)
    first = await desk.full(3)
    gone = desk.start("gone", desk.ticket())
    tasks = [desk.start(str(number), desk.ticket()) for number in range(5)]
    await turns()
    picks = desk.fleet.picks
    gone.cancel()  # its answer is there when the look comes to it
    session = desk.fleet.sessions[0]
    for ticket in first[:3]:
        session.load.ended(ticket.tokens)
    desk.fleet.room_at(session)
    await turns(2)
    assert desk.served == ["0", "1", "2"]
    assert desk.fleet.picks - picks <= 4
    for task in tasks:
        task.cancel()
    await asyncio.wait([gone, *tasks])
    desk.check_empty()


async def test_each_checkpoint_has_a_queue_of_its_own() -> None:
    """Nobody waits for what others wait for: order, estimates and places are those of one's own replicas."""
    desk = Desk(1, max_queue_wait_s=60.0)
    first = await desk.full(1)
    sound = desk.fleet.choose
    desk.fleet.choose = lambda demand: None if demand.checkpoint_digest == "full" else sound(demand)  # type: ignore[method-assign]
    others = [desk.start("other", desk.ticket(1, digest="full")) for _ in range(100)]
    await turns()
    waiting = [
        desk.start(name, desk.ticket(priority, tenant=tenant))
        for name, priority, tenant in [
            ("batch", -1, "a"),
            ("1", 0, "a"),
            ("2", 0, "a"),
            ("light", 0, "b"),
            ("high", 1, "a"),
        ]
    ]
    await turns()
    assert desk.gauge("queued_requests") == 105
    desk.desk._lines["demo", "full"].admission._rate.per_second = lambda _priority, _now_s: 1.0  # type: ignore[method-assign]
    with pytest.raises(RequestEvicted, match="longer than its deadline"):
        await desk.placed("late", desk.ticket(deadline_s=30.0, digest="full"))
    urgent = desk.start("urgent", desk.ticket(2, deadline_s=30.0))
    for _ in range(6):
        await turns()
        desk.end(first[0])
    await turns()
    assert desk.served == ["urgent", "high", "light", "1", "2", "batch"]
    for task in others:
        task.cancel()
    await asyncio.wait([*waiting, urgent, *others])
    desk.check_empty()


async def test_as_many_move_to_another_checkpoint_as_find_a_place_there() -> None:
    """By level and arrival, and nothing that has tokens; nobody while others wait there."""
    desk = Desk(1, max_queue_wait_s=60.0)
    await desk.full(1)
    sound = desk.fleet.choose
    desk.fleet.choose = lambda demand: None if demand.checkpoint_digest == "new" else sound(demand)  # type: ignore[method-assign]
    waiting: dict[str, asyncio.Task[Any]] = {}
    for name, priority in [("going on", 5), ("pinned", 5), ("batch", -1), ("1", 0), ("2", 0), ("high", 1), ("3", 0)]:
        ticket = desk.ticket(priority)
        ticket.movable = name != "pinned"
        ticket.entry.exempt = name == "going on"
        waiting[name] = asyncio.create_task(desk.desk.place(ticket, Interruption()))
    there = asyncio.create_task(desk.desk.place(desk.ticket(digest="new"), Interruption()))
    desk.fleet.places_elsewhere = 3
    await turns()
    assert not any(task.done() for task in waiting.values()), "somebody waits there"
    there.cancel()
    await asyncio.wait([there])
    desk.fleet.changed()
    await turns()
    assert [name for name, task in waiting.items() if task.done()] == ["1", "2", "high"]
    assert {task.result() for task in waiting.values() if task.done()} == {None}
    for task in waiting.values():
        task.cancel()
    await asyncio.wait(list(waiting.values()))
    desk.check_empty()


async def test_queues_of_checkpoints_that_nobody_serves_any_more_are_forgotten() -> None:
    desk = Desk(1)
    await desk.full(1)
    desk.fleet.serves = lambda demand: demand.checkpoint_digest != "gone"  # type: ignore[method-assign]
    for digest in ("gone", "kept", "sha256:a"):
        desk.desk._line("demo", digest)
    desk.fleet.changed()
    assert {digest for _, digest in desk.desk._lines} == {"kept", "sha256:a"}
