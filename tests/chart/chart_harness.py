"""Renders the chart with real Helm, and reads what it rendered. No cluster is needed."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart, HelmError, _native

CHART = Path(__file__).parents[2] / "helm" / "llm-cluster"
RELEASE, NAMESPACE = "demo", "serving"
OLD, NEW = "v1.20.15", "v1.37.0"  # the oldest Kubernetes that the chart is for, and the newest that is checked

Values = Mapping[str, Any]
Manifest = dict[str, Any]

# The least that every rendering needs.
AUTH: Values = {"auth": {"existingSecret": "ray-token"}}

__all__ = ["AUTH", "CHART", "NAMESPACE", "NEW", "OLD", "RELEASE", "HelmError", "Manifest", "Values"]


class _NoDuplicates(yaml.CSafeLoader):
    """Kubernetes keeps the last of two equal keys and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key twice in {keys} ({node.start_mark})"
        return super().construct_mapping(node, deep)


@functools.cache
def _chart() -> Chart:
    return Chart.load(CHART)


def render_text(
    values: Values,
    *,
    kube_version: str = NEW,
    api_versions: tuple[str, ...] = (),
    name: str = RELEASE,
    namespace: str = NAMESPACE,
) -> dict[str, str]:
    """The rendered text of each template; HelmError with the chart's own sentence when it refuses."""
    options = {"name": name, "namespace": namespace, "kube_version": kube_version, "api_versions": list(api_versions)}
    # Chart.render knows neither of the last two, the library below it does.
    text = _native.call_string("helm_render", _chart()._raw(), json.dumps(values), json.dumps(options))
    rendered: dict[str, str] = json.loads(text)
    return {path.removeprefix("llm-cluster/templates/"): text for path, text in rendered.items()}


def render(values: Values, **options: Any) -> list[Manifest]:
    """Every object that ``values`` make, hooks too. ``options``: see ``render_text``."""
    return copy.deepcopy(render_shared(values, **options))


def render_shared(values: Values, **options: Any) -> list[Manifest]:
    """The same for whoever renders much and changes nothing: equal texts share their objects."""
    texts = render_text(values, **options)
    return [document for path, text in texts.items() if not path.endswith(".txt") for document in _documents(text)]


@functools.cache
def _documents(text: str) -> tuple[Manifest, ...]:
    return tuple(document for document in yaml.load_all(text, _NoDuplicates) if document is not None)


def merged(*several: Values) -> dict[str, Any]:
    """Values laid over each other as Helm does it: sections merge, everything else is replaced."""
    result: dict[str, Any] = {}
    for values in several:
        for key, value in values.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    return result


def refusal(values: Values, **options: Any) -> str:
    """The sentence with which rendering ``values`` fails; an assertion when it does not."""
    try:
        render_text(values, **options)
    except HelmError as error:
        return str(error)
    raise AssertionError("it rendered")


# ---- reading what was rendered ----


def of_kind(objects: list[Manifest], *kinds: str) -> list[Manifest]:
    return [found for found in objects if found["kind"] in kinds]


def one(objects: list[Manifest], kind: str, name_ends: str = "") -> Manifest:
    (found,) = [found for found in of_kind(objects, kind) if found["metadata"]["name"].endswith(name_ends)]
    return found


def pods(objects: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """(what makes it, the pod's metadata and spec) of every pod."""
    for found in objects:
        what = f"{found['kind']}/{found['metadata']['name']}"
        if found["kind"] == "Pod":
            yield what, found
        elif "template" in found.get("spec", {}):
            yield what, found["spec"]["template"]


def component(pod: Manifest) -> str:
    return str(pod["metadata"]["labels"]["app.kubernetes.io/component"])


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def command_line(container: Manifest) -> list[str]:
    """What a container of the product runs: the image's entrypoint (below tini) with the pod's arguments."""
    assert "command" not in container, container["name"]
    return ["llm-cluster", *container["args"]]


def matches(selector: Manifest, labels: Mapping[str, str]) -> bool:
    """Whether a label selector selects ``labels``."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In", expression
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


def config_file(objects: list[Manifest]) -> str:
    return str(one(objects, "ConfigMap", "-config")["data"]["cluster.yaml"])
