"""A request that needs room waits for a sound endpoint, and is not sent to an unsound one because that has some."""

import random

import pytest

from cluster.domain.endpoint import Endpoint
from cluster.domain.ids import Incarnation, ReplicaId
from cluster.router.endpoint_table import Candidate, Standing
from cluster.router.holders import Holders
from cluster.router.policy.contracts import Demand
from cluster.router.policy.group import Group
from cluster.router.policy.profiles import PROFILES
from cluster.router.policy.selector import Selector

NOBODY = Holders((), (), {})


class Member:
    def __init__(self, slot: int, *, has_room: bool, standing: Standing = Standing.HEALTHY) -> None:
        self.incarnation = Incarnation(ReplicaId("demo", slot), 1)
        self.has_room, self.standing = has_room, standing

    def candidate(self, cached_tokens: int = 0, *, has_room: bool, at_home: bool = False) -> Candidate:
        endpoint = Endpoint(self.incarnation, "127.0.0.1:1", "sha256:a", 16)
        return Candidate(
            endpoint, True, cached_tokens=cached_tokens, has_room=has_room, standing=self.standing, at_home=at_home
        )


def taken(*members: Member, profile: str, needs_room: bool = True, failed: Member | None = None) -> int | None:
    selector = Selector(PROFILES[profile], random.Random(1))
    broke = frozenset() if failed is None else frozenset({failed.incarnation})
    choice = selector.choose(Group(members, 16), Demand("demo", needs_room=needs_room, failed=broke), NOBODY)
    return None if choice is None else choice.candidate.endpoint.incarnation.replica.slot


@pytest.mark.parametrize("profile", sorted(PROFILES))
@pytest.mark.parametrize("standing", [Standing.SLOW, Standing.EJECTED])
def test_who_has_room_must_be_sound_while_others_are(profile: str, standing: Standing) -> None:
    unsound = Member(0, has_room=True, standing=standing)
    assert taken(unsound, Member(1, has_room=False), profile=profile) is None
    assert taken(unsound, Member(1, has_room=True), profile=profile) == 1
    assert taken(unsound, Member(1, has_room=False), profile=profile, needs_room=False) == 1
    assert taken(unsound, Member(1, has_room=False, standing=standing), profile=profile) == 0
    assert taken(unsound, profile=profile) == 0


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_one_that_broke_under_the_request_and_is_sound_again_is_better_than_waiting(profile: str) -> None:
    broke, full = Member(0, has_room=True), Member(1, has_room=False)
    assert taken(broke, full, profile=profile, failed=broke) == 0
    assert taken(broke, Member(1, has_room=True), profile=profile, failed=broke) == 1
    assert taken(Member(0, has_room=True, standing=Standing.EJECTED), full, profile=profile, failed=broke) is None
