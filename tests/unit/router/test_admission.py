"""Who may wait: single decisions, invariants under everything that may come, and the goals under overload."""

import math
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.router.admission import (
    RETRY_MAX_S,
    RETRY_MIN_S,
    RETRY_UNKNOWN_S,
    STALE_MAX,
    Admission,
    AdmissionLimits,
    Refusal,
    SentAway,
)
from cluster.router.waiting_rank import Entry
from tests.unit.router.admission_model import LIMITS, Model, poisson

SMALL = AdmissionLimits(max_requests=3, max_prompt_tokens=100, ttft_objective_s=2.0)


def entry(
    tenant: str = "", priority: int = 0, prompt: int = 10, arrived_s: float = 0.0, deadline_s: float = math.inf
) -> Entry:
    return Entry(tenant, priority, prompt, 40, arrived_s, deadline_s)


def measured(per_second: float, limits: AdmissionLimits = LIMITS) -> Admission:
    """One whose queue has drained so many requests a second until the time 10, and is empty."""
    admission = Admission(limits)
    first = entry(priority=-1)
    admission.offer(first, 0.0)
    now_s, step_s = 0.0, 1.0 / per_second
    while now_s < 10.0 - step_s:
        now_s += step_s
        one = entry(priority=-1)
        admission.offer(one, now_s)
        admission.take(one, now_s)
    admission.take(first, 10.0)
    return admission


class TestBounds:
    def test_requests(self) -> None:
        admission = Admission(SMALL)
        for _ in range(3):
            assert admission.offer(entry(), 0.0) == ()
        (away,) = admission.offer(last := entry(), 0.0)
        assert (away.entry, away.refusal, away.retry_after_s) == (last, Refusal.QUEUE_FULL, RETRY_UNKNOWN_S)
        assert not last.queued

    def test_prompt_tokens(self) -> None:
        admission = Admission(SMALL)
        assert admission.offer(entry(prompt=60), 0.0) == ()
        assert admission.offer(entry(prompt=41), 0.0)[0].refusal is Refusal.QUEUE_FULL
        assert admission.offer(entry(prompt=40), 0.0) == ()

    def test_a_prompt_over_the_bound_waits_alone(self) -> None:
        admission = Admission(SMALL)
        assert admission.offer(entry(prompt=500), 0.0) == ()
        assert admission.offer(entry(prompt=1), 0.0)[0].refusal is Refusal.QUEUE_FULL

    def test_a_newcomer_of_higher_priority_pushes_out_the_youngest_of_the_lowest(self) -> None:
        admission = Admission(SMALL)
        waiting = [entry(priority=p) for p in (-1, 0, -1)]
        for one in waiting:
            admission.offer(one, 0.0)
        (away,) = admission.offer(newcomer := entry(), 0.0)
        assert (away.entry, away.refusal) == (waiting[2], Refusal.QUEUE_FULL)
        assert newcomer.queued
        assert not waiting[2].queued

    def test_continuations_are_outside_of_them(self) -> None:
        admission = Admission(SMALL)
        lost = [entry(prompt=90) for _ in range(5)]
        for one in lost:
            admission.pass_through(one)
            one.exempt = True
            assert admission.offer(one, 0.0) == ()
        assert admission.queue.requests == 0
        assert admission.offer(entry(prompt=90), 0.0) == ()

    def test_what_an_endpoint_sent_back_waits_again_even_where_it_is_full(self) -> None:
        admission = Admission(SMALL)
        admission.pass_through(first := entry())
        for _ in range(3):
            admission.offer(entry(), 0.0)
        assert admission.offer(first, 0.0) == ()
        assert admission.queue.requests == 4
        assert first.due_s == pytest.approx(2.0)


