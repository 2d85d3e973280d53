"""Who is ejected, for how long, and never more than half."""

from __future__ import annotations

import copy

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.domain.ids import Incarnation, ReplicaId
from cluster.router.ejection import EjectionRules, Ejections

RULES = EjectionRules(first_s=1.0, longest_s=8.0, forgotten_s=60.0, probe_s=5.0)


def at(slot: int, generation: int = 1) -> Incarnation:
    return Incarnation(ReplicaId("demo", slot), generation)


def fleet(count: int) -> Ejections:
    made = Ejections(RULES)
    for slot in range(count):
        made.came_up(at(slot))
    return made


def breaks(ejections: Ejections, slot: int, now_s: float) -> None:
    """The session fails, and is up again at once."""
    ejections.went_down(at(slot))
    ejections.failed(at(slot), now_s)
    ejections.came_up(at(slot))


def out(ejections: Ejections, count: int, now_s: float) -> list[int]:
    return [slot for slot in range(count) if ejections.ejected(at(slot), now_s)]


def test_a_failure_ejects_for_a_while_and_then_one_probe_may_go() -> None:
    ejections = fleet(4)
    breaks(ejections, 2, 10.0)
    assert out(ejections, 4, 10.0) == [2]
    assert out(ejections, 4, 10.99) == [2]
    assert out(ejections, 4, 11.0) == []
    ejections.picked(at(2), 11.0)
    assert out(ejections, 4, 11.0) == [2], "one probe at a time"
    ejections.delivered(at(2), 11.2)
    assert out(ejections, 4, 11.2) == []
    assert not ejections.suspected(at(2))


def test_a_probe_that_shows_nothing_makes_way_for_another() -> None:
    ejections = fleet(2)
    breaks(ejections, 0, 0.0)
    ejections.picked(at(0), 1.0)
    assert out(ejections, 2, 5.9) == [0]
    assert out(ejections, 2, 6.0) == []


def test_every_further_failure_ejects_twice_as_long_up_to_the_bound() -> None:
    ejections, now_s, lasted = fleet(2), 0.0, []
    for _ in range(6):
        breaks(ejections, 0, now_s)
        ends_s = next(now_s + step / 4 for step in range(100) if not ejections.ejected(at(0), now_s + step / 4))
        lasted.append(ends_s - now_s)
        ejections.picked(at(0), ends_s)
        ejections.delivered(at(0), ends_s)
        now_s = ends_s
    assert lasted == [1, 2, 4, 8, 8, 8]
    breaks(ejections, 0, now_s + 100.0)
    assert not ejections.ejected(at(0), now_s + 101.0), "long ago: it counts as the first"


def test_tokens_of_streams_that_were_there_end_no_ejection() -> None:
    ejections = fleet(2)
    breaks(ejections, 0, 0.0)
    ejections.delivered(at(0), 0.5)
    assert out(ejections, 2, 0.6) == [0]


def test_the_last_one_is_never_ejected() -> None:
    alone = fleet(1)
    breaks(alone, 0, 0.0)
    assert out(alone, 1, 0.0) == []
    pair = fleet(2)
    breaks(pair, 0, 0.0)
    assert out(pair, 2, 0.1) == [0]
    pair.went_down(at(1))  # the other one is gone
    assert out(pair, 1, 0.1) == []


def test_those_that_failed_most_are_the_half_that_is_ejected() -> None:
    ejections = fleet(4)
    for slot in (0, 1, 2, 3):
        breaks(ejections, slot, 0.1 * slot)
    breaks(ejections, 1, 0.4)
    assert out(ejections, 4, 0.5) == [1, 3]


def test_models_do_not_share_the_bound() -> None:
    ejections = fleet(1)
    others = [Incarnation(ReplicaId("other", slot), 1) for slot in range(4)]
    for incarnation in others:
        ejections.came_up(incarnation)
    breaks(ejections, 0, 0.0)
    assert out(ejections, 1, 0.0) == []


def test_a_new_incarnation_begins_afresh_and_nothing_is_kept_of_the_old() -> None:
    ejections = fleet(2)
    breaks(ejections, 0, 0.0)
    ejections.left(at(0))
    ejections.came_up(at(0, 2))
    assert not ejections.ejected(at(0, 2), 0.0)
    ejections.left(at(0, 2))
    ejections.left(at(1))
    assert not ejections._models
    assert not ejections._past


class AnyHistory(RuleBasedStateMachine):
    """Whatever happens: at most half of those that are up, ever; and everybody comes back."""

    SLOTS = st.integers(0, 5)

    def __init__(self) -> None:
        super().__init__()
        self.ejections, self.up, self.now_s = Ejections(RULES), set(), 0.0

    @rule(slot=SLOTS)
    def up_again(self, slot: int) -> None:
        self.ejections.came_up(at(slot))
        self.up.add(slot)

    @rule(slot=SLOTS)
    def fails(self, slot: int) -> None:
        if slot in self.up:
            self.up.discard(slot)
            self.ejections.went_down(at(slot))
            self.ejections.failed(at(slot), self.now_s)

    @rule(slot=SLOTS)
    def leaves(self, slot: int) -> None:
        self.up.discard(slot)
        self.ejections.left(at(slot))

    @rule(slot=SLOTS)
    def is_picked(self, slot: int) -> None:
        self.ejections.picked(at(slot), self.now_s)

    @rule(slot=SLOTS)
    def delivers(self, slot: int) -> None:
        if slot in self.up:
            self.ejections.delivered(at(slot), self.now_s)

    @rule(seconds=st.floats(0.0, 20.0))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @invariant()
    def at_most_half_of_those_up(self) -> None:
        ejected = {slot for slot in self.up if self.ejections.ejected(at(slot), self.now_s)}
        assert len(ejected) <= len(self.up) // 2

    @invariant()
    def whose_circuit_is_not_closed_is_known_at_a_glance(self) -> None:
        assert self.ejections.open == {one for model in self.ejections._models.values() for one in model.open}

    @invariant()
    def everybody_comes_back(self) -> None:
        later, later_s = copy.deepcopy(self.ejections), self.now_s + RULES.longest_s + RULES.probe_s
        assert not any(later.ejected(at(slot), later_s) for slot in range(6))


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
