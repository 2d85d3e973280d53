"""The chart as Helm installs it on a server, and what is then there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import yaml
from kubernetes.utils.quantity import parse_quantity

from tests.kube.kube_api import BY_CONTROLLERS, Json, KubeApi, Resource, until

CHART = Path(__file__).parents[2] / "helm" / "llm-cluster"
RELEASE = "llm"
# Helm's record of its releases, and what an old server makes for each ServiceAccount.
SECRETS_OF_OTHERS = {"helm.sh/release.v1", "kubernetes.io/service-account-token"}
RETRIED = "please try again"
QUANTITIES = {"resources", "capacity", "sizeLimit", "requests", "limits"}


class Site:
    """A namespace with at most one release of the chart in it."""

    def __init__(self, api: KubeApi, kubeconfig: Path, namespace: str) -> None:
        self.api, self.kubeconfig, self.namespace = api, kubeconfig, namespace
        self.helm = helm_python.Config(kubeconfig_path=kubeconfig, namespace=namespace)

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_: object) -> None:
        self.helm.uninstall(RELEASE, ignore_not_found=True)
        self.helm.close()

    def install(self, values: Json, **options: Any) -> list[Json]:
        return manifests(self.helm.install(CHART, RELEASE, values, namespace=self.namespace, **options)["manifest"])

    def upgrade(self, values: Json) -> list[Json]:
        """Given values only, as `helm upgrade --reset-values`."""
        answer = self.helm.upgrade(CHART, RELEASE, values, namespace=self.namespace, reset_values=True)
        return manifests(answer["manifest"])

    def live(self, rendered: Json) -> Json:
        resource = self.api.resource_of(rendered)
        return self.api.get(
            resource.path(self.namespace if resource.namespaced else None, rendered["metadata"]["name"])
        )

    def objects(self) -> dict[str, Json]:
        """Everything in the namespace except what controllers note for themselves and Helm's own record."""
        found = self.api.objects(self.namespace)
        return {name: one for name, one in found.items() if one.get("type") not in SECRETS_OF_OTHERS}

    def dry_run(self, rendered: Json) -> Json:
        """The object as the server would store it: decoded, defaulted, admitted, validated."""
        resource = self.api.resource_of(rendered)
        path = resource.path(self.namespace if resource.namespaced else None)
        return self.api.ok("POST", path, rendered, dryRun="All", fieldValidation="Strict")

    def pods(self, component: str) -> list[Json]:
        labels = {"app.kubernetes.io/instance": RELEASE, "app.kubernetes.io/component": component}
        return self.api.pods(self.namespace, **labels)

    def until_pods(self, **wanted: int) -> None:
        """component -> number of pods, and no more."""
        until(lambda: {c: len(self.pods(c)) for c in wanted} == wanted, told=self.complaints)

    def complaints(self) -> list[str]:
        """Pods that the server refused its controllers; a token that is not there yet makes it say: try again."""
        events = self.api.get(f"/api/v1/namespaces/{self.namespace}/events")["items"]
        refused = [event for event in events if event["reason"] == "FailedCreate"]
        return [f"{e['involvedObject'].get('name')}: {e['message']}" for e in refused if RETRIED not in e["message"]]


def manifests(text: str) -> list[Json]:
    return [one for one in yaml.load_all(text, yaml.CSafeLoader) if one]


def by_kind(rendered: list[Json], kind: str) -> list[Json]:
    return [one for one in rendered if one["kind"] == kind]


def component_of(rendered: Json) -> str:
    return str(rendered["metadata"].get("labels", {}).get("app.kubernetes.io/component", ""))


def intent(found: Json) -> Json:
    """What somebody asked for: without status, and without what the server numbers and stamps."""
    kept = copy.deepcopy({key: value for key, value in found.items() if key != "status"})
    if found["kind"] == "ServiceAccount":
        kept.pop("secrets", None)  # an old server adds its token when it comes to it
    meta = kept["metadata"]
    # Where the oldest version of an autoscaler keeps what newer ones call its status.
    marks = {
        k: v for k, v in meta.get("annotations", {}).items() if not k.startswith("autoscaling.alpha.kubernetes.io/")
    }
    meta["annotations"] = marks
    kept["metadata"] = {key: meta[key] for key in ("name", "uid", "generation", "labels", "annotations") if key in meta}
    return kept


def lost(sent: Any, stored: Any, where: str = "") -> Iterator[str]:
    """Places where the server does not have what it was sent: a field that it does not know, it drops in silence."""
    if isinstance(sent, dict):
        for key, value in sent.items():
            if not isinstance(stored, dict) or (key not in stored and not empty(value)):
                yield f"{where}.{key}"
            elif key in stored:
                yield from lost(value, stored[key], f"{where}.{key}")
    elif isinstance(sent, list):
        if not isinstance(stored, list) or len(sent) > len(stored):
            yield where
        else:
            for index, (one, other) in enumerate(zip(sent, stored, strict=False)):
                yield from lost(one, other, f"{where}[{index}]")
    elif sent != stored and not same_quantity(sent, stored, where):
        yield f"{where}: {sent!r} became {stored!r}"


def empty(value: Any) -> bool:
    return value in (None, "", 0, False) or value in ([], {})


def same_quantity(sent: Any, stored: Any, where: str) -> bool:
    if not QUANTITIES & set(where.replace("[", ".").split(".")):
        return False
    return parse_quantity(str(sent)) == parse_quantity(str(stored))


__all__ = ["BY_CONTROLLERS", "RELEASE", "Resource", "Site", "by_kind", "component_of", "intent", "lost", "manifests"]
