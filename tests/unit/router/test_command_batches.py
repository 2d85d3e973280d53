"""How commands are cut into messages."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.router.command_batches import COMMANDS_BYTES_MAX, batches
from cluster.v1 import engine_pb2
from cluster.wire.channel import MAX_MESSAGE_BYTES


def submit(sequence_id: int, tokens: int) -> engine_pb2.Submit:
    return engine_pb2.Submit(sequence_id=sequence_id, prompt_token_ids=[300] * tokens)  # two bytes each


def shape(messages: list[engine_pb2.SessionRequest]) -> list[tuple[list[int], list[int]]]:
    found = [message.commands for message in messages]
    return [([s.sequence_id for s in m.submits], [c.sequence_id for c in m.cancels]) for m in found]


def test_what_fits_is_one_message() -> None:
    assert shape(list(batches([submit(1, 5), submit(2, 5)], [8, 9]))) == [([1, 2], [8, 9])]


def test_nothing_is_no_message() -> None:
    assert list(batches([], [])) == []


def test_cancels_alone() -> None:
    assert shape(list(batches([], [3]))) == [([], [3])]


def test_long_prompts_of_one_turn_leave_in_several_messages() -> None:
    submits = [submit(i, 40_000) for i in range(1, 5)]
    assert shape(list(batches(submits, [7], bytes_max=170_000))) == [([1, 2], [7]), ([3, 4], [])]


def test_a_single_submit_may_be_larger_than_the_limit() -> None:
    assert shape(list(batches([submit(1, 1), submit(2, 1000), submit(3, 1)], [], bytes_max=100))) == [
        ([1], []), ([2], []), ([3], []),
    ]  # fmt: skip


def test_the_limit_is_far_below_the_channels() -> None:
    assert 4 * COMMANDS_BYTES_MAX <= MAX_MESSAGE_BYTES


@given(st.lists(st.integers(0, 60), max_size=20), st.integers(1, 400))
def test_everything_leaves_once_in_order_within_the_limit(sizes: list[int], bytes_max: int) -> None:
    submits = [submit(i, tokens) for i, tokens in enumerate(sizes, 1)]
    messages = [message.commands for message in batches(submits, [], bytes_max)]
    assert [s for m in messages for s in m.submits] == submits
    for message in messages:
        assert len(message.submits) == 1 or sum(s.ByteSize() for s in message.submits) <= bytes_max
