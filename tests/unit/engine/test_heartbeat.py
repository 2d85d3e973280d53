from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from prometheus_client import CollectorRegistry

from cluster.domain.clock import ManualClock
from cluster.domain.hardware import DeviceKind
from cluster.domain.ids import Incarnation, RankId, ReplicaId
from cluster.domain.replica import RankPhase
from cluster.engine.heartbeat import Heartbeat
from cluster.engine.progress import RankProgress
from cluster.engine.rank_spec import RankSpec
from cluster.telemetry.metrics import RankMetrics

WHO = {"replica": "demo/0", "rank": "1"}
SPEC = cast(
    "RankSpec",
    SimpleNamespace(rank_id=RankId(Incarnation(ReplicaId("demo", 0), 3), 1), host="10.0.0.2", device=DeviceKind.CPU),
)


class Rank:
    def __init__(self) -> None:
        self.clock, self.registry = ManualClock(), CollectorRegistry()
        self.progress = RankProgress(self.clock)
        self.heartbeat = Heartbeat(SPEC, self.progress, 1, RankMetrics(self.registry))  # never started: nobody reports

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"cluster_rank_{name}", {**WHO, **labels})


@pytest.fixture
def rank() -> Rank:
    return Rank()


def test_a_scrape_sees_what_is_whether_reports_leave_or_not(rank: Rank) -> None:
    rank.progress.bytes_total, rank.progress.bytes_loaded, rank.progress.peak_host_bytes = 100, 40, 50
    assert (rank.value("shard_bytes"), rank.value("loaded_bytes"), rank.value("loading_peak_host_bytes")) == (
        100,
        40,
        50,
    )
    rank.progress.begin_step()
    rank.clock.advance(7.0)
    assert rank.value("step_age_seconds") == 7.0
    rank.progress.end_step(12, 0.1)
    assert (rank.value("step"), rank.value("step_age_seconds")) == (12, 0.0)


def test_it_is_in_one_state(rank: Rank) -> None:
    for phase in (RankPhase.STARTING, RankPhase.READY):
        rank.progress.phase = phase
        states = {p: rank.value("state", node="10.0.0.2", state=p.value) for p in RankPhase}
        assert states == {p: float(p is phase) for p in RankPhase}


def test_its_series_are_those_of_one_rank(rank: Rank) -> None:
    assert rank.value("info", model="demo", node="10.0.0.2", device="cpu") == 1.0
    samples = [sample for family in rank.registry.collect() for sample in family.samples]
    assert len(samples) == 6 + len(RankPhase)
