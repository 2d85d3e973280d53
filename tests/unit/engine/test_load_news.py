"""How often a session hears of loads that others change."""

import pytest

from cluster.engine.load_news import BURST, LoadNews


def test_few_changes_are_told_at_once_and_many_at_the_pace_that_was_asked_for():
    news = LoadNews(0.1)
    told = [now_s for now_s in (0.01 * n for n in range(1000)) if news.changed(now_s)]
    assert told[:BURST] == pytest.approx([0.0, 0.01, 0.02, 0.03])
    assert len(told) == pytest.approx(10.0 / 0.1 + BURST, abs=1)
    assert news.late
    assert [news.changed(100.0) for _ in range(BURST + 1)] == [True] * BURST + [False], "a quiet time earns a burst"


def test_who_did_not_ask_is_never_late():
    news = LoadNews(None)
    assert not any(news.changed(float(n)) for n in range(9))
    assert not news.late


@pytest.mark.parametrize("pause_s", [0.0, -1.0, float("nan")])
def test_a_pause_that_means_nothing_is_a_short_one(pause_s):
    news = LoadNews(pause_s)
    assert sum(news.changed(n * 1e-5) for n in range(100)) <= BURST + 1


def test_another_pause_holds_at_once_for_what_was_told_with_the_old_one_too():
    news = LoadNews(10.0)
    while news.changed(0.0):
        pass
    news.pace(0.1)
    assert not news.changed(0.0)
    assert news.late
    told = [now_s for now_s in (0.01 * n for n in range(1, 101)) if news.changed(now_s)]
    assert told[0] == pytest.approx(0.1, abs=0.011)
    assert len(told) == pytest.approx(10, abs=1)
    news.pace(10.0)
    assert sum(news.changed(1.0 + 0.01 * n) for n in range(1000)) <= BURST + 1


def test_another_pause_does_not_make_anybody_ask():
    news = LoadNews(None)
    news.pace(0.1)
    assert not news.changed(0.0)
