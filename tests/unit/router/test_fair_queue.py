"""The order of the queue, its bounds, and that nothing is lost in it."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from cluster.router.fair_queue import PUSHED_OUT_MAX, FairQueue
from cluster.router.served_tokens import ServedTokens
from cluster.router.waiting_rank import Entry


def entry(tenant: str = "", priority: int = 0, cost: float = 10.0, prompt: int = 4, *, exempt: bool = False) -> Entry:
    return Entry(tenant, priority, prompt, 8, 0.0, cost=cost, exempt=exempt)


class Queue:
    """A FairQueue whose tenants are known and charged as admission does it."""

    def __init__(self) -> None:
        self.served = ServedTokens()
        self.queue = FairQueue(self.served)

    def add(self, *entries: Entry) -> None:
        for one in entries:
            if not one.known:
                self.served.entered(one.tenant)
                one.known = True
            self.queue.add(one)

    def next(self) -> Entry | None:
        head = next(iter(self.queue.exempt), None) or self.queue.head()
        if head is not None:
            self.queue.remove(head)
            self.served.charge(head.tenant, head.cost)
        return head

    def order(self) -> list[Entry]:
        return list(iter(self.next, None))


def test_one_tenant_is_served_in_order_of_arrival() -> None:
    queue, entries = Queue(), [entry() for _ in range(5)]
    queue.add(*entries)
    assert queue.order() == entries


def test_continuations_go_before_every_priority() -> None:
    queue = Queue()
    high, lost, lost_later = entry(priority=9), entry(exempt=True), entry(exempt=True)
    queue.add(high, lost, lost_later)
    assert (queue.queue.requests, queue.queue.prompt_tokens, len(queue.queue)) == (1, 4, 3)
    assert queue.order() == [lost, lost_later, high]


def test_priorities_are_strict() -> None:
    queue = Queue()
    entries = {p: entry(str(p), p) for p in (0, -5, 7, 3)}
    queue.add(*entries.values())
    assert queue.order() == [entries[p] for p in (7, 3, 0, -5)]


def test_tenants_take_turns_by_what_they_cost() -> None:
    queue = Queue()
    dear = [entry("dear", cost=30) for _ in range(4)]
    cheap = [entry("cheap", cost=10) for _ in range(12)]
    queue.add(*dear, *cheap)
    assert [one.tenant for one in queue.order()] == ["dear", "cheap", "cheap", "cheap"] * 4


def test_who_comes_back_has_saved_nothing_up_and_keeps_its_debt() -> None:
    queue = Queue()
    queue.add(*[entry("busy", cost=10) for _ in range(20)])
    for _ in range(10):
        queue.next()
    queue.add(*[entry("new", cost=10) for _ in range(4)])
    assert [one.tenant for one in itertools.islice(iter(queue.next, None), 8)] == ["busy", "new"] * 4
    queue.served.correct("new", 25.0)  # its answers were longer than expected
    queue.add(entry("new", cost=10))
    assert [one.tenant for one in queue.order()] == ["busy"] * 3 + ["new"] + ["busy"] * 3


def test_who_is_sent_back_keeps_its_place() -> None:
    queue, entries = Queue(), [entry() for _ in range(5)]
    queue.add(*entries)
    taken = [queue.next() for _ in range(3)]
    assert taken == entries[:3]
    queue.add(*(entries[i] for i in (2, 0, 1)))
    assert queue.order() == entries


def test_the_work_ahead_is_that_which_goes_first() -> None:
    queue = Queue()
    queue.add(*[entry("heavy", cost=10) for _ in range(50)], entry("vip", priority=5, cost=7))
    ahead = queue.queue.cost_ahead
    assert ahead("heavy", (1, 0)) == 507
    assert ahead("light", (1, 0)) == 17  # the one of higher priority and one turn of the other tenant
    assert ahead("light", (1, 5)) == 7
    assert ahead("heavy", (1, 6)) == 0
    queue.add(entry("light", cost=30))
    assert ahead("light", (1, 0)) == 30 + 7 + 40


def test_levels_have_one_account_for_each_tenant() -> None:
    """What is late, batch work and traffic of higher priority move nobody's turn on a level that they are not on."""
    queue = Queue()
    first, other = entry("a"), entry("b")
    queue.add(first, other)
    queue.served.entered("urgent")
    for _ in range(50):
        queue.served.charge("urgent", 100.0)
    assert queue.served.floor > 1000
    queue.queue.becomes_late(first)
    queue.add(entry("a", -1), entry("b", -1))
    assert queue.served.counter("a") == queue.served.counter("b") == 0
    queue.served.entered("new", queue.queue.least_counter((1, 0)))
    assert queue.served.counter("new") == 0
    queue.queue.check()