class TestTime:
    def test_who_cannot_start_before_the_deadline_is_told_at_once(self) -> None:
        admission = measured(10)
        for _ in range(20):
            assert admission.offer(entry(priority=-1, arrived_s=10.0), 10.0) == ()
        (away,) = admission.offer(entry(priority=-1, arrived_s=10.0, deadline_s=11.5), 10.0)
        assert away.refusal is Refusal.DEADLINE
        assert away.wait_s == pytest.approx(2.0, rel=0.1)
        assert admission.offer(entry(priority=-1, arrived_s=10.0, deadline_s=12.5), 10.0) == ()

    def test_who_cannot_start_in_time_is_told_at_once_and_when_to_come_back(self) -> None:
        admission = measured(10, AdmissionLimits(1000, 100_000, 2.0, max_wait_s=4.0))
        sent_away: list[SentAway] = []
        for _ in range(80):
            sent_away += admission.offer(entry(arrived_s=10.0), 10.0)
        assert sum(not one.late for one in admission.queue) == pytest.approx(11, abs=2)  # about one second of work
        assert admission.queue.requests == pytest.approx(41, abs=5)  # about four
        assert {one.refusal for one in sent_away} == {Refusal.WAIT}
        retries_s = [one.retry_after_s for one in sent_away]
        assert retries_s == sorted(retries_s)  # not all at once
        assert retries_s[-1] - retries_s[0] == pytest.approx((len(retries_s) - 1) / 10, rel=0.1)

    def test_who_has_no_time_takes_no_turn_of_those_that_come_back(self) -> None:
        admission = measured(10, AdmissionLimits(20, 100_000, 2.0))
        for _ in range(20):
            admission.offer(entry(priority=-1, arrived_s=10.0), 10.0)
        before = admission.offer(entry(priority=-1, arrived_s=10.0), 10.0)[0].retry_after_s
        for _ in range(20):
            (away,) = admission.offer(entry(priority=-1, arrived_s=10.0, deadline_s=10.5), 10.0)
            assert away.refusal is Refusal.DEADLINE
        after = admission.offer(entry(priority=-1, arrived_s=10.0), 10.0)[0].retry_after_s
        assert after - before < 0.15  # one turn

    def test_continuations_that_find_no_endpoint_delay_nobody_else(self) -> None:
        admission = Admission(LIMITS)
        for _ in range(17):
            one = entry(prompt=10_000)
            admission.pass_through(one)
            one.exempt = True
            admission.offer(one, 0.0)
        for number in range(50):  # others come and go meanwhile, none of them waits
            admission.pass_through(one := entry(arrived_s=0.1 * number))
            admission.ended(one, 10, 10, complete=True)
        assert admission.wait_s("", (1, 0), 5.0) is None
        assert admission.offer(entry(arrived_s=5.0, deadline_s=6.0), 5.0) == ()

    def test_what_was_measured_long_ago_judges_nobody(self) -> None:
        admission = measured(10)
        assert admission.wait_s("", (1, 0), 11.0) == 0.0
        for _ in range(20):
            assert admission.offer(entry(arrived_s=9999.0, deadline_s=10_000.0), 9999.0) == ()
        assert admission.wait_s("", (1, 0), 9999.0) is None

    def test_batch_work_waits_as_long_as_its_client_does(self) -> None:
        admission = measured(10)
        for _ in range(100):
            assert admission.offer(entry(priority=-1, arrived_s=10.0), 10.0) == ()
        assert admission.next_due_s == math.inf

    def test_who_has_waited_past_the_objective_stands_behind_all_that_can_still_be_good(self) -> None:
        admission = Admission(LIMITS)
        batch = entry(priority=-1)
        for one in (batch, first := entry(priority=7), second := entry(arrived_s=0.7)):
            admission.offer(one, one.arrived_s)
        assert admission.next_due_s == 2.0
        assert admission.expire(1.9) == ()
        assert admission.queue.head() is first
        assert admission.expire(2.0) == ()
        assert first.late
        assert admission.queue.head() is second
        admission.take(second, 2.1)
        assert admission.queue.head() is first  # before batch work
        admission.queue.check()

    def test_who_has_waited_for_the_longest_is_sent_away(self) -> None:
        admission = Admission(AdmissionLimits(100, 1000, 2.0, max_wait_s=5.0))
        admission.offer(first := entry(arrived_s=0.0), 0.5)
        admission.offer(second := entry(arrived_s=3.7), 3.7)
        assert admission.expire(4.9) == ()
        assert [(one.entry, one.refusal) for one in admission.expire(5.0)] == [(first, Refusal.WAIT)]
        admission.take(second, 5.1)
        assert admission.next_due_s == math.inf
        assert admission.expire(99.0) == ()

    def test_a_newcomer_in_time_pushes_out_who_is_late(self) -> None:
        admission = Admission(SMALL)
        waiting = [entry(priority=1, arrived_s=arrived_s) for arrived_s in (0.0, 0.1, 0.2)]
        for one in waiting:
            admission.offer(one, one.arrived_s)
        admission.expire(2.2)
        (away,) = admission.offer(newcomer := entry(arrived_s=2.5), 2.5)
        assert (away.entry, away.refusal) == (waiting[2], Refusal.QUEUE_FULL)
        assert admission.queue.head() is newcomer

    def test_the_wait_ends_early_enough_for_a_first_token(self) -> None:
        admission = Admission(LIMITS)
        for _ in range(500):
            admission.first_token_after(entry(), 0.6)
        admission.offer(entry(), 0.0)
        assert admission.next_due_s == pytest.approx(1.4, abs=0.01)
        for _ in range(500):
            admission.first_token_after(entry(), 60.0)
        admission.offer(entry(arrived_s=20.0), 20.0)
        admission.expire(5.0)
        assert admission.next_due_s == 20.5  # a quarter of the objective in any case

    def test_a_burst_that_nobody_follows_is_served_to_its_end(self) -> None:
        admission = measured(10)
        burst = [entry(arrived_s=10.0) for _ in range(250)]
        assert [away for one in burst for away in admission.offer(one, 10.0)] == []
        now_s, served = 10.0, 0
        while (head := admission.queue.head()) is not None:
            now_s += 0.1
            assert admission.expire(now_s) == ()
            admission.take(head, now_s)
            served += 1
        assert served == 250

    def test_light_tenants_do_not_wait_behind_a_heavy_one(self) -> None:
        admission = measured(10)
        for _ in range(200):
            admission.offer(entry("heavy", arrived_s=10.0), 10.0)
        light_s, heavy_s = admission.wait_s("light", (1, 0), 10.0), admission.wait_s("heavy", (1, 0), 10.0)
        assert light_s is not None
        assert heavy_s is not None
        assert light_s == pytest.approx(0.1, rel=0.2)
        assert heavy_s == pytest.approx(1.0, abs=0.2)


