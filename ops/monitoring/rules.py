"""The rule files of the chart, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "llm-cluster"
RECORDING, ALERTS = CHART / "rules" / "recording.yaml", CHART / "rules" / "alerts.yaml"


@dataclass(frozen=True, slots=True)
class Rule:
    """A recording rule or an alert."""

    name: str
    expr: str
    is_alert: bool
    pending: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)


def rules() -> tuple[Rule, ...]:
    """Recording rules first, each file in its order."""
    return tuple(rule for path in (RECORDING, ALERTS) for rule in _rules_of(path))


def alerts() -> tuple[Rule, ...]:
    return tuple(rule for rule in rules() if rule.is_alert)


def _rules_of(path: Path) -> list[Rule]:
    groups = yaml.safe_load(path.read_text())["groups"]
    return [
        Rule(
            rule.get("alert") or rule["record"],
            rule["expr"],
            "alert" in rule,
            rule.get("for", ""),
            rule.get("labels", {}),
            rule.get("annotations", {}),
        )
        for group in groups
        for rule in group["rules"]
    ]
