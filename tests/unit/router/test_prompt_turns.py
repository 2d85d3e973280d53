"""Higher priorities first, tenants take turns, and who sends most is refused first."""

import copy
import heapq
import itertools
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.router.prompt_turns import FORGOTTEN_AFTER_S, SURE_AFTER, Pace, Place, PromptTurns, wait_for_thread

WAITING_MAX = 8


def waiting(*prompts: str, waiting_max: int = 100, priority: int = 0) -> PromptTurns[str]:
    """Prompts named by tenant and number, as "a1"."""
    turns: PromptTurns[str] = PromptTurns(waiting_max)
    for prompt in prompts:
        assert turns.add(prompt, Place(prompt[0], priority)) == []
    return turns


def order(turns: PromptTurns[str]) -> list[str]:
    return list(iter(turns.next, None))


def test_tenants_take_turns_and_each_ones_prompts_come_as_they_came() -> None:
    turns = waiting("a1", "a2", "a3", "b1", "c1", "b2")
    assert order(turns) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert (len(turns), turns.next()) == (0, None)


def test_a_newcomer_waits_for_one_of_each_other_tenant() -> None:
    turns = waiting(*(f"a{n}" for n in range(50)), *(f"b{n}" for n in range(40)))
    assert [turns.next() for _ in range(4)] == ["a0", "b0", "a1", "b1"]
    assert turns.add("c1", Place("c")) == []
    assert order(turns)[:3] == ["a2", "b2", "c1"]


def test_who_was_just_served_stands_behind_who_waits() -> None:
    turns = waiting("a1", "b1", "b2")
    assert turns.next() == "a1"
    turns.add("a2", Place("a"))
    assert order(turns) == ["b1", "a2", "b2"]


def test_who_leaves_is_passed_by_and_leaves_no_trace() -> None:
    turns = waiting("a1", "a2", "b1", "c1")
    for left in ("a1", "b1", "b1", "never came"):
        turns.discard(left)
    turns.check()
    assert len(turns) == 2
    turns.add("b2", Place("b"))  # as if for the first time
    assert order(turns) == ["a2", "c1", "b2"]


@pytest.mark.parametrize(
    ("prompts", "newcomer", "refused"),
    [
        (["a1", "a2", "a3", "a4"], "a5", "a5"),
        (["a1", "a2", "a3", "a4"], "b1", "a4"),
        (["a1", "a2", "a3", "b1"], "b2", "a3"),
        (["a1", "a2", "a3", "b1"], "a4", "a4"),
        (["a1", "a2", "b1", "b2"], "b3", "b3"),
        (["a1", "a2", "b1", "b2"], "c1", "b2"),
        (["a1", "b1", "c1", "d1"], "e1", "e1"),
        (["a1", "b1", "c1", "d1"], "a2", "a2"),
    ],
)
def test_when_it_is_full_the_tenant_with_the_most_makes_room(prompts: list[str], newcomer: str, refused: str) -> None:
    turns = waiting(*prompts, waiting_max=4)
    assert turns.add(newcomer, Place(newcomer[0])) == [refused]
    assert set(order(turns)) == {*prompts, newcomer} - {refused}


@pytest.mark.parametrize(
    ("newcomer", "size", "refused"),
    [
        ("c1", 10, []),
        ("c1", 15, ["a4"]),
        ("c1", 22, ["a4", "a3"]),
        ("c1", 30, ["c1"]),
        ("b2", 19, ["a4"]),
        ("b2", 30, ["b2"]),
        ("a5", 11, ["a5"]),
    ],
)
def test_as_many_make_room_as_it_takes_or_nobody(newcomer: str, size: int, refused: list[str]) -> None:
    turns: PromptTurns[str] = PromptTurns(60)
    for prompt in ("a1", "b1", "a2", "a3", "a4"):
        assert turns.add(prompt, Place(prompt[0], size=10)) == []
    assert turns.add(newcomer, Place(newcomer[0], size=size)) == refused
    turns.check()
    assert set(order(turns)) == {"a1", "a2", "a3", "a4", "b1", newcomer} - set(refused)