def test_due_times_of_those_who_left_are_not_kept_for_ever() -> None:
    admission = Admission(AdmissionLimits(10, 1000, 2.0, max_wait_s=1e6))
    for number in range(5000):
        admission.offer(one := entry(arrived_s=float(number)), float(number))
        admission.take(one, float(number))
        admission.ended(one, 10, 10, complete=True)
    assert len(admission._due) <= STALE_MAX + 3


class Life(RuleBasedStateMachine):
    """Every request that comes leaves in one way, whatever happens, and the bounds hold."""

    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(SMALL)
        self.now_s = 0.0
        self.waiting: list[Entry] = []
        self.placed: list[Entry] = []
        self.returned: set[Entry] = set()
        self.ends: dict[Entry, str] = {}

    def offered(self, one: Entry) -> None:
        self.waiting.append(one)
        for away in self.admission.offer(one, self.now_s):
            self.sent_away(away)

    def sent_away(self, away: SentAway) -> None:
        if away.refusal is Refusal.DEADLINE or away.entry.exempt:
            assert away.retry_after_s == 0.0
        else:
            assert RETRY_MIN_S <= away.retry_after_s <= RETRY_MAX_S
        assert not away.entry.queued
        self.waiting.remove(away.entry)
        self.over(away.entry, away.refusal.value)

    def over(self, one: Entry, how: str) -> None:
        assert one not in self.ends, "a request ended twice"
        self.ends[one] = how
        if one.charged:
            self.admission.ended(one, 1, 1, complete=False)

    @rule(
        tenant=st.sampled_from("ab"), priority=st.integers(-1, 1), prompt=st.integers(1, 120), patience=st.floats(0, 4)
    )
    def comes(self, tenant: str, priority: int, prompt: int, patience: float) -> None:
        self.offered(Entry(tenant, priority, prompt, 20, self.now_s, self.now_s + patience))

    @rule(tenant=st.sampled_from("ab"))
    def passes(self, tenant: str) -> None:
        one = Entry(tenant, 0, 5, 20, self.now_s)
        self.admission.pass_through(one)
        self.placed.append(one)

    @rule()
    def room(self) -> None:
        head = next(iter(self.admission.queue.exempt), None) or self.admission.queue.head()
        assert (head is None) == (not self.waiting)
        if head is not None:
            self.admission.take(head, self.now_s)
            self.waiting.remove(head)
            self.placed.append(head)

    @precondition(lambda self: self.placed)
    @rule(data=st.data(), how=st.sampled_from(["completed", "lost", "sent back", "passes again"]))
    def ends_or_returns(self, data: st.DataObject, how: str) -> None:
        one = data.draw(st.sampled_from(self.placed))
        self.placed.remove(one)
        if how == "lost":
            one.exempt, one.due_s = True, self.now_s + 3
            self.offered(one)
        elif how == "sent back" and not one.exempt:
            self.returned.add(one)
            self.offered(one)
        elif how == "passes again":
            self.admission.pass_through(one)
            self.placed.append(one)
        else:
            self.over(one, how)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def client_leaves(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(one)
        self.admission.withdraw(one, self.now_s)
        self.over(one, "withdrawn")

    @rule(passed_s=st.floats(0.01, 1.5))
    def time_passes(self, passed_s: float) -> None:
        self.now_s += passed_s
        for away in self.admission.expire(self.now_s):
            self.sent_away(away)

    @invariant()
    def consistent(self) -> None:
        self.admission.queue.check()
        assert set(self.admission.queue) == set(self.waiting)
        assert all(one.due_s > self.now_s or one in self.returned for one in self.waiting)
        fresh = [one for one in self.waiting if not one.exempt and one not in self.returned]
        assert len(fresh) <= SMALL.max_requests
        assert len(fresh) < 2 or sum(one.prompt_tokens for one in fresh) <= SMALL.max_prompt_tokens

    def teardown(self) -> None:
        for one in [*self.waiting]:
            self.admission.withdraw(one, self.now_s)
            self.over(one, "withdrawn")
        for one in self.placed:
            self.over(one, "completed")
        assert not self.admission.queue
        assert not any(account.live for account in self.admission._served._accounts.values())


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


CAPACITY = 4 * 16 / (40 * 0.03)  # requests per second of the model's replicas


def overload(times: float, seed: int) -> Model:
    """20 s of so many times the capacity, one request in twenty of high priority; then 10 s of seven tenths of it."""
    rng = random.Random(seed)
    model = Model()
    high = poisson(rng, CAPACITY * times, 0, 20, priority=lambda r: int(r.random() < 0.05))
    model.run(high + poisson(rng, CAPACITY * 0.7, 20, 30))
    return model


@pytest.mark.parametrize("times", [2, 5, 10])
def test_overload(times: float) -> None:
    """What is served is good, whatever comes beside it; high priority does not notice; soon all is as before."""
    peak = max(overload(level, seed=7).goodput(3, 20) for level in (1, 1.2))
    model = overload(times, seed=8)
    assert model.goodput(3, 20) >= 0.9 * peak
    high = [a for a in model.arrivals if a.priority == 1]
    assert sum(a.good(LIMITS.ttft_objective_s) for a in high) >= 0.99 * len(high)
    assert model.most_waiting <= LIMITS.max_requests
    late = [a.at_s for a in model.arrivals if a.at_s >= 20 and not a.good(LIMITS.ttft_objective_s)]
    assert max(late, default=20.0) <= 25.0


def test_below_capacity_nobody_is_sent_away() -> None:
    model = overload(0.8, seed=9)
    assert not any(a.away for a in model.arrivals)
    assert model.goodput(3, 20) == pytest.approx(0.8 * CAPACITY, rel=0.1)


def test_a_tenant_that_sends_fifty_times_as_much_gets_its_share_and_alone_everything() -> None:
    rng, model = random.Random(5), Model()
    light = [a for tenant in "ab" for a in poisson(rng, CAPACITY / 2, 0, 20, tenant=tenant)]
    model.run(light + poisson(rng, CAPACITY * 25, 0, 30, tenant="heavy"))
    served = model.tokens_of(5, 20)
    for tenant in ("a", "b", "heavy"):
        assert served[tenant] / served.total() == pytest.approx(1 / 3, rel=0.1)
    assert model.goodput(22, 30) >= 0.9 * CAPACITY


def test_a_tenant_within_its_share_does_not_notice_the_others() -> None:
    rng, model = random.Random(6), Model()
    model.run(poisson(rng, CAPACITY / 10, 0, 20, tenant="light") + poisson(rng, CAPACITY * 5, 0, 20, tenant="heavy"))
    assert model.share("tenant", "light") >= 0.99
