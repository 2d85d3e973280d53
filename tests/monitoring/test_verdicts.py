from __future__ import annotations

from typing import Any, cast

import pytest
import yaml

from ops.monitoring import verdicts as module
from ops.monitoring.picture import formatted
from ops.monitoring.prometheus import JOB, Prometheus, Series, _series, configuration
from ops.monitoring.rules import ALERTS, RECORDING, alerts
from ops.monitoring.verdicts import Watch, verdicts


class Answers:
    """A Prometheus that has data for everything but what is named."""

    def __init__(self, *without: str, down: str = "", unhealthy: str = "", models: tuple[str, ...] = ("demo",)) -> None:
        self.without, self.down, self.unhealthy, self.models = without, down, unhealthy, models
        self.asked: list[str] = []

    def query_range(self, expr: str, _start_s: float, _end_s: float, _step_s: float) -> list[Series]:
        self.asked.append(expr)
        missing = any(name in expr for name in self.without)
        return [Series({}, () if missing else ((1.0, 2.0),))]

    def label_values(self, query: str) -> list[str]:
        return [] if query.endswith("namespace)") else list(self.models)

    def ask(self, what: str, **_: Any) -> Any:
        if what == "rules":
            names = [alert.name for alert in alerts()]
            return {"groups": [{"rules": [self._rule(name) for name in names]}]}
        labels = {"instance": "127.0.0.1:9100", "kind": "controller"}
        health = "down" if self.down else "up"
        return {"activeTargets": [{"labels": labels, "health": health, "lastError": self.down, "scrapeUrl": "u"}]}

    def _rule(self, name: str) -> dict[str, str]:
        is_ill = name == self.unhealthy
        return {"name": name, "query": "q", "health": "err" if is_ill else "ok", "lastError": "many" if is_ill else ""}


def faults(answers: Answers) -> dict[str, str]:
    watch = Watch(cast("Prometheus", answers), 0.0, 60.0, 2.0, 1.0)
    return {f"{verdict.kind} {verdict.what}": verdict.fault for verdict in verdicts(watch) if verdict.fault}


def test_nothing_is_wrong_when_everything_has_data() -> None:
    answers = Answers()
    assert faults(answers) == {}
    assert not any("$" in expr for expr in answers.asked)
    assert any('model=~".*"' in expr for expr in answers.asked)
    assert any('model=~"demo"' in expr for expr in answers.asked)
    assert any("[4s]" in expr for expr in answers.asked)


def test_a_metric_without_data_names_every_panel_rule_and_alert_that_asks_for_it() -> None:
    found = faults(Answers("cluster_engine_kv_cache_usage_ratio"))
    assert set(found) == {
        "panel engine / KV cache in use / A",
        "panel engine / KV blocks in use / A",
        "rule replica:cluster_engine_kv_cache_usage_ratio:avg5m",
        "recorded replica:cluster_engine_kv_cache_usage_ratio:avg5m",
        "alert KvCacheNearlyFull",
    }
    assert set(found.values()) == {"no data, or nothing but NaN"}


def test_a_choice_that_selects_nothing_is_found() -> None:
    assert "panel overview / Requests / A" in faults(Answers('model=~"demo"'))


@pytest.mark.parametrize(
    ("answers", "what"),
    [
        (Answers(down="connection refused"), "target controller 127.0.0.1:9100"),
        (Answers(unhealthy="RankHung"), "evaluation RankHung"),
        (Answers(models=()), "variable overview / $model"),
    ],
    ids=["target", "rule", "variable"],
)
def test_what_else_is_wrong_is_found(answers: Answers, what: str) -> None:
    assert what in faults(answers)


def test_nan_is_no_data() -> None:
    assert _series({}, [(1.0, "NaN"), (2.0, "0")]).points == ((2.0, 0.0),)
    assert module._verdict(Watch(cast("Prometheus", Answers("x")), 0, 1, 1, 1), "w", "k", "x").fault


def test_prometheus_finds_the_processes_at_the_controller() -> None:
    made = yaml.safe_load(configuration("http://127.0.0.1:9100/targets", 1, (RECORDING, ALERTS)))
    (scrape,) = made["scrape_configs"]
    assert scrape["job_name"] == JOB
    assert scrape["http_sd_configs"] == [{"url": "http://127.0.0.1:9100/targets", "refresh_interval": "1s"}]
    assert made["rule_files"] == [str(RECORDING), str(ALERTS)]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.5, "percentunit", "50%"),
        (0.25, "s", "250 ms"),
        (2, "s", "2 s"),
        (3, "reqps", "3 req/s"),
        (7, "suffix: tok/s", "7 tok/s"),
        (2, "short", "2"),
    ],
)
def test_axes_show_units(value: float, unit: str, text: str) -> None:
    assert formatted(value, unit) == text