def test_while_only_small_ones_may_run_the_others_keep_their_places() -> None:
    turns: PromptTurns[str] = PromptTurns(100)
    for prompt, work in (("a1", 30), ("a2", 1), ("b1", 1), ("c1", 20), ("b2", 1)):
        turns.add(prompt, Place(prompt[0], work=work))
    assert [turns.next(largest=5) for _ in range(4)] == ["a2", "b1", "b2", None]
    assert order(turns) == ["c1", "a1"]  # a has had a turn


def test_who_had_a_small_one_taken_has_had_its_turn() -> None:
    turns: PromptTurns[str] = PromptTurns(100)
    for prompt, work in (("a1", 30), ("a2", 1), ("b1", 1), ("b2", 30)):
        turns.add(prompt, Place(prompt[0], work=work))
    assert turns.next(largest=5) == "a2"
    assert order(turns) == ["b1", "a1", "b2"]


def test_what_fits_is_told_by_work_and_room_by_size() -> None:
    turns: PromptTurns[str] = PromptTurns(10)
    assert turns.add("a1", Place("a", size=9, work=1)) == []
    assert turns.add("a2", Place("a", size=2, work=1)) == ["a2"]
    assert turns.add("a3", Place("a", size=1, work=90)) == []
    assert [turns.next(largest=5), turns.next(largest=5), turns.next()] == ["a1", None, "a3"]


def test_higher_priorities_go_first_and_each_has_turns_of_its_own() -> None:
    turns = waiting("a1", "a2", "b1")
    for prompt in ("a8", "a9", "c9"):
        assert turns.add(prompt, Place(prompt[0], priority=7)) == []
    assert turns.add("b0", Place("b", priority=-1)) == []
    turns.check()
    assert order(turns) == ["a8", "c9", "a9", "a1", "b1", "a2", "b0"]


def test_where_nothing_of_a_higher_priority_fits_a_lower_one_has_the_thread() -> None:
    turns: PromptTurns[str] = PromptTurns(100)
    turns.add("a1", Place("a", priority=1, work=30))
    turns.add("b1", Place("b", priority=-1, work=1))
    assert [turns.next(largest=5), turns.next(largest=5), turns.next()] == ["b1", None, "a1"]


@pytest.mark.parametrize(
    ("newcomer", "priority", "size", "refused"),
    [
        ("c1", 0, 10, []),
        ("c1", 0, 20, ["b8"]),
        ("c1", 0, 30, ["b8", "b7"]),  # who has less than the newcomer's would, but of a lower priority
        ("c1", 0, 35, ["b8", "b7", "a3"]),
        ("c1", 0, 40, ["c1"]),  # its own would have as much as the one with the most
        ("a5", 0, 30, ["b8", "b7"]),
        ("a5", 0, 31, ["a5"]),
        ("b5", -1, 15, ["b5"]),
        ("c1", -1, 15, ["b8"]),
        ("c1", -1, 20, ["c1"]),
        ("c1", -2, 11, ["c1"]),
        ("c1", 1, 70, ["b8", "b7", "a3", "a2", "a1"]),
        ("c1", 1, 71, ["c1"]),
        ("a5", 2, 90, ["b8", "b7", "a3", "a2", "a1", "z9", "z8"]),
        ("a5", 2, 91, ["a5"]),
    ],
)
def test_lower_priorities_make_room_first(newcomer: str, priority: int, size: int, refused: list[str]) -> None:
    turns: PromptTurns[str] = PromptTurns(100)
    places = {"b7": -1, "b8": -1, "a1": 0, "a2": 0, "a3": 0, "z8": 1, "z9": 1, "c9": 2}
    for prompt, its_priority in places.items():
        assert turns.add(prompt, Place(prompt[0], its_priority, 20 if prompt == "a2" else 10)) == []
    assert turns.add(newcomer, Place(newcomer[0], priority, size)) == refused
    turns.check()
    assert set(order(turns)) == {*places, newcomer} - set(refused)


