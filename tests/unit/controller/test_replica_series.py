from __future__ import annotations

from prometheus_client import CollectorRegistry

from cluster.controller.replica_lifecycle import ReplicaEvent
from cluster.controller.replica_series import ReplicaSeries
from cluster.domain.replica import ReplicaPhase
from cluster.telemetry.metrics import ControllerMetrics
from tests.unit.controller.builders import fleet, incarnation, model, ready_fleet

PER_MODEL = len(ReplicaPhase) + 3  # desired, blocked, oldest report


class Page:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.series = ReplicaSeries(ControllerMetrics(self.registry))

    def samples(self) -> dict[tuple[str, ...], float]:
        found = (s for family in self.registry.collect() for s in family.samples if "model" in s.labels)
        return {(s.name, *s.labels.values()): s.value for s in found}


def test_desired_beside_observed() -> None:
    page, seen = Page(), ready_fleet(2)
    page.series.follow((model(replicas=3),), seen.observed(), 5.0)
    found = page.samples()
    assert found["cluster_desired_replicas", "m"] == 3
    assert found["cluster_replicas", "m", "READY"] == 2
    assert found["cluster_replicas", "m", "FAILED"] == 0
    assert found["cluster_placement_blocked", "m", "no_room"] == 0
    assert found["cluster_oldest_rank_report_seconds", "m"] == 5.0  # of the first one's ranks
    assert [found["cluster_replica_failures_in_a_row", "m", f"m/{slot}"] for slot in range(3)] == [0, 0, 0]


def test_failures_and_blocks_show() -> None:
    page, seen = Page(), fleet()
    seen.start(incarnation(), model().fingerprint, 2, "wanted", 0.0)
    seen.note_blocked(incarnation(), "no node has room")
    page.series.follow((model(),), seen.observed(), 1.0)
    assert page.samples()["cluster_placement_blocked", "m", "no_room"] == 1
    seen.advance(incarnation(), ReplicaEvent.FAIL, "start: no", 2.0)
    page.series.follow((model(),), seen.observed(), 2.0)
    assert page.samples()["cluster_replica_failures_in_a_row", "m", "m/0"] == 1


def test_series_go_with_what_they_are_about() -> None:
    page, seen = Page(), fleet()
    page.series.follow((model("a", replicas=3), model("b", replicas=1)), seen.observed(), 0.0)
    page.series.follow((model("a", replicas=1),), seen.observed(), 1.0)
    assert {labels[0] for _, *labels in page.samples()} == {"a"}
    assert [key for key in page.samples() if key[-1] in ("a/1", "a/2")] == []


def test_series_are_bounded_by_models_and_replicas_whatever_comes_and_goes() -> None:
    page, seen = Page(), fleet()
    models, replicas = 5, 8
    for generation in range(20):
        desired = tuple(model(f"m{generation}-{index}", replicas=replicas) for index in range(models))
        page.series.follow(desired, seen.observed(), float(generation))
    assert len(page.samples()) == models * (PER_MODEL + replicas)
