from __future__ import annotations

import pytest

from cluster.controller.fleet import STALE_KEPT, Fleet, SlotRecord
from cluster.controller.replica_lifecycle import ReplicaEvent
from cluster.domain.ids import RankId
from cluster.domain.replica import RankPhase, ReplicaPhase
from tests.unit.controller.builders import SETTINGS, fleet, incarnation, ready_fleet, report


def test_a_slot_takes_one_generation_at_a_time():
    made = ready_fleet()
    with pytest.raises(AssertionError, match="has a live generation"):
        made.start(incarnation(generation=2), "f", 2, "x", 1.0)


def test_a_generation_never_comes_back():
    made = ready_fleet()
    made.advance(incarnation(), ReplicaEvent.FAIL, "x", 1.0)
    made.removed(incarnation(), 1.0, gone=True)
    with pytest.raises(AssertionError):
        made.start(incarnation(generation=1), "f", 2, "x", 2.0)


def test_transitions_are_told():
    told = []
    made = fleet(on_transition=told.append)
    made.start(incarnation(), "f", 2, "wanted", 0.0)
    made.advance(incarnation(), ReplicaEvent.FAIL, "dead: it is gone", 1.0)
    (step,) = told
    assert (step.before, step.after, step.reason) == (ReplicaPhase.PENDING, ReplicaPhase.FAILED, "dead: it is gone")
    assert len(step.story) == 2


def test_events_of_another_generation_or_after_the_end_are_ignored():
    made = ready_fleet()
    made.advance(incarnation(generation=9), ReplicaEvent.FAIL, "x", 1.0)
    assert made.view(incarnation()).phase is ReplicaPhase.READY
    made.advance(incarnation(), ReplicaEvent.FAIL, "first", 1.0)
    made.advance(incarnation(), ReplicaEvent.FAIL, "second", 1.0)
    assert made.view(incarnation()).life.reason == "first"


def test_live_incarnations_exclude_those_that_ended():
    made = ready_fleet(2)
    made.advance(incarnation(1), ReplicaEvent.FAIL, "x", 1.0)
    assert made.live() == {incarnation(0)}


def test_progress_is_bytes_phase_or_step():
    made = fleet()
    made.start(incarnation(), "f", 2, "x", 0.0)
    for now_s, loaded, phase in (
        (1.0, 10, RankPhase.LOADING), (2.0, 20, RankPhase.LOADING), (3.0, 20, RankPhase.LOADING),
        (4.0, 20, RankPhase.WARMING_UP), (5.0, 20, RankPhase.WARMING_UP),
    ):  # fmt: skip
        made.report(report(incarnation(), 0, phase, bytes_loaded=loaded), 0, now_s)
    rank = made.view(incarnation()).ranks[0]
    assert (rank.progress_at_s, rank.reported_at_s) == (4.0, 5.0)


def test_a_restarted_controller_adopts_the_last_generation_only():
    slots = {incarnation(0).replica: SlotRecord(4, "f", 2)}
    made = Fleet(SETTINGS, slots, 0.0, adopt_for_s=3.0)
    made.report(report(incarnation(0, 3), 0), "old", 1.0)
    made.report(report(incarnation(0, 4), 1), "s", 1.0)
    observed = made.observed()
    assert [(v.incarnation, v.phase, v.adopted) for v in observed.replicas] == [
        (incarnation(0, 4), ReplicaPhase.STARTING, True)
    ]
    assert [s.incarnation for s in observed.stale] == [incarnation(0, 3)]
    assert observed.replicas[0].fingerprint == "f"


def test_after_the_grace_nothing_is_adopted():
    made = Fleet(SETTINGS, {incarnation(0).replica: SlotRecord(4, "f", 2)}, 0.0, adopt_for_s=3.0)
    made.report(report(incarnation(0, 4), 0), "s", 3.1)
    assert made.observed().replicas == ()
    (stale,) = made.observed().stale
    assert stale.world_size == 2  # all its ranks are killed, not only the one that spoke


def test_strangers_are_bounded():
    made = fleet()
    for slot in range(STALE_KEPT + 10):
        made.report(report(incarnation(slot, 1, "stranger"), 0), slot, 1.0)
    assert len(made.observed().stale) == STALE_KEPT


def test_reports_of_ranks_beyond_the_layout_are_ignored():
    made = ready_fleet()
    made.report(report(incarnation(), 5), "s", 1.0)
    assert len(made.view(incarnation()).ranks) == 2


def test_a_broken_stream_of_an_unknown_rank_means_nothing():
    assert not ready_fleet().stream_broken(RankId(incarnation(7), 0), "s")


def test_why_it_waits_is_kept_until_it_is_placed():
    made = fleet()
    made.start(incarnation(), "f", 2, "x", 0.0)
    made.note_blocked(incarnation(), "no room")
    assert made.view(incarnation()).blocked == "no room"
    made.advance(incarnation(), ReplicaEvent.PLACED, "placed", 1.0)
    assert made.view(incarnation()).blocked == ""
