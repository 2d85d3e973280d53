from __future__ import annotations

import pytest

from cluster.controller.fleet import Fleet
from cluster.controller.health import diagnose, is_ready
from cluster.controller.replica_lifecycle import ReplicaEvent
from cluster.domain.ids import RankId
from cluster.domain.replica import RankPhase
from tests.unit.controller.builders import SETTINGS, fleet, incarnation, ready_fleet, report


def kind_of(made: Fleet, now_s: float) -> str | None:
    found = diagnose(made.observed().replicas[0], SETTINGS, now_s)
    return found.kind if found else None


def starting() -> Fleet:
    made = fleet()
    made.start(incarnation(), "f", 2, "wanted", 0.0)
    made.advance(incarnation(), ReplicaEvent.PLACED, "placed", 0.0)
    return made


def test_a_ready_replica_is_well():
    assert kind_of(ready_fleet(), 1.0) is None


def test_an_idle_rank_is_well_for_as_long_as_it_reports():
    made = ready_fleet()
    for rank in range(2):
        made.report(report(incarnation(), rank, step=7), (0, rank), 10_000.0)
    assert kind_of(made, 10_001.0) is None


def test_a_broken_stream_is_a_dead_rank_at_once():
    made = ready_fleet()
    assert made.stream_broken(RankId(incarnation(), 1), (0, 1))
    assert kind_of(made, 0.0) == "dead"


def test_an_older_stream_that_ends_means_nothing():
    made = ready_fleet()
    made.report(report(incarnation(), 1), "a newer stream", 0.5)
    assert not made.stream_broken(RankId(incarnation(), 1), (0, 1))
    assert kind_of(made, 1.0) is None


def test_a_rank_that_reconnects_is_alive_again():
    made = ready_fleet()
    made.stream_broken(RankId(incarnation(), 1), (0, 1))
    made.report(report(incarnation(), 1), "again", 0.1)
    assert kind_of(made, 0.2) is None


@pytest.mark.parametrize(("silent_s", "expected"), [(4.9, None), (5.1, "silent")])
def test_silence(silent_s, expected):
    assert kind_of(ready_fleet(), silent_s) == expected


@pytest.mark.parametrize(("age_s", "expected"), [(59.0, None), (61.0, "hung")])
def test_a_step_that_does_not_end(age_s, expected):
    made = ready_fleet()
    made.report(report(incarnation(), 0, step_age_s=age_s), (0, 0), 0.5)
    assert kind_of(made, 1.0) == expected


def test_a_rank_that_hangs_is_named_rather_than_one_that_waits_for_it():
    made = ready_fleet()
    made.report(report(incarnation(), 0, step_age_s=70.0, waits_for_peer=True), (0, 0), 0.5)
    assert "rank 0" in diagnose(made.observed().replicas[0], SETTINGS, 1.0).text, "nobody else is ill"
    made.report(report(incarnation(), 1, step_age_s=65.0), (0, 1), 0.5)
    assert "rank 1" in diagnose(made.observed().replicas[0], SETTINGS, 1.0).text


def test_a_dead_rank_is_named_rather_than_one_that_failed_without_it():
    made = ready_fleet()
    lost = {"failure": "EngineFailed: Rank 1 is gone.", "waits_for_peer": True}
    made.report(report(incarnation(), 0, RankPhase.FAILED, **lost), (0, 0), 0.5)
    assert kind_of(made, 1.0) == "failed"
    made.stream_broken(RankId(incarnation(), 1), (0, 1))
    found = diagnose(made.observed().replicas[0], SETTINGS, 1.0)
    assert (found.kind, "rank 1" in found.text) == ("dead", True)


def test_a_failure_is_told_in_the_ranks_own_words():
    made = ready_fleet()
    made.report(report(incarnation(), 1, RankPhase.FAILED, failure="CUDA out of memory"), (0, 1), 0.5)
    found = diagnose(made.observed().replicas[0], SETTINGS, 1.0)
    assert found.kind == "failed"
    assert "rank 1 on 10.0.0.1" in found.text
    assert "CUDA out of memory" in found.text


def test_a_load_that_stands_still():
    made = starting()
    for now_s, loaded in ((0.0, 10), (299.0, 20), (598.0, 20), (600.0, 20)):
        for rank in range(2):
            made.report(report(incarnation(), rank, RankPhase.LOADING, bytes_loaded=loaded), rank, now_s)
    assert kind_of(made, 598.0) is None
    assert kind_of(made, 600.0) == "stalled"


def test_ranks_that_never_report_have_the_start_deadline():
    assert kind_of(starting(), 599.0) is None
    assert kind_of(starting(), 601.0) == "late"


def test_an_adopted_replica_must_be_complete_soon():
    from cluster.controller.fleet import SlotRecord

    made = fleet(0.0, slots={incarnation().replica: SlotRecord(1, "f", 2)}, adopt_for_s=3.0)
    made.report(report(incarnation(), 0), "s", 1.0)
    made.report(report(incarnation(), 0), "s", 6.5)
    assert kind_of(made, 5.9) is None
    assert kind_of(made, 6.6) == "late"


def test_readiness_needs_every_rank_and_the_engines_address():
    made = starting()
    made.report(report(incarnation(), 0), 0, 1.0)
    assert not is_ready(made.observed().replicas[0])
    made.report(report(incarnation(), 1, RankPhase.WARMING_UP), 1, 1.0)
    assert not is_ready(made.observed().replicas[0])
    made.report(report(incarnation(), 1), 1, 1.0)
    assert is_ready(made.observed().replicas[0])
    made.report(report(incarnation(), 0, ports={"metrics": 1}), 0, 1.0)
    assert not is_ready(made.observed().replicas[0])