def test_what_is_late_stands_behind_all_that_is_not_and_before_batch_work() -> None:
    queue = Queue()
    batch, late, urgent, plain = entry("a", -1), entry("a", 0), entry("b", 5), entry("a", 0)
    queue.add(batch, late, urgent, plain)
    for one in (urgent, late):
        queue.queue.becomes_late(one)
    assert queue.queue.cost_ahead("a", (0, 0)) == plain.cost + urgent.cost + late.cost
    assert queue.order() == [plain, urgent, late, batch]


def test_the_lowest_priority_and_its_youngest_make_room() -> None:
    queue = Queue()
    batch = [entry("a", -1) for _ in range(2)]
    queue.add(entry("a"), *batch, entry("b", -1))
    assert queue.queue.pushed_out_by(entry("c", 1), 1, 0) == (batch[1],)
    assert queue.queue.pushed_out_by(entry("c", -1), 1, 0) == (batch[1],)
    assert queue.queue.pushed_out_by(entry("b", -1), 1, 0) is None  # no tenant has more than it would have
    assert queue.queue.pushed_out_by(entry("c", -2), 1, 0) is None


def test_a_tenant_with_much_waiting_makes_room_for_one_with_little() -> None:
    queue = Queue()
    heavy = [entry("heavy") for _ in range(6)]
    queue.add(*heavy, entry("light"), entry("light"))
    assert queue.queue.pushed_out_by(entry("light"), 1, 0) == (heavy[5],)
    assert queue.queue.pushed_out_by(entry("heavy"), 1, 0) is None
    assert queue.queue.pushed_out_by(entry("light"), 1, 11) == (heavy[5], heavy[4], heavy[3])
    assert queue.queue.pushed_out_by(entry("light"), 1, 13) is None  # that many it may not ask for


def test_continuations_come_in_order_of_arrival_however_they_began_to_wait() -> None:
    queue = Queue()
    entries = [entry("a") for _ in range(40)]
    queue.add(*entries)
    for one in entries:
        queue.queue.remove(one)
        one.exempt = True
    shuffled = [*entries[::3], *entries[1::3], *entries[2::3]]
    for number, one in enumerate(shuffled, start=1):
        queue.queue.add(one)
        assert queue.queue.continuations == number
    assert list(queue.queue.exempt) == entries
    queue.queue.remove(entries[7])
    queue.queue.add(entries[7])
    assert list(queue.queue.exempt) == entries
    queue.queue.check()


def test_of_its_own_level_a_newcomer_pushes_out_a_few_and_of_lower_ones_as_many_as_it_takes() -> None:
    queue = Queue()
    queue.add(*[entry("a", -1) for _ in range(50)])
    tokens = PUSHED_OUT_MAX * entry("a").prompt_tokens
    assert len(queue.queue.pushed_out_by(entry("b", -1), 1, tokens) or ()) == PUSHED_OUT_MAX
    assert queue.queue.pushed_out_by(entry("b", -1), 1, tokens + 1) is None
    assert len(queue.queue.pushed_out_by(entry("b"), 1, tokens + 1) or ()) == PUSHED_OUT_MAX + 1
    assert len(queue.queue.pushed_out_by(entry("b"), 50, 0) or ()) == 50
    assert queue.queue.pushed_out_by(entry("b"), 51, 0) is None


ENTRIES = st.builds(
    entry,
    tenant=st.sampled_from("abcd"),
    priority=st.integers(-1, 1),
    cost=st.integers(1, 50).map(float),
    prompt=st.integers(1, 9),
    exempt=st.sampled_from([False, False, False, True]),
)


