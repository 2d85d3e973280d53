from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from cluster.telemetry.metrics import (
    ALIKE_IN_PROCESSES,
    LATENCY_BUCKETS_S,
    ControllerMetrics,
    EngineMetrics,
    NodeMetrics,
    Observations,
    RankMetrics,
    RouterMetrics,
)

# Dashboards and alerts know these names: as they stand on /metrics, with their labels.
PUBLISHED = {
    RouterMetrics: {
        "cluster_router_processes": set(),
        "cluster_router_process_restarts_total": set(),
        "cluster_router_requests_total": {"model", "outcome"},
        "cluster_router_time_to_first_token_seconds": {"model"},
        "cluster_router_inter_token_latency_seconds": {"model"},
        "cluster_router_request_duration_seconds": {"model"},
        "cluster_router_queue_seconds": {"model"},
        "cluster_router_queued_requests": {"model"},
        "cluster_router_failovers_total": {"reason"},
        "cluster_router_endpoint_picks_total": {"replica", "scorer"},
        "cluster_router_goodput_requests_total": {"model"},
        "cluster_router_prompt_tokens_total": {"model"},
        "cluster_router_generation_tokens_total": {"model"},
        "cluster_router_requests_running": {"model"},
        "cluster_router_endpoints": {"model"},
        "cluster_router_ttft_objective_seconds": set(),
        "cluster_router_tpot_objective_seconds": set(),
    },
    EngineMetrics: {
        "cluster_engine_info": {"model", "replica"},
        "cluster_engine_kv_blocks": set(),
        "cluster_engine_num_requests_running": set(),
        "cluster_engine_num_requests_waiting": set(),
        "cluster_engine_kv_cache_usage_ratio": set(),
        "cluster_engine_prompt_tokens_total": set(),
        "cluster_engine_generation_tokens_total": set(),
        "cluster_engine_preemptions_total": set(),
        "cluster_engine_prefix_cache_queries_total": set(),
        "cluster_engine_prefix_cache_hits_total": set(),
        "cluster_engine_overlapped_steps_total": set(),
        "cluster_engine_step_seconds": {"kind"},
    },
    RankMetrics: {
        "cluster_rank_info": {"model", "replica", "rank", "node", "device"},
        "cluster_rank_step": {"replica", "rank"},
        "cluster_rank_step_age_seconds": {"replica", "rank"},
        "cluster_rank_loaded_bytes": {"replica", "rank"},
        "cluster_rank_shard_bytes": {"replica", "rank"},
        "cluster_rank_loading_peak_host_bytes": {"replica", "rank"},
        "cluster_rank_state": {"replica", "rank", "node", "state"},
    },
    NodeMetrics: {"cluster_node_up": set(), "cluster_node_ranks": {"phase"}},
    ControllerMetrics: {
        "cluster_replicas": {"model", "phase"},
        "cluster_desired_replicas": {"model"},
        "cluster_replica_failures_in_a_row": {"model", "replica"},
        "cluster_oldest_rank_report_seconds": {"model"},
        "cluster_replica_transitions_total": {"from", "to", "reason"},
        "cluster_reconcile_seconds": set(),
        "cluster_placement_blocked": {"model", "reason"},
    },
}
CLOSED_LABELS = {
    "model", "outcome", "reason", "replica", "scorer", "kind", "rank", "node", "state", "phase", "from", "to", "call",
    "device", "standing",
}  # fmt: skip


def declared(group: type) -> list[MetricWrapperBase]:
    return [value for value in vars(group(CollectorRegistry())).values() if isinstance(value, MetricWrapperBase)]


def exposed(group: type) -> dict[str, set[str]]:
    """Names on the page (histograms without their suffixes) and their labels, after one use of each metric."""
    registry = CollectorRegistry()
    made = group(registry)
    for metric in (value for value in vars(made).values() if isinstance(value, MetricWrapperBase)):
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


def test_every_router_metric_with_a_model_goes_with_the_model() -> None:
    metrics = RouterMetrics(CollectorRegistry())
    with_model = [m for m in vars(metrics).values() if "model" in getattr(m, "_labelnames", ())]
    assert {m._name for m in metrics.of_model} == {m._name for m in with_model}


def test_what_processes_show_alike_are_gauges_of_the_router() -> None:
    gauges = {metric._name for metric in declared(RouterMetrics) if metric._type == "gauge"}
    assert gauges >= ALIKE_IN_PROCESSES


SOURCES = {path: path.read_text() for path in (Path(__file__).parents[3] / "cluster").rglob("*.py")}
FED = r"\.(inc|dec|set|observe|set_function|labels|track_inprogress|remove|remove_by_labels)\b"


@pytest.mark.parametrize("group", PUBLISHED, ids=lambda group: group.__name__)
def test_every_declared_metric_is_fed(group: type) -> None:
    """Some code says ``metrics.NAME.inc()`` or the like; the declarations themselves do not count."""
    texts = [text for path, text in SOURCES.items() if path.name != "metrics.py"]
    attributes = [
        name for name, value in vars(group(CollectorRegistry())).items() if isinstance(value, MetricWrapperBase)
    ]
    unfed = [
        name
        for name in attributes
        if not any(re.search(rf"metrics\.{name}{FED}|(of_request|series)\.{name}\[", text) for text in texts)
    ]
    assert unfed == []


def test_observations_are_counted_as_the_library_counts_them() -> None:
    registry = CollectorRegistry()
    histogram = Histogram("a_seconds", "A.", ["by"], buckets=LATENCY_BUCKETS_S, registry=registry)
    ours = Observations(histogram.labels("us"))
    for value in (*LATENCY_BUCKETS_S, 0.0, -1.0, 0.003, 1000.0, float("inf")):
        ours.observe(value, 3)
        for _ in range(3):
            histogram.labels("it").observe(value)

    def of(by: str) -> dict[tuple[str, str | None], float]:
        samples = [sample for metric in registry.collect() for sample in metric.samples if sample.labels["by"] == by]
        return {(sample.name, sample.labels.get("le")): sample.value for sample in samples}

    assert of("us") == pytest.approx(of("it"))
    assert of("us")["a_seconds_count", None] == 3 * (len(LATENCY_BUCKETS_S) + 5)
