from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from cluster.telemetry.metrics import ControllerMetrics, EngineMetrics, RankMetrics, RouterMetrics

# Dashboards and alerts know these names: as they stand on /metrics, with their labels.
PUBLISHED = {
    RouterMetrics: {
        "cluster_router_requests_total": {"model", "outcome"},
        "cluster_router_time_to_first_token_seconds": {"model"},
        "cluster_router_inter_token_latency_seconds": {"model"},
        "cluster_router_request_duration_seconds": {"model"},
        "cluster_router_queue_seconds": {"model"},
        "cluster_router_queued_requests": {"model"},
        "cluster_router_failovers_total": {"reason"},
        "cluster_router_endpoint_picks_total": {"replica", "scorer"},
    },
    EngineMetrics: {
        "cluster_engine_num_requests_running": set(),
        "cluster_engine_num_requests_waiting": set(),
        "cluster_engine_kv_cache_usage_ratio": set(),
        "cluster_engine_prompt_tokens_total": set(),
        "cluster_engine_generation_tokens_total": set(),
        "cluster_engine_preemptions_total": set(),
        "cluster_engine_step_seconds": {"kind"},
    },
    RankMetrics: {
        "cluster_rank_step": {"replica", "rank"},
        "cluster_rank_state": {"replica", "rank", "node", "state"},
    },
    ControllerMetrics: {
        "cluster_replicas": {"model", "phase"},
        "cluster_replica_transitions_total": {"from", "to", "reason"},
        "cluster_reconcile_seconds": set(),
        "cluster_placement_blocked": {"model", "reason"},
    },
}
CLOSED_LABELS = {
    "model", "outcome", "reason", "replica", "scorer", "kind", "rank", "node", "state", "phase", "from", "to", "call",
}  # fmt: skip


def declared(group: type) -> list[MetricWrapperBase]:
    return [value for value in vars(group(CollectorRegistry())).values() if isinstance(value, MetricWrapperBase)]


def exposed(group: type) -> dict[str, set[str]]:
    """Names on the page (histograms without their suffixes) and their labels, after one use of each metric."""
    registry = CollectorRegistry()
    for metric in vars(group(registry)).values():
        child = metric.labels(*("x" for _ in metric._labelnames)) if metric._labelnames else metric
        child.observe(1) if hasattr(child, "observe") else child.inc()
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                name = family.name if family.type == "histogram" else sample.name
                found[name] = found.get(name, set()) | set(sample.labels) - {"le"}
    return found


@pytest.mark.parametrize("group", PUBLISHED, ids=lambda group: group.__name__)
class TestEveryGroup:
    def test_exposes_the_published_names_and_labels(self, group: type) -> None:
        page = exposed(group)
        assert {name: page.get(name) for name in PUBLISHED[group]} == PUBLISHED[group]

    def test_labels_come_from_the_closed_set(self, group: type) -> None:
        assert {label for labels in exposed(group).values() for label in labels} <= CLOSED_LABELS

    def test_names_start_with_ours_and_end_with_their_unit(self, group: type) -> None:
        assert all(name.startswith("cluster_") for name in exposed(group))
        assert all(metric._documentation.endswith(".") for metric in declared(group))
        histograms = [metric._name for metric in declared(group) if metric._type == "histogram"]
        assert all(name.endswith("_seconds") for name in histograms)

    def test_twice_on_one_registry_is_refused(self, group: type) -> None:
        registry = CollectorRegistry()
        group(registry)
        with pytest.raises(ValueError, match="Duplicated"):
            group(registry)


def test_all_groups_fit_on_one_registry() -> None:
    registry = CollectorRegistry()
    for group in PUBLISHED:
        group(registry)
    assert b"cluster_engine_num_requests_running" in generate_latest(registry)
