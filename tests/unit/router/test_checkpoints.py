"""Where new requests go while replicas of another checkpoint take over."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.router.policy.checkpoints import CheckpointRoom, roomiest


def room(places: int, *, sound: int = 1, endpoints: int = 1, asked: int = 1) -> CheckpointRoom:
    return CheckpointRoom(endpoints, asked, sound, places)


@pytest.mark.parametrize(
    ("rooms", "taken"),
    [
        ([room(0)], 0),
        ([room(3), room(4)], 1),
        ([room(3), room(3)], 0),
        ([room(0, sound=0, endpoints=9), room(0, sound=1)], 1),
        ([room(0, endpoints=2), room(0, endpoints=3)], 1),
        ([room(20, sound=16, endpoints=64, asked=16), room(79, sound=16, endpoints=16, asked=16)], 0),
        ([room(20, sound=16, endpoints=64, asked=16), room(81, sound=16, endpoints=16, asked=16)], 1),
    ],
)
def test_soundness_then_places_then_endpoints_then_the_first(rooms: list[CheckpointRoom], taken: int) -> None:
    assert roomiest(rooms) == taken


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1)), min_size=1))
def test_nobody_waits_where_all_are_slow_or_full_while_others_have_room(numbers: list[tuple[int, int]]) -> None:
    rooms = [room(places if sound else 0, sound=sound) for places, sound in numbers]
    taken = rooms[roomiest(rooms)]
    assert taken.sound or not any(one.sound for one in rooms)
    assert taken.places or not any(one.places for one in rooms)
