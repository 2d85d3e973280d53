"""The rate at which waiting work leaves."""

import pytest

from cluster.router.drain_rate import SURE_AFTER, WINDOW_S, DrainRate


def drained(rate: DrainRate, begin_s: float, seconds: float, every_s: float, tokens: float, priority: int = 0) -> float:
    now_s = begin_s
    while now_s < begin_s + seconds:
        now_s += every_s
        rate.left(tokens, priority, now_s)
    return now_s


def test_it_says_nothing_before_it_has_seen_enough() -> None:
    rate = DrainRate()
    rate.waiting(0.0, somebody=True)
    for _ in range(SURE_AFTER):
        assert rate.per_second(0, 0.05) is None
        rate.left(10, 0, 0.05)
    assert rate.per_second(0, 0.09) is None
    assert rate.per_second(0, 0.11) is not None


def test_it_is_tokens_over_time() -> None:
    rate = DrainRate()
    rate.waiting(0.0, somebody=True)
    end_s = drained(rate, 0.0, 10.0, 0.02, 50)
    assert rate.per_second(0, end_s) == pytest.approx(2500, rel=0.02)


def test_time_without_a_queue_does_not_count() -> None:
    rate = DrainRate()
    rate.waiting(0.0, somebody=True)
    end_s = drained(rate, 0.0, 10.0, 0.02, 50)
    rate.waiting(end_s, somebody=False)
    assert rate.per_second(0, end_s + 1000) == pytest.approx(2500, rel=0.02)


def test_it_follows_a_fleet_that_has_become_smaller() -> None:
    rate = DrainRate()
    rate.waiting(0.0, somebody=True)
    end_s = drained(rate, 0.0, 10.0, 0.02, 50)
    end_s = drained(rate, end_s, 3 * WINDOW_S, 0.04, 50)
    assert rate.per_second(0, end_s) == pytest.approx(1250, rel=0.1)


def test_a_standstill_shows() -> None:
    rate = DrainRate()
    rate.waiting(0.0, somebody=True)
    end_s = drained(rate, 0.0, 10.0, 0.02, 50)
    assert rate.per_second(0, end_s + 3 * WINDOW_S) < 0.1 * 2500


def test_what_overtakes_is_taken_off() -> None:
    rate = DrainRate()
    rate.waiting(0.0, somebody=True)
    for step in range(500):
        rate.left(30, 1, step * 0.02)
        rate.left(10, 0, step * 0.02)
        rate.left(10, -3, step * 0.02)
    high, middle, low = (rate.per_second(priority, 10.0) for priority in (7, 0, -1))
    assert high == pytest.approx(2500, rel=0.02)
    assert middle == pytest.approx(1000, rel=0.02)
    assert low == pytest.approx(625, rel=0.02)  # it may get more than it did
