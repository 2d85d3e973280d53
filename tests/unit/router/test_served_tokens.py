"""Accounts of tenants: charged once, corrected once, bounded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.router.served_tokens import GENERATED_FIRST_GUESS, TENANTS_MAX, ServedTokens, cost


def test_a_generated_token_counts_twice() -> None:
    assert cost(100, 10) == 120
    assert ServedTokens().expected_cost("a", 100, 10) == 120
    assert ServedTokens().expected_cost("a", 100, 10_000) == 100 + 2 * GENERATED_FIRST_GUESS
    assert ServedTokens().expected_cost("a", 0, 0) == 1


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=30))
def test_in_the_end_a_tenant_was_charged_what_it_got(requests: list[tuple[int, int, int]]) -> None:
    served = ServedTokens()
    served.entered("a")
    begin = served.counter("a")
    for prompt, cached, generated in requests:
        computed = max(0, prompt - cached)
        expected = served.expected_cost("a", prompt, 400)
        served.entered("a")
        served.charge("a", expected)
        served.correct("a", cost(computed, generated) - expected)
        served.learn("a", generated)
        served.left("a")
    assert served.counter("a") - begin == pytest.approx(sum(cost(max(0, p - c), g) for p, c, g in requests))


def test_expectations_follow_the_answers_of_each_tenant() -> None:
    served = ServedTokens()
    for tenant, tokens in [("short", 4), ("long", 400)] * 100:
        served.entered(tenant)
        served.learn(tenant, tokens)
    assert served.expected_cost("short", 0, 1000) == pytest.approx(8, rel=0.01)
    assert served.expected_cost("long", 0, 1000) == pytest.approx(800, rel=0.01)


def test_a_newcomer_begins_where_the_last_one_was_served() -> None:
    served = ServedTokens()
    served.entered("a")
    served.charge("a", 500)
    served.charge("a", 500)
    assert served.floor == 500
    served.entered("b")
    assert served.counter("b") == served.counter("never seen") == 500


def test_accounts_are_bounded_and_debts_kept_longest() -> None:
    served = ServedTokens()
    for number in range(3 * TENANTS_MAX):
        tenant = f"t{number}"
        served.entered(tenant)
        served.correct(tenant, 1000.0)
        served.left(tenant)
        assert len(served) <= TENANTS_MAX
    assert served.counter(f"t{3 * TENANTS_MAX - 1}") == 1000
    served.entered("owes nothing")
    served.left("owes nothing")
    assert len(served) == TENANTS_MAX


def test_a_tenant_with_requests_is_never_forgotten() -> None:
    served = ServedTokens()
    served.entered("runs")
    for number in range(TENANTS_MAX + 10):
        served.entered(f"t{number}")
        served.correct(f"t{number}", 1.0)
        served.left(f"t{number}")
    served.charge("runs", 7.0)
    assert served.counter("runs") == 7
    served.left("runs")
    with pytest.raises(AssertionError, match="twice"):
        served.left("runs")
