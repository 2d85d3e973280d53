"""The tokens of one request: each once, whoever sends them how often."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.router.journal import Journal


def test_resumed_tokens_take_room_and_are_not_this_calls() -> None:
    journal = Journal([7, 8], 5)
    assert (journal.room, journal.generated_tokens, journal.full) == (3, 0, False)
    journal.append([9])
    assert list(journal.generated) == [7, 8, 9]
    assert (journal.room, journal.generated_tokens) == (2, 1)
    journal.append([1, 2])
    assert (journal.room, journal.full, journal.generated_tokens) == (0, True, 3)


def test_more_resumed_tokens_than_asked_for_leave_no_room() -> None:
    journal = Journal([1, 2, 3], 2)
    assert (journal.room, journal.full, journal.generated_tokens) == (0, True, 0)


def test_attempts_count_from_one() -> None:
    journal = Journal([], 5)
    assert (journal.begin_attempt(), journal.begin_attempt(), journal.attempt) == (1, 2, 2)


def test_more_than_was_asked_for_is_a_bug() -> None:
    journal = Journal([], 2)
    with pytest.raises(AssertionError, match="more tokens"):
        journal.append([1, 2, 3])
    assert list(journal.generated) == []


def test_the_callers_list_is_not_touched() -> None:
    resumed = [1]
    Journal(resumed, 3).append([2])
    assert resumed == [1]


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=8), st.lists(st.integers(0, 9), max_size=4))
def test_whatever_was_appended_is_there_once_and_in_order(parts: list[list[int]], resumed: list[int]) -> None:
    total = len(resumed) + sum(map(len, parts))
    journal = Journal(resumed, total + 1)
    for part in parts:
        journal.append(part)
    assert list(journal.generated) == [*resumed, *(token for part in parts for token in part)]
    assert journal.room == 1
    assert journal.generated_tokens == total - len(resumed)
