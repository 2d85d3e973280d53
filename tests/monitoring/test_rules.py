from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ops.monitoring.declared import declared, of_every_process
from ops.monitoring.promql import Catalogue, QueryError, operand
from ops.monitoring.rules import ALERTS, RECORDING, ROOT, alerts, rules
from tests.monitoring.promtool import promtool

UNIT_TESTS = Path(__file__).parent / "alerts.test.yaml"
NAMES = [alert.name for alert in alerts()]


@pytest.fixture
def catalogue() -> Catalogue:
    made = Catalogue.of((*declared(), *of_every_process()))
    for rule in rules():
        if not rule.is_alert:
            made.record(rule.name, rule.expr)
    return made


def test_promtool_takes_the_rules() -> None:
    for path in (RECORDING, ALERTS):
        done = promtool("check", "rules", "--lint-fatal", path)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_when_it_should_and_is_silent_when_not() -> None:
    done = promtool("test", "rules", UNIT_TESTS)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("expr", ["vector(0) > 1", "vector(1) > 0"], ids=["never", "always"])
def test_the_unit_tests_find_an_alert_that_is_wrong(name: str, expr: str, tmp_path: Path) -> None:
    content = yaml.safe_load(ALERTS.read_text())
    (rule,) = [rule for group in content["groups"] for rule in group["rules"] if rule["alert"] == name]
    rule |= {"expr": expr, "for": "0m"}
    broken, tests = tmp_path / "alerts.yaml", yaml.safe_load(UNIT_TESTS.read_text())
    broken.write_text(yaml.safe_dump(content))
    tests["rule_files"] = [str(RECORDING), str(broken)]
    tests["tests"] = [test for test in tests["tests"] if test["name"].startswith(name)]
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(tests))
    assert promtool("test", "rules", tmp_path / "test.yaml").returncode != 0


def test_every_alert_compares_a_recording_rule_with_a_number() -> None:
    recorded = {rule.name for rule in rules() if not rule.is_alert}
    assert {alert.name: operand(alert.expr)[0] for alert in alerts() if operand(alert.expr)[0] not in recorded} == {}


def test_rules_name_what_is_exported(catalogue: Catalogue) -> None:
    for alert in alerts():
        labels = catalogue.check(alert.expr)
        named = set(re.findall(r"\$labels\.(\w+)", " ".join(alert.annotations.values())))
        assert named <= labels, alert.name


def test_every_recording_rule_is_used(catalogue: Catalogue) -> None:
    used = {name for rule in rules() for name in catalogue.names(rule.expr)}
    assert [rule.name for rule in rules() if not rule.is_alert and rule.name not in used] == []


@pytest.mark.parametrize("alert", alerts(), ids=NAMES)
def test_every_alert_says_what_to_do_and_where_it_is_written(alert) -> None:
    assert set(alert.annotations) == {"summary", "description", "runbook"}
    assert alert.labels["severity"] in {"critical", "warning"}
    page, _, anchor = alert.annotations["runbook"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor in {heading.lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    ("expr", "says"),
    [
        ("cluster_nothing", "nobody exports"),
        ("cluster_router_endpoints{x='1'}", "has no label x"),
        ("cluster_router_requests_total", "is not rated"),
        ("sum(cluster_router_requests_total)", "is not rated"),
        ("max_over_time(cluster_router_failovers_total[5m])", "is not rated"),
        ("rate(cluster_router_endpoints[5m])", "is no counter"),
        ("sum by (replica) (cluster_router_endpoints)", "no label replica to aggregate by"),
        ("histogram_quantile(0.9, sum by (model) (rate(cluster_router_queue_seconds_bucket[5m])))", "needs the le"),
        ("histogram_quantile(0.9, rate(cluster_router_queue_seconds_sum[5m]))", "needs the le"),
        ("sum by (model) (cluster_router_endpoints) / cluster_router_ttft_objective_seconds", "never match"),
        ("cluster_router_endpoints * on (replica) cluster_engine_info", "not both sides"),
        ("cluster_rank_step * on (instance) group_left (model) cluster_rank_state", "brings no model"),
        ("cluster_rank_step * on (job) group_left (model) topk by (job) (1, cluster_rank_state)", "brings no model"),
        ("rate(cluster_router_requests_total[5m]", "unclosed"),
        ("rate(cluster_router_endpoints)", "expected type"),
    ],
)
def test_wrong_queries_are_found(catalogue: Catalogue, expr: str, says: str) -> None:
    with pytest.raises(QueryError, match=says):
        catalogue.check(expr)


@pytest.mark.parametrize("expr", ["a", "a > b", "a + 1", "1 < a"])
def test_an_alert_that_compares_nothing_with_a_number_is_found(expr: str) -> None:
    with pytest.raises(QueryError):
        operand(expr)
