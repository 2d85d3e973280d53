from __future__ import annotations

import pytest

from cluster.controller.replica_lifecycle import STORY_LINES, TERMINAL, TRANSITIONS, ReplicaEvent, born
from cluster.domain.errors import ReplicaError
from cluster.domain.replica import ReplicaPhase
from tests.unit.controller.builders import incarnation


def test_the_whole_life():
    life = born(incarnation(), 1.0, "wanted")
    for event in (ReplicaEvent.PLACED, ReplicaEvent.LOADING, ReplicaEvent.READY, ReplicaEvent.DRAIN, ReplicaEvent.STOP):
        life = life.after(event, f"because {event}", 2.0)
    assert life.phase is ReplicaPhase.STOPPED
    assert life.ended
    assert life.reason == "because stop"
    assert len(life.story) == 6


@pytest.mark.parametrize("phase", [p for p in ReplicaPhase if p not in TERMINAL])
def test_every_living_phase_can_fail(phase):
    assert TRANSITIONS[phase, ReplicaEvent.FAIL] is ReplicaPhase.FAILED


@pytest.mark.parametrize("phase", sorted(TERMINAL))
def test_nothing_follows_the_end(phase):
    assert not [pair for pair in TRANSITIONS if pair[0] is phase]


def test_a_missing_pair_raises_with_the_story():
    life = born(incarnation(), 1.0, "wanted by a test")
    with pytest.raises(ReplicaError, match=r"m/0#1 is PENDING and cannot take .*wanted by a test"):
        life.after(ReplicaEvent.DRAIN, "too early", 2.0)


def test_the_story_is_bounded():
    life = born(incarnation(), 0.0, "x")
    assert len((life.story * 100)[-STORY_LINES:]) == STORY_LINES
    for _ in range(3):
        life = life.after(ReplicaEvent.PLACED, "p", 1.0)
        life = type(life)(life.incarnation, ReplicaPhase.PENDING, 1.0, "again", life.story * 20)
    assert len(life.after(ReplicaEvent.PLACED, "p", 1.0).story) == STORY_LINES
