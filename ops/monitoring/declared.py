"""What every process of the cluster exports, taken from the declarations themselves."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from cluster.telemetry.exposition import new_registry
from cluster.telemetry.metrics import ControllerMetrics, EngineMetrics, NodeMetrics, RankMetrics, RouterMetrics

# Which process shows which group, in the order of a request's way.
GROUPS: dict[str, tuple[type, str]] = {
    "router": (RouterMetrics, "Every router."),
    "engine": (EngineMetrics, "The leader (rank 0) of every replica."),
    "rank": (RankMetrics, "Every rank, the leader too."),
    "node": (NodeMetrics, "Every `llm-cluster worker`; `llm-cluster serve` has none."),
    "controller": (ControllerMetrics, "The controller."),
}
# What Prometheus knows of every target, wherever it runs; a namespace only on Kubernetes.
TARGET_LABELS = frozenset({"job", "instance", "namespace"})
PROMETHEUS_SERIES = ("up", "scrape_duration_seconds")


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric; ``name`` as it stands on /metrics, a histogram without its suffixes."""

    group: str
    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str
    buckets: tuple[float, ...] = ()

    @property
    def series_names(self) -> tuple[str, ...]:
        """As queries name them."""
        return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count")) if self.buckets else (self.name,)


def declared() -> tuple[Metric, ...]:
    """All metrics of all groups, in the order of their declaration."""
    found: list[Metric] = []
    for group, (kind, _) in GROUPS.items():
        metrics = vars(kind(CollectorRegistry())).values()
        found += [_metric(group, metric) for metric in metrics if isinstance(metric, MetricWrapperBase)]
    return tuple(found)


def of_every_process() -> tuple[Metric, ...]:
    """What prometheus_client tells about the process itself."""
    families = sorted(new_registry().collect(), key=lambda family: family.name)
    return tuple(
        Metric(
            "process",
            f"{family.name}_total" if family.type == "counter" else family.name,
            family.type,
            tuple(sorted({label for sample in family.samples for label in sample.labels})),
            family.documentation.rstrip(".") + ".",
        )
        for family in families
    )


def _metric(group: str, metric: MetricWrapperBase) -> Metric:
    suffix = "_total" if metric._type == "counter" else ""  # noqa: SLF001 - no public name says it
    bounds = getattr(metric, "_upper_bounds", None) or metric._kwargs.get("buckets", ())  # noqa: SLF001 - with labels
    return Metric(
        group,
        f"{metric._name}{suffix}",  # noqa: SLF001
        metric._type,  # noqa: SLF001
        tuple(metric._labelnames),  # noqa: SLF001
        metric._documentation,  # noqa: SLF001
        tuple(bound for bound in bounds if bound != float("inf")),
    )
