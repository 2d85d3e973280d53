from __future__ import annotations

from cluster.domain.request import Outcome
from cluster.router.endpoint_table import Standing
from cluster.router.fleet_health import EJECTION_CAUSES
from cluster.router.retry_budget import RetryRefused
from cluster.router.sequence_stream import LossReason
from ops.generators import metrics_doc
from ops.monitoring.declared import declared
from ops.monitoring.rules import rules


def test_the_page_names_every_metric_rule_and_outcome() -> None:
    page = metrics_doc.page()
    assert [metric.name for metric in declared() if f"| `{metric.name}` | {metric.kind} |" not in page] == []
    assert [
        rule.name for rule in rules() if f"### {rule.name}\n" not in page and f"| `{rule.name}` |" not in page
    ] == []
    assert set(metrics_doc.OUTCOMES) == set(Outcome)
    assert set(metrics_doc.LOSSES) == set(LossReason)
    assert set(metrics_doc.STANDINGS) == {standing.value for standing in Standing}
    assert set(metrics_doc.EJECTIONS) == set(EJECTION_CAUSES)
    assert set(metrics_doc.REFUSED_RETRIES) == set(RetryRefused)


def test_names_stand_as_they_are_exported() -> None:
    names = {metric.name: metric for metric in declared()}
    assert names["cluster_router_requests_total"].labels == ("model", "outcome")
    assert names["cluster_engine_step_seconds"].buckets[0] == 0.0005
    assert names["cluster_engine_step_seconds"].series_names[0] == "cluster_engine_step_seconds_bucket"
