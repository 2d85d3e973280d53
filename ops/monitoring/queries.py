"""Every query of every committed dashboard, and what Grafana makes of it before it asks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ops.monitoring.rules import CHART

DASHBOARDS = CHART / "dashboards"
ALL = ".*"
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::\w+)?\}|(\w+))")
_SPECIAL = re.compile(r"[\\^$*+?.()|{}\[\]]")


@dataclass(frozen=True, slots=True)
class PanelQuery:
    """One query of one panel."""

    dashboard: str
    panel: str
    ref_id: str
    expr: str
    legend: str
    unit: str

    @property
    def title(self) -> str:
        return f"{self.dashboard} / {self.panel} / {self.ref_id}"


def pages() -> dict[str, dict[str, Any]]:
    """The committed dashboards by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}


def panel_queries() -> tuple[PanelQuery, ...]:
    return tuple(
        PanelQuery(
            name, panel["title"], target["refId"], target["expr"], target["legendFormat"],
            panel["fieldConfig"]["defaults"]["unit"],
        )
        for name, page in pages().items()
        for panel in page["panels"]
        for target in panel.get("targets", ())
    )  # fmt: skip


def variable_queries(page: Mapping[str, Any]) -> dict[str, str]:
    """The query of each variable that asks Prometheus for its values."""
    return {v["name"]: v["query"]["query"] for v in page["templating"]["list"] if v["type"] == "query"}


def rate_interval_s(step_s: float, scrape_interval_s: float) -> float:
    """$__rate_interval as Grafana computes it."""
    return max(step_s + scrape_interval_s, 4 * scrape_interval_s)


def regex_of(values: tuple[str, ...]) -> str:
    """Several chosen values as Grafana writes them into a =~."""
    escaped = [_SPECIAL.sub(lambda found: "\\\\" + found.group(), value) for value in values]
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"


def substituted(expr: str, variables: Mapping[str, str]) -> str:
    """``expr`` without variables; KeyError for one that nobody sets."""
    return _VARIABLE.sub(lambda found: variables[found.group(1) or found.group(2)], expr)
