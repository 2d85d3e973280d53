"""What a first token is expected to take."""

import random

import pytest

from cluster.router.start_times import StartTimes


def test_nothing_is_known_at_first() -> None:
    assert StartTimes().expected_s(0) == 0


def test_most_first_tokens_come_within_it() -> None:
    rng, starts = random.Random(4), StartTimes()
    drawn = [rng.uniform(0.1, 0.3) for _ in range(2000)]
    within = 0
    for seconds in drawn:
        within += seconds <= starts.expected_s(0)
        starts.took(0, seconds)
    assert within >= 0.95 * len(drawn)
    assert starts.expected_s(0) <= 0.5


def test_high_priority_says_nothing_about_the_rest() -> None:
    starts = StartTimes()
    for _ in range(300):
        starts.took(1, 0.01)
        starts.took(-1, 0.5)
    assert starts.expected_s(7) == pytest.approx(0.01, rel=0.05)
    assert starts.expected_s(0) == starts.expected_s(-9) == pytest.approx(0.5, rel=0.05)
