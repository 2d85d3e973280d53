"""Which series the controller shows: those of desired models and their replicas, and no others."""

from __future__ import annotations

from cluster.controller.desired import Desired, DesiredModel
from cluster.controller.observed import Observed, ReplicaView, SlotHistory
from cluster.domain.ids import ReplicaId
from cluster.domain.replica import ReplicaPhase
from cluster.telemetry.metrics import ControllerMetrics

NO_ROOM = "no_room"


class ReplicaSeries:
    """Keeps the gauges of ``metrics`` in step. Set before others are removed: a scrape finds some always."""

    def __init__(self, metrics: ControllerMetrics) -> None:
        self._metrics = metrics
        self._models: set[str] = set()
        self._replicas: set[ReplicaId] = set()

    def follow(self, desired: Desired, observed: Observed, now_s: float) -> None:
        metrics = self._metrics
        models = {model.name for model in desired}
        replicas = {ReplicaId(model.name, slot) for model in desired for slot in range(model.replicas)}
        replicas |= {view.replica for view in observed.replicas if view.replica.model in models}
        for model in desired:
            self._show(model, observed.of_model(model.name), now_s)
        for replica in replicas:
            failures = observed.slots.get(replica, SlotHistory()).failures
            metrics.failures.labels(replica.model, str(replica)).set(failures)
        for replica in self._replicas - replicas:
            metrics.failures.remove(replica.model, str(replica))
        for name in self._models - models:
            for gauge in (metrics.desired_replicas, metrics.replicas, metrics.placement_blocked, metrics.oldest_report):
                gauge.remove_by_labels({"model": name})
        self._models, self._replicas = models, replicas

    def _show(self, model: DesiredModel, views: tuple[ReplicaView, ...], now_s: float) -> None:
        metrics = self._metrics
        metrics.desired_replicas.labels(model.name).set(model.replicas)
        for phase in ReplicaPhase:
            metrics.replicas.labels(model.name, phase.value).set(sum(view.phase is phase for view in views))
        metrics.placement_blocked.labels(model.name, NO_ROOM).set(any(view.blocked for view in views))
        ages = [now_s - rank.reported_at_s for view in views if not view.life.ended for rank in view.ranks if rank]
        metrics.oldest_report.labels(model.name).set(max(ages, default=0.0))
