"""Values that the chart is installed with: one set per choice, everything at once, nothing of it."""

from __future__ import annotations

from typing import Any

from chart_harness import merged
from chart_matrix import CASES, values_of

Values = dict[str, Any]

SMALLEST: Values = {
    "auth": {"token": "0123456789abcdef0123456789abcdef"},
    "models": [{"model": "demo", "tensor_parallel_size": 2, "replicas": 1}],
    "workers": [{"name": "cpu", "replicas": 2, "deviceKind": "cpu", "devicesPerPod": 2}],
}


def smallest(**changes: Any) -> Values:
    return merged(SMALLEST, changes)


def monitoring(on: bool) -> Values:
    parts = ("serviceMonitor", "podMonitor", "prometheusRule", "dashboards")
    return {part: {"enabled": on} for part in parts}


GPU_GROUP: Values = {"name": "h100", "replicas": 2, "deviceKind": "gpu", "devicesPerPod": 8}

EVERYTHING_ON: Values = smallest(
    controller={"persistence": {"enabled": True, "size": "1Gi"}},
    router={
        "autoscaling": {"enabled": True, "minReplicas": 2, "maxReplicas": 4},
        "podDisruptionBudget": {"enabled": True},
    },
    workers=[*SMALLEST["workers"], GPU_GROUP],
    networkPolicy={"enabled": True},
    rbac={"create": True},
    metrics=monitoring(True),
    tests={"enabled": True},
)
EVERYTHING_OFF: Values = smallest(
    controller={"persistence": {"enabled": False}},
    router={"replicas": 1, "autoscaling": {"enabled": False}, "podDisruptionBudget": {"enabled": False}},
    networkPolicy={"enabled": False},
    rbac={"create": False},
    metrics=monitoring(False),
    tests={"enabled": False},
)
# Each of the cases that are rendered elsewhere too, and all toggles together.
SETS: dict[str, Values] = {
    **{case: values_of(case) for case in CASES},
    "everything on": EVERYTHING_ON,
    "everything off": EVERYTHING_OFF,
}
