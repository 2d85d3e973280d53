"""What of an engine's answer counts."""

import pytest

from cluster.router.session import _delivers
from cluster.v1 import engine_pb2


@pytest.mark.parametrize(
    ("update", "delivers"),
    [
        (engine_pb2.SequenceUpdate(token_ids=[1]), True),
        (engine_pb2.SequenceUpdate(token_ids=[1], end=engine_pb2.SEQUENCE_END_LENGTH), True),
        (engine_pb2.SequenceUpdate(end=engine_pb2.SEQUENCE_END_STOP), True),
        (engine_pb2.SequenceUpdate(end=engine_pb2.SEQUENCE_END_REJECTED_CAPACITY), False),
        (engine_pb2.SequenceUpdate(end=engine_pb2.SEQUENCE_END_REJECTED_INVALID), False),
        (engine_pb2.SequenceUpdate(end=engine_pb2.SEQUENCE_END_EVICTED_DEADLINE), False),
    ],
)
def test_only_what_was_computed_is_a_sign_of_health(update: engine_pb2.SequenceUpdate, delivers: bool) -> None:
    assert _delivers(update) is delivers
