"""Every query of dashboards, rules and alerts, asked at a live Prometheus: which of them have data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from ops.monitoring.prometheus import Prometheus, Series
from ops.monitoring.promql import operand
from ops.monitoring.queries import (
    ALL,
    PanelQuery,
    pages,
    panel_queries,
    rate_interval_s,
    regex_of,
    substituted,
    variable_queries,
)
from ops.monitoring.rules import rules

# On Kubernetes only; elsewhere "All" is the one choice, and it selects everything.
OPTIONAL_VARIABLES = frozenset({"namespace"})


@dataclass(frozen=True, slots=True)
class Verdict:
    """One query and what came of it. ``fault`` is empty when it had data."""

    what: str
    kind: str
    expr: str
    series: int = 0
    samples: int = 0
    last: float | None = None
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Watch:
    """A stretch of time of one Prometheus, looked at in steps."""

    prometheus: Prometheus
    start_s: float
    end_s: float
    step_s: float
    scrape_interval_s: float
    answers: dict[str, list[Series]] = field(default_factory=dict)

    def ask(self, expr: str) -> list[Series]:
        if expr not in self.answers:
            found = self.prometheus.query_range(expr, self.start_s, self.end_s, self.step_s)
            self.answers[expr] = [series for series in found if series.points]
        return self.answers[expr]

    def expr_of(self, query: PanelQuery, chosen: Mapping[str, str]) -> str:
        seconds = rate_interval_s(self.step_s, self.scrape_interval_s)
        return substituted(query.expr, {**chosen, "__rate_interval": f"{seconds:g}s"})

    def panel(self, query: PanelQuery) -> list[Series]:
        """What a panel shows with every variable at "All"."""
        return self.ask(self.expr_of(query, dict.fromkeys(("namespace", "model", "replica"), ALL)))


def verdicts(watch: Watch) -> list[Verdict]:
    """Panels with "All" and with every value chosen by name, variables, rules, alerts' operands, targets."""
    return [*_variables(watch), *_panels(watch), *_rules(watch), *_targets(watch), *_rule_health(watch)]


def _variables(watch: Watch) -> list[Verdict]:
    found = []
    for name, page in pages().items():
        chosen = choices(watch, name)
        for variable, query in variable_queries(page).items():
            values = chosen[variable]
            missing = not values and variable not in OPTIONAL_VARIABLES
            found.append(
                Verdict(
                    f"{name} / ${variable}", "variable", query, len(values), len(values),
                    fault="it has no values" if missing else "",
                )
            )  # fmt: skip
    return found


def choices(watch: Watch, dashboard: str) -> dict[str, tuple[str, ...]]:
    """The values of a dashboard's variables, each asked with those before it at "All"."""
    found: dict[str, tuple[str, ...]] = {}
    for variable, query in variable_queries(pages()[dashboard]).items():
        asked = substituted(query, dict.fromkeys(found, ALL))
        found[variable] = tuple(value for value in watch.prometheus.label_values(asked) if value)
    return found


def _panels(watch: Watch) -> list[Verdict]:
    found = []
    named = {name: {k: regex_of(v) if v else ALL for k, v in choices(watch, name).items()} for name in pages()}
    for query in panel_queries():
        everything = dict.fromkeys(named[query.dashboard], ALL)
        for chosen in (everything, named[query.dashboard]):
            expr = watch.expr_of(query, chosen)
            verdict = _verdict(watch, query.title, "panel", expr)
            if verdict.fault or chosen is everything:
                found.append(verdict)
            if verdict.fault:
                break
    return found


def _rules(watch: Watch) -> list[Verdict]:
    found = []
    for rule in rules():
        if rule.is_alert:
            found.append(_verdict(watch, rule.name, "alert", operand(rule.expr)[0]))
        else:
            found.append(_verdict(watch, rule.name, "rule", rule.expr))
            found.append(_verdict(watch, rule.name, "recorded", rule.name))
    return found


def _verdict(watch: Watch, what: str, kind: str, expr: str) -> Verdict:
    series = watch.ask(expr)
    samples = sum(len(one.points) for one in series)
    last = max(series, key=lambda one: one.points[-1][0]).points[-1][1] if series else None
    return Verdict(what, kind, expr, len(series), samples, last, "" if samples else "no data, or nothing but NaN")


def _targets(watch: Watch) -> list[Verdict]:
    active = watch.prometheus.ask("targets", state="active")["activeTargets"]
    found = []
    for target in sorted(active, key=lambda target: target["labels"]["instance"]):
        labels, is_up = target["labels"], target["health"] == "up"
        what = " ".join(labels[name] for name in ("kind", "replica", "rank", "instance") if name in labels)
        fault = "" if is_up else target["lastError"] or "not scraped yet"
        found.append(Verdict(what, "target", target["scrapeUrl"], int(is_up), int(is_up), fault=fault))
    return found or [Verdict("the controller's /targets", "target", "", fault="it lists none")]


def _rule_health(watch: Watch) -> list[Verdict]:
    """Rules that Prometheus could not evaluate: two series where a join wants one, a template that breaks."""
    groups = watch.prometheus.ask("rules")["groups"]
    return [
        Verdict(rule["name"], "evaluation", rule["query"], fault=rule.get("lastError") or rule["health"])
        for group in groups
        for rule in group["rules"]
        if rule["health"] != "ok"
    ]


def as_json(found: list[Verdict]) -> list[dict[str, object]]:
    return [asdict(verdict) for verdict in found]
