from hypothesis import given
from hypothesis import strategies as st

from cluster.engine.step_room import StepRoom


def test_long_prompts_share_their_part_and_short_ones_the_rest():
    room = StepRoom(100, 30, short_prompt=64)
    assert room.take(8000, 8000) == 30
    assert room.of(8000) == 0
    assert room.take(64, 64) == 64
    assert room.take(65, 1) == 0
    assert room.take(10, 10) == 6
    assert room.of(1) == 0


def test_without_a_bound_all_is_for_everybody():
    room = StepRoom(100, None, short_prompt=0)
    assert room.take(8000, 90) == 90
    assert room.take(8000, 90) == 10


@given(
    st.integers(0, 99),
    st.none() | st.integers(1, 99),
    st.integers(0, 99),
    st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99))),
)
def test_no_more_is_taken_than_there_is(tokens, long_tokens, short_prompt, prompts):
    room = StepRoom(tokens, long_tokens, short_prompt)
    taken = [(known, room.take(known, wanted), wanted) for known, wanted in prompts]
    assert sum(count for _, count, _ in taken) <= tokens
    assert all(0 <= count <= wanted for _, count, wanted in taken)
    if long_tokens is not None:
        assert sum(count for known, count, _ in taken if known > short_prompt) <= long_tokens
