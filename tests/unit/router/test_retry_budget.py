"""A death costs nothing; what keeps failing gets a share of the traffic."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.domain.ids import Incarnation, ReplicaId
from cluster.router.retry_budget import RetryBudget, RetryRules

RULES = RetryRules(share=0.2, floor_per_s=1.0, kept_s=10.0, granted_again_s=60.0, grants_max=8)
AT_REST = 10  # credits of a router that has been idle for long


def at(slot: int, generation: int = 1) -> Incarnation:
    return Incarnation(ReplicaId("demo", slot), generation)


def retries(budget: RetryBudget, slot: int, wanted: int, now_s: float) -> int:
    return sum(budget.retry(at(slot), now_s) for _ in range(wanted))


def test_everything_a_dead_replica_held_goes_on() -> None:
    budget = RetryBudget(RULES)
    budget.lost(at(0), 500, 5.0)
    assert retries(budget, 0, 500, 5.0) == 500


def test_what_breaks_again_at_once_is_paid_from_the_budget() -> None:
    budget = RetryBudget(RULES)
    for _ in range(5):
        budget.lost(at(0), 500, 5.0)
    assert retries(budget, 0, 2500, 5.0) == 500 + AT_REST


def test_new_requests_fill_the_budget_by_their_share() -> None:
    budget = RetryBudget(RULES)
    assert retries(budget, 0, 100, 0.0) == AT_REST
    for _ in range(500):
        budget.entered(0.0)
    assert retries(budget, 0, 500, 0.0) == 100


def test_deposits_fade_and_the_floor_comes_back() -> None:
    budget = RetryBudget(RULES)
    for _ in range(5000):
        budget.entered(0.0)
    assert AT_REST <= retries(budget, 0, 5000, 100.0) <= AT_REST + 1
    assert budget.wait_s() > 0.8
    assert retries(budget, 0, 10, 101.05) == 1


def test_a_long_lived_replica_is_granted_again_after_a_while_and_a_new_incarnation_at_once() -> None:
    budget = RetryBudget(RULES)
    budget.lost(at(0), 20, 0.0)
    assert retries(budget, 0, 100, 0.0) == 20 + AT_REST
    budget.lost(at(0), 20, 59.0)
    assert retries(budget, 0, 100, 0.0) == 0
    budget.lost(at(0), 20, 60.0)
    budget.lost(at(0, 2), 30, 60.0)
    assert sum(budget.retry(at(0, 2), 0.0) for _ in range(100)) == 30


def test_what_is_remembered_is_bounded() -> None:
    budget = RetryBudget(RULES)
    for slot in range(100):
        budget.lost(at(slot), 1, 0.0)
    assert len(budget._grants) == RULES.grants_max


EVENTS = st.lists(
    st.tuples(st.sampled_from(["new", "lost", "retry"]), st.integers(0, 2), st.floats(0.0, 5.0)), max_size=200
)


@given(EVENTS)
def test_retries_never_exceed_share_floor_and_grants(events: list[tuple[str, int, float]]) -> None:
    budget, now_s, new, granted, taken = RetryBudget(RULES), 0.0, 0, 0, 0
    last: dict[int, float] = {}
    for kind, slot, pause_s in events:
        now_s += pause_s
        if kind == "new":
            budget.entered(now_s)
            new += 1
        elif kind == "lost":
            budget.lost(at(slot), 7, now_s)
            if now_s - last.get(slot, -1e9) >= RULES.granted_again_s:
                granted, last[slot] = granted + 7, now_s
        else:
            taken += budget.retry(at(slot), now_s)
        assert taken <= 0.2 * new + AT_REST + now_s + granted + 1e-6
