"""The Prometheus operator's custom resource definitions on the server, in a form that an old one takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.kube.kube_api import KubeApi, until

DEFINITIONS = Path(__file__).parents[1] / "chart" / "crds"
PATH = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
# From here on validation rules in CEL are on, and an empty default is a default.
MODERN_MINOR = 25


@contextmanager
def installed(api: KubeApi) -> Iterator[None]:
    """Those that the server does not have yet, for as long as the context lasts."""
    added = []
    try:
        for definition in definitions():
            name = definition["metadata"]["name"]
            if api.call("GET", f"{PATH}/{name}").status == 404:
                api.ok("POST", PATH, definition if api.minor_version() >= MODERN_MINOR else down_levelled(definition))
                added.append(name)
        for name in added:
            until(lambda name=name: established(api.get(f"{PATH}/{name}")))
        yield
    finally:
        for name in added:
            api.ok("DELETE", f"{PATH}/{name}")


def definitions() -> list[dict[str, Any]]:
    texts = [path.read_text() for path in sorted(DEFINITIONS.glob("*.yaml"))]
    loaded = [one for text in texts for one in yaml.load_all(text, yaml.CSafeLoader) if one]
    found = [one for one in loaded if one["spec"].get("group") == "monitoring.coreos.com"]
    assert len(found) >= 3, f"ServiceMonitor, PodMonitor and PrometheusRule are not all in {DEFINITIONS}"
    return found


def established(definition: dict[str, Any]) -> bool:
    conditions = definition.get("status", {}).get("conditions") or []
    return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)


def down_levelled(value: Any) -> Any:
    """Without what Kubernetes 1.20 refuses: CEL rules, empty defaults, and map keys that are then without a default."""
    if isinstance(value, list):
        return [down_levelled(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: down_levelled(item) for key, item in value.items()}
    for key in ("x-kubernetes-validations", "selectableFields"):
        if isinstance(kept.get(key), list):
            del kept[key]
    if kept.get("default") == "":
        del kept["default"]
    keys, items = kept.get("x-kubernetes-list-map-keys"), kept.get("items")
    if isinstance(keys, list) and isinstance(items, dict):
        properties, required = items.get("properties", {}), items.get("required", [])
        if any("default" not in properties.get(key, {}) and key not in required for key in keys):
            del kept["x-kubernetes-list-map-keys"]
            kept["x-kubernetes-list-type"] = "atomic"
    return kept
