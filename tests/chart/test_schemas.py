"""Every rendered object is valid for the Kubernetes versions of today, and custom resources for their definitions."""

from __future__ import annotations

import copy
import json

import pytest
from chart_harness import AUTH, CHART, NEW, OLD, of_kind, one, render
from chart_matrix import CASES, MONITORS, values_of
from helm_python import lint
from kubernetes_schemas import CRDS, VERSIONS, is_custom, problems


def distinct(kube_version: str) -> dict[str, dict]:
    """Every different object of every case, with the case that made it first."""
    found: dict[str, dict] = {}
    for case in CASES:
        for manifest in render(values_of(case), kube_version=kube_version):
            found.setdefault(json.dumps(manifest, sort_keys=True), manifest)
    return found


@pytest.fixture(scope="module")
def objects() -> list[dict]:
    return list(distinct(NEW).values())


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid(objects: list[dict], version: str):
    found = {f"{manifest['kind']}/{manifest['metadata']['name']}": problems(manifest, version) for manifest in objects}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}
    assert {"monitoring.coreos.com/v1"} < {manifest["apiVersion"] for manifest in objects}


def test_what_an_old_server_gets_is_valid_too():
    """The schemas begin at 1.25, which has no PodDisruptionBudget of v1beta1 any more; v1 has the same fields."""
    objects = [manifest for manifest in distinct(OLD).values() if not is_custom(manifest)]
    kinds = {(manifest["apiVersion"], manifest["kind"]) for manifest in objects}
    assert {
        ("policy/v1beta1", "PodDisruptionBudget"),
        ("autoscaling/v2beta2", "HorizontalPodAutoscaler"),
    } <= kinds
    for manifest in objects:
        same = {**manifest, "apiVersion": manifest["apiVersion"].replace("policy/v1beta1", "policy/v1")}
        assert problems(same, "1.25") == [], manifest["kind"]


@pytest.mark.parametrize(
    ("kube_version", "budget", "autoscaler"),
    [
        ("v1.20.15", "policy/v1beta1", "autoscaling/v2beta2"),
        ("v1.21.0", "policy/v1", "autoscaling/v2beta2"),
        ("v1.23.0-gke.100", "policy/v1", "autoscaling/v2"),
        ("v1.37.0", "policy/v1", "autoscaling/v2"),
    ],
)
def test_versions_of_the_api_follow_the_cluster(kube_version: str, budget: str, autoscaler: str):
    objects = render(values_of("autoscaled"), kube_version=kube_version)
    assert {found["apiVersion"] for found in of_kind(objects, "PodDisruptionBudget")} == {budget}
    assert one(objects, "HorizontalPodAutoscaler")["apiVersion"] == autoscaler


def test_the_schemas_see_what_is_wrong():
    good = one(render(AUTH), "StatefulSet", "-workers")
    unknown, wrong = copy.deepcopy(good), copy.deepcopy(good)
    unknown["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    wrong["spec"]["replicas"] = "many"
    assert problems(good, "1.33") == []
    assert problems(unknown, "1.33") != []
    assert problems(wrong, "1.33") != []
    with pytest.raises(AssertionError, match="knows no"):
        problems({**good, "kind": "StatefulSets"}, "1.33")


@pytest.mark.parametrize("kind", ["ServiceMonitor", "PodMonitor"])
def test_the_schemas_of_custom_resources_see_what_is_wrong(kind: str):
    good = one(render({**AUTH, "metrics": MONITORS}), kind)
    unknown = copy.deepcopy(good)
    unknown["spec"]["jobLabels"] = "x"
    assert problems(good, "1.33") == []
    assert problems(unknown, "1.33") != []


def test_the_copies_of_the_definitions_say_where_they_are_from():
    readme = (CRDS / "README.md").read_text()
    for path in CRDS.glob("*.yaml"):
        assert f"`{path.name}`" in readme
        assert "operator.prometheus.io/version: 0.93.0" in path.read_text()
    assert "version 0.93.0" in readme
    assert "Apache-2.0" in readme


@pytest.mark.parametrize("case", ["defaults", "several groups", "monitors"])
def test_helm_finds_nothing_to_say(case: str):
    for version in (OLD, NEW):
        report = lint(CHART, values_of(case), strict=True, kube_version=version)
        said = [message for message in report["messages"] if message["error"] != "icon is recommended"]
        assert (said, report["errors"]) == ([], [])