class Comings(RuleBasedStateMachine):
    """Whatever comes, leaves, goes or returns: every entry is where it should be, and counted."""

    waiting = Bundle("waiting")
    taken = Bundle("taken")

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue()
        self.inside: set[Entry] = set()

    @rule(target=waiting, one=ENTRIES)
    def comes(self, one: Entry) -> Entry:
        one = Entry(one.tenant, one.priority, one.prompt_tokens, 8, 0.0, cost=one.cost, exempt=one.exempt)
        self.queue.add(one)
        self.inside.add(one)
        return one

    @rule(one=consumes(waiting))
    def leaves(self, one: Entry) -> None:
        if one in self.inside:
            self.queue.queue.remove(one)
            self.inside.discard(one)

    @rule(tenant=st.sampled_from("abcd"), tokens=st.integers(-60, 60))
    def turns_out_to_cost(self, tenant: str, tokens: int) -> None:
        """More or less than its tenant was charged with."""
        if tenant in self.queue.served._accounts:
            self.queue.served.correct(tenant, float(tokens))
            if tokens < 0:
                self.queue.queue.gained(tenant)

    @rule(newcomer=ENTRIES, requests=st.integers(1, 4), prompt=st.integers(-5, 30))
    def who_would_be_pushed_out(self, newcomer: Entry, requests: int, prompt: int) -> None:
        chosen = self.queue.queue.pushed_out_by(newcomer, requests, prompt)
        if chosen is not None:
            assert len(set(chosen)) == len(chosen) >= requests
            assert sum(e.prompt_tokens for e in chosen) >= prompt
            for one in chosen:
                assert one in self.inside
                assert not one.exempt
                assert one.priority <= newcomer.priority
                younger = [
                    e for e in self.inside if (e.tenant, e.priority, e.exempt) == (one.tenant, one.priority, False)
                ]
                assert all(e in chosen for e in younger if e.number > one.number)

    @rule(target=taken)
    def goes(self) -> Entry | None:
        counters = {e: self.queue.served.counter(e.tenant) for e in self.inside}
        head = self.queue.next()
        assert (head is None) == (not self.inside)
        if head is not None:
            assert head.exempt or head.priority == max(e.priority for e in self.inside)
            older = [
                e for e in self.inside if (e.tenant, e.priority, e.exempt) == (head.tenant, head.priority, head.exempt)
            ]
            assert head.number == min(e.number for e in older)
            if not head.exempt:
                rivals = [e for e in self.inside if e.priority == head.priority]
                assert head is min(rivals, key=lambda e: (counters[e], e.number))
            self.inside.discard(head)
        return head

    @rule(one=consumes(taken))
    def returns(self, one: Entry | None) -> None:
        if one is not None:
            self.queue.add(one)
            self.inside.add(one)

    @invariant()
    def counted(self) -> None:
        self.queue.queue.check()
        assert set(self.queue.queue) == self.inside


TestComings = Comings.TestCase
TestComings.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=25), min_size=2, max_size=6))
def test_tenants_that_wait_get_the_same_within_one_request(costs: list[list[int]]) -> None:
    queue = Queue()
    queue.add(*(entry(f"t{number}", cost=one) for number, line in enumerate(costs) for one in line))
    largest = max(map(max, costs))
    given_to = [0.0] * len(costs)
    left = [len(line) for line in costs]
    while (head := queue.next()) is not None:
        tenant = int(head.tenant[1:])
        given_to[tenant] += head.cost
        left[tenant] -= 1
        behind = [given_to[other] for other, waits in enumerate(left) if waits]
        if behind and left[tenant]:
            assert given_to[tenant] - min(behind) <= largest


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=100), st.integers(1, 40))
def test_nobody_starves_in_its_priority(comers: list[str], mine: int) -> None:
    """However the others come and go, as many of their requests go first as there are tenants, for each of one's own."""
    queue = Queue()
    own = [entry("me") for _ in range(mine)]
    queue.add(*own)
    waits = 0
    for tenant in itertools.islice(itertools.cycle(comers), 100 * mine):
        queue.add(entry(tenant))
        head = queue.next()
        assert head is not None
        waits = 0 if head.tenant == "me" else waits + 1
        assert waits <= 9
        if not queue.queue or all(not one.queued for one in own):
            break
    assert not any(one.queued for one in own)


def test_waiting_twice_is_a_bug() -> None:
    queue, one = Queue(), entry()
    queue.add(one)
    with pytest.raises(AssertionError, match="twice"):
        queue.add(one)
    queue.queue.remove(one)
    with pytest.raises(AssertionError, match="twice"):
        queue.queue.remove(one)
