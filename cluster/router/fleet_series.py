"""Which series a router shows: those of the models and replicas that are, zeros included, and no others."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.config.schema import RouterConfig
from cluster.domain.request import Outcome
from cluster.router.endpoint_table import Standing
from cluster.router.fleet_health import EJECTION_CAUSES
from cluster.router.retry_budget import RetryRefused
from cluster.router.sequence_stream import LossReason
from cluster.telemetry.metrics import RouterMetrics

GONE_MODELS_MAX = 64  # whose late requests are looked out for: by then those of earlier ones have ended


class FleetSeries:
    """Keeps ``metrics`` in step with the fleet.

    A counter that appears together with its first event hides that event from every rate, so all of a model's
    counters begin with the model. They outlive its replicas and end with it; a replica's own series end with the
    replica.
    """

    def __init__(self, metrics: RouterMetrics, config: RouterConfig) -> None:
        self._metrics = metrics
        self._models: frozenset[str] = frozenset()
        self._gone: dict[str, None] = {}  # the models that left last, in order
        self._replicas: frozenset[str] = frozenset()
        metrics.ttft_objective.set(config.ttft_objective_s)
        metrics.tpot_objective.set(config.tpot_objective_s)
        for reason in LossReason:
            metrics.failovers.labels(reason=reason.value)
        for cause in EJECTION_CAUSES:
            metrics.ejections.labels(reason=cause)
        for refused in RetryRefused:
            metrics.retries_refused.labels(reason=refused.value)

    def follow(self, ready: Mapping[str, int], replicas: frozenset[str]) -> None:
        """``ready``: replicas that take new work, by every known model; ``replicas``: those in the endpoint table."""
        metrics = self._metrics
        for model, count in ready.items():
            metrics.endpoints.labels(model=model).set(count)
        for model in ready.keys() - self._models:
            self._gone.pop(model, None)
            self._begin(model)
        self._forget_models(self._models - ready.keys())
        self._models = frozenset(ready)
        if replicas is self._replicas:
            return  # readiness changes often, and by thousands at a start; the table seldom
        for replica in replicas - self._replicas:
            for standing in Standing:
                series = metrics.endpoint_standing.labels(replica=replica, standing=standing.value)
                series.set(1 if standing is Standing.HEALTHY else 0)
        if left := self._replicas - replicas:
            metrics.forget("replica", left)
        self._replicas = replicas

    def _forget_models(self, left: frozenset[str]) -> None:
        """What is gone may come back with a late request: it is dropped again at the next change."""
        self._gone |= dict.fromkeys(left)
        for model in list(self._gone)[:-GONE_MODELS_MAX]:
            del self._gone[model]
        if self._gone and (back := (self._metrics.shown("model") & self._gone.keys()) | left):
            self._metrics.forget("model", back)

    def _begin(self, model: str) -> None:
        for outcome in Outcome:
            self._metrics.requests.labels(model=model, outcome=outcome.value)
        for metric in self._metrics.of_model:
            if metric is not self._metrics.requests:
                metric.labels(model=model)
