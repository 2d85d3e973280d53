"""helm/llm-cluster/dashboards/*.json: the Grafana dashboards."""

from __future__ import annotations

from ops.monitoring.pages import engine, overview, ranks, router
from ops.monitoring.panels import to_json

FOLDER = "helm/llm-cluster/dashboards"


def files() -> dict[str, str]:
    pages = (overview.PAGE, router.PAGE, engine.PAGE, ranks.PAGE)
    return {f"{FOLDER}/{page.name}.json": to_json(page) for page in pages}