class Turns(RuleBasedStateMachine):
    """Against what each tenant may expect, whatever the others do."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: PromptTurns[tuple[str, int]] = PromptTurns(WAITING_MAX)
        self.numbers = itertools.count()
        self.waiting: dict[tuple[str, int], Place] = {}  # oldest first
        self.rings: dict[int, list[str]] = {}  # tenants by priority, whose turn is next first
        # turns of others since it began to wait, or had its own, by priority and tenant
        self.passed_by: dict[tuple[int, str], Counter[str]] = {}

    def _leave(self, prompt: tuple[str, int]) -> None:
        place = self.waiting.pop(prompt)
        if not self.line(place.tenant, place.priority):
            self.rings[place.priority].remove(place.tenant)
            del self.passed_by[place.priority, place.tenant]

    def line(self, tenant: str, priority: int, largest: float = math.inf) -> list[tuple[str, int]]:
        """Its prompts, oldest first."""
        return [
            prompt
            for prompt, place in self.waiting.items()
            if (place.tenant, place.priority) == (tenant, priority) and place.work <= largest
        ]

    def size_of(self, tenant: str, priority: int) -> int:
        return sum(self.waiting[prompt].size for prompt in self.line(tenant, priority))

    def missing(self, place: Place) -> int:
        return sum(one.size for one in self.waiting.values()) + place.size - WAITING_MAX

    @rule(
        tenant=st.sampled_from("abcd"),
        priority=st.integers(-1, 1),
        size=st.integers(1, 4),
        work=st.integers(1, 3),
    )
    def comes(self, tenant: str, priority: int, size: int, work: int) -> None:
        prompt, place = (tenant, next(self.numbers)), Place(tenant, priority, size, work)
        would_have = self.size_of(tenant, priority) + size
        refused = self.turns.add(prompt, place)
        if refused == [prompt]:
            assert self.missing(place) > self.most_room(priority, would_have), "others could have made room"
            return
        for one in refused:
            assert self.missing(place) > 0, "nobody goes without need"
            left = self.waiting[one]
            assert left.priority == min(p for p, ring in self.rings.items() if ring), "the lowest priority goes first"
            assert left.priority <= priority, "nobody goes for a lower priority"
            size_of = {name: self.size_of(name, left.priority) for name in self.rings[left.priority]}
            most = [name for name, its_size in size_of.items() if its_size == max(size_of.values())]
            assert left.tenant in most, "of the tenant with the most"
            assert left.priority < priority or max(size_of.values()) > would_have, "which is more than it would have"
            assert one == self.line(left.tenant, left.priority)[-1], "the youngest goes"
            self._leave(one)
        assert self.missing(place) <= 0, "more waits than may"
        self.waiting[prompt] = place
        if tenant not in self.rings.setdefault(priority, []):
            self.rings[priority].append(tenant)
            self.passed_by[priority, tenant] = Counter()

    def most_room(self, priority: int, would_have: int) -> int:
        """What goes when all goes that may for a newcomer of ``priority`` whose tenant would have so much there."""
        lower = sum(place.size for place in self.waiting.values() if place.priority < priority)
        return lower + sum(self.taken_away(name, priority, would_have) for name in self.rings.get(priority, ()))

    def taken_away(self, tenant: str, priority: int, down_to: int) -> int:
        """What goes when the youngest go while ``tenant`` has more than ``down_to``."""
        left = before = self.size_of(tenant, priority)
        for prompt in reversed(self.line(tenant, priority)):
            if left <= down_to:
                break
            left -= self.waiting[prompt].size
        return before - left

    def expected(self, largest: float) -> tuple[str, int] | None:
        lines = (
            self.line(tenant, priority, largest)
            for priority, ring in sorted(self.rings.items(), reverse=True)
            for tenant in ring
        )
        return next((line[0] for line in lines if line), None)

    @rule(largest=st.sampled_from([None, 1, 2]))
    def a_thread_is_free(self, largest: int | None) -> None:
        fits = math.inf if largest is None else largest
        expected, prompt = self.expected(fits), self.turns.next(largest)
        assert prompt == expected
        if prompt is None:
            return
        tenant, priority = prompt[0], self.waiting[prompt].priority
        ring = self.rings[priority]
        for other in ring:
            passed = self.passed_by[priority, other]
            passed[tenant] += other != tenant and bool(self.line(other, priority, fits))
            assert max(passed.values(), default=0) <= 1, "one of each other tenant comes before it, no more"
        self.passed_by[priority, tenant].clear()
        ring.append(ring.pop(ring.index(tenant)))
        self._leave(prompt)

    @rule(tenant=st.sampled_from("abcde"), priority=st.integers(-2, 2), largest=st.sampled_from([None, 1, 2]))
    def foresees(self, tenant: str, priority: int, largest: int | None) -> None:
        later = copy.deepcopy(self.turns)
        later._waiting_max = WAITING_MAX + 1
        last = (tenant, -1)
        assert later.add(last, Place(tenant, priority)) == []
        taken = itertools.takewhile(lambda prompt: prompt != last, iter(lambda: later.next(largest), None))
        expected = sum(self.waiting[prompt].work for prompt in taken)
        assert self.turns.ahead(tenant, priority, largest) == expected

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        prompt = data.draw(st.sampled_from(list(self.waiting)))
        self.turns.discard(prompt)
        self._leave(prompt)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.turns.check()
        assert len(self.turns) == len(self.waiting)


TestTurns = Turns.TestCase


def finished(pace: Pace, *paces: float, at_s: float = 0.0) -> float | None:
    for one in paces:
        pace.finished(round(one * 2), 2.0, at_s)
    return pace.per_second(at_s)


def test_a_pace_is_known_when_some_prompts_are_finished() -> None:
    pace = Pace()
    assert finished(pace, *[100.0] * (SURE_AFTER - 1)) is None
    assert finished(pace, 200.0) == pytest.approx((100 * (SURE_AFTER - 1) + 200) / SURE_AFTER)


def test_the_newest_count_most_and_one_says_little() -> None:
    pace = Pace()
    before = finished(pace, *[100.0] * 20)
    pace.finished(100, 1000.0, 1.0)  # the machine stood still
    assert before == pytest.approx(100)
    assert (pace.per_second(1.0) or 0) > 75
    assert finished(pace, *[400.0] * 10, at_s=2.0) == pytest.approx(400, rel=0.1)


def test_what_takes_no_time_is_no_endless_pace() -> None:
    pace = Pace()
    for _ in range(SURE_AFTER):
        pace.finished(10, 0.0, 0.0)
    assert pace.per_second(0.0) == pytest.approx(10_000)


def test_a_pace_is_forgotten() -> None:
    pace = Pace()
    finished(pace, *[100.0] * SURE_AFTER)
    assert pace.per_second(FORGOTTEN_AFTER_S) == pytest.approx(100)
    assert pace.per_second(FORGOTTEN_AFTER_S + 1) is None
    assert finished(pace, 300.0, at_s=FORGOTTEN_AFTER_S + 1) is None
    assert finished(pace, *[300.0] * (SURE_AFTER - 1), at_s=FORGOTTEN_AFTER_S + 1) == pytest.approx(300)


@pytest.mark.parametrize(
    ("ahead", "left", "wait"),
    [
        (0, [], math.inf),
        (0, [7], 7),
        (0, [0, 9], 0),
        (4, [0, 9], 4),
        (20, [0, 10], 15),
        (20, [10, 0], 15),
        (6, [2, 2], 5),
    ],
)
def test_the_wait_is_for_the_first_thread_that_is_free(ahead: int, left: list[int], wait: float) -> None:
    assert wait_for_thread(ahead, left) == wait


@given(st.integers(0, 30), st.lists(st.integers(0, 20), min_size=1, max_size=4))
def test_the_wait_is_what_it_is_for_prompts_of_one_unit(ahead: int, left: list[int]) -> None:
    threads = list(left)
    heapq.heapify(threads)
    for _ in range(ahead):
        heapq.heapreplace(threads, threads[0] + 1)
    assert threads[0] <= wait_for_thread(ahead, left) < threads[0] + 1
