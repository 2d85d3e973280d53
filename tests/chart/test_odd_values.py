"""Values that are legal and unusual: text that YAML reads as something else, nulls, what users add to pods."""

from __future__ import annotations

import json
from typing import Any

import pytest
from chart_harness import (
    AUTH,
    CHART,
    NEW,
    component,
    config_file,
    containers,
    merged,
    of_kind,
    one,
    pods,
    refusal,
    render,
    render_text,
)
from chart_matrix import GPUS, PLACED, values_of
from kubernetes_schemas import problems
from pod_security import APPARMOR
from yaml import safe_load

from ops.generators.values import value_rows

NEEDED: list[str] = json.loads((CHART / "files" / "needed.json").read_text())
# Text that YAML without quotes reads as a boolean, a number or nothing.
ODD = ("on", "null", "true", "y")
MONITORS = {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}, "prometheusRule": {"enabled": True}}


def at(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return dict(value)


def wrong(objects: list[dict]) -> dict[str, Any]:
    found = {f"{o['kind']}/{o['metadata']['name']}": problems(o, "1.37") for o in objects}
    return {name: problem for name, problem in found.items() if problem}


@pytest.mark.parametrize("name", ODD)
def test_names_stay_text(name: str):
    values = {"fullnameOverride": name, "clusterName": name, "workers": [{"name": name}], "metrics": MONITORS}
    objects = render({**AUTH, **values}, name=name)
    assert wrong(objects) == {}
    assert safe_load(config_file(objects))["cluster_name"] == name
    assert one(objects, "ServiceMonitor")["metadata"]["name"] == name


@pytest.mark.parametrize("number", ["123", "1e3", "0x10"])
def test_numbers_stay_text(number: str):
    hub = {"type": "hubCache", "mountPath": "/m: x", "hubCache": {"storageClass": number}}
    placed = {"priorityClassName": number, "runtimeClassName": number}
    values = {
        "fullnameOverride": "models",
        "nameOverride": number,
        "clusterName": number,
        "image": {"pullSecrets": [number], "registry": number},
        "auth": {"existingSecret": number, "key": number},
        "controller": {**placed, "persistence": {"enabled": True, "storageClass": number}},
        "router": placed,
        "workers": [{"name": "a", **placed, "memory": "8000000000", "shmSize": "1"}],
        "models": [{"model": "org/name", "served_model_name": number}],
        "modelVolume": hub,
        "hub": {"tokenSecret": {"name": number, "key": number}},
        "serviceAccount": {"names": {"controller": number, "worker": number, "router": number}},
    }
    assert wrong(render(values, name=number)) == {}
    pvc = {"modelVolume": {"type": "pvc", "hubCache": {}, "pvc": {"claimName": number, "subPath": number}}}
    pvc["models"] = [{"model": "/m: x/a"}]
    pvc["controller"] = {"persistence": {"enabled": True, "existingClaim": number}}
    assert wrong(render(merged(values, pvc), name=number)) == {}
    token = {"auth": {"existingSecret": "", "token": number * 6, "key": number}}
    assert wrong(render(merged(values, token), name=number)) == {}


def test_any_text_reaches_the_configuration_as_it_is():
    name = "a:{b}\"'&<é\\|$%"
    objects = render({**AUTH, "models": [{"model": "demo", "served_model_name": name}]})
    assert safe_load(config_file(objects))["models"][0]["served_model_name"] == name
    (test,) = [pod for _, pod in pods(objects) if component(pod) == "test"]
    assert f"--model={name}" in containers(test)[0]["args"]


@pytest.mark.parametrize(
    ("quantity", "right"),
    [("8Gi", True), ("8388608Ki", True), ("1.5T", True), ("8000000000", True), ("8ki", False), ("8GB", False)],
)
def test_quantities_are_those_of_kubernetes(quantity: str, right: bool):
    values = {**AUTH, "workers": [{"name": "a", "memory": quantity}]}
    if right:
        assert wrong(render(values)) == {}
    else:
        assert "memory" in refusal(values)


@pytest.mark.parametrize("path", NEEDED)
def test_a_null_where_something_is_needed_is_refused_in_a_sentence(path: str):
    assert f"{path} is null; leave it out" in refusal(merged(AUTH, at(path, None)))


def may_be_null() -> list[str]:
    rows = [row.path for row in value_rows()]
    outside = [path for path in rows if "[]" not in path and not path.startswith("config.")]  # the schema's business
    return [path for path in outside if path not in NEEDED]


@pytest.mark.parametrize("path", may_be_null())
def test_a_null_elsewhere_means_empty(path: str):
    values = at(path, None)
    if path == "auth.existingSecret":
        values["auth"]["token"] = "0123456789abcdef"
    else:
        values = merged(AUTH, values)
        assert render(values) == render(AUTH)
    assert wrong(render(values)) == {}


def test_a_variable_of_the_user_replaces_that_of_the_chart():
    """Kubernetes drops one of two with the same name, and server-side apply refuses them."""
    own = [{"name": "NCCL_SOCKET_IFNAME", "value": "^lo"}, {"name": "HF_HUB_OFFLINE", "value": "0"}]
    values = merged(AUTH, {"network": {"interface": "eth0"}, "extraEnv": [{"name": "HF_HUB_OFFLINE", "value": "2"}]})
    for _, pod in pods(render({**values, "workers": [{"name": "a", "env": own}]})):
        for container in containers(pod):
            names = [variable["name"] for variable in container["env"]]
            assert len(set(names)) == len(names)
            found = {variable["name"]: variable.get("value") for variable in container["env"]}
            assert found["HF_HUB_OFFLINE"] == ("0" if component(pod) == "worker" else "2")
            if component(pod) == "worker":
                assert (found["NCCL_SOCKET_IFNAME"], found["GLOO_SOCKET_IFNAME"]) == ("^lo", "eth0")


@pytest.mark.parametrize("kind", ["hostPath", "nfs", "iscsi"])
def test_volumes_that_the_standard_forbids_need_the_named_exception(kind: str):
    extra = {
        "extraVolumes": [{"name": "x", kind: {"path": "/x"}}],
        "extraVolumeMounts": [{"name": "x", "mountPath": "/x"}],
    }
    assert f"extraVolumes[0] is a {kind}, which the restricted Pod Security Standard forbids" in refusal(
        merged(AUTH, extra)
    )
    assert render(merged(AUTH, extra, {"modelVolume": {"hostPath": {"acknowledgeNotRestricted": True}}}))


def test_an_unconfined_profile_is_refused():
    annotations = {"podAnnotations": {f"{APPARMOR}worker": "unconfined"}}
    assert "forbids" in refusal({**AUTH, "workers": [{"name": "a", **annotations}]})
    assert "forbids" in refusal(merged(AUTH, {"router": annotations}))


def test_what_a_group_asks_for_besides_is_laid_over_the_rest():
    (container,) = one(render(values_of("fast network")), "StatefulSet", "-h100")["spec"]["template"]["spec"][
        "containers"
    ]
    assert container["resources"] == {
        "requests": {"cpu": "96", "memory": "1200Gi", "ephemeral-storage": "50Gi"},
        "limits": {
            "cpu": "96",
            "memory": "1200Gi",
            "nvidia.com/gpu": "8",
            "rdma/hca": "1",
            "ephemeral-storage": "100Gi",
        },
    }


def test_quantities_are_text():
    """A number is what people write and what a server-side apply refuses."""
    given = {"requests": {"cpu": 2, "memory": 4e9}, "limits": {"memory": 8_000_000_000, "ephemeral-storage": "1Gi"}}
    text = {
        "requests": {"cpu": "2", "memory": "4000000000"},
        "limits": {"memory": "8000000000", "ephemeral-storage": "1Gi"},
    }
    values = {"controller": {"resources": given}, "router": {"resources": given}}
    found = [containers(pod)[0]["resources"] for _, pod in pods(render({**AUTH, **values})) if component(pod) != "test"]
    assert [resources for resources in found if resources == text] == [text, text]


def test_a_groups_pods_are_replaced_as_it_says():
    for case, strategy in (("gpus", "RollingUpdate"), ("fast network", "OnDelete")):
        found = one(render(values_of(case)), "StatefulSet", "-h100")["spec"]["updateStrategy"]
        assert found == {"type": strategy}


def test_a_given_claim_holds_the_state():
    found = one(render(values_of("persistent on a given claim")), "StatefulSet", "-controller")["spec"]
    assert "volumeClaimTemplates" not in found
    (volume,) = [v for v in found["template"]["spec"]["volumes"] if v["name"] == "run"]
    assert volume == {"name": "run", "persistentVolumeClaim": {"claimName": "state"}}


@pytest.mark.parametrize("case", ["load balancer", "node port"])
def test_what_is_open_to_the_outside_serves_clients_alone(case: str):
    objects = render(values_of(case))
    service, metrics = (one(objects, "Service", f"-router{end}")["spec"] for end in ("", "-metrics"))
    assert [port["name"] for port in service["ports"]] == ["grpc"]
    assert [port["name"] for port in metrics["ports"]] == ["metrics"]
    assert metrics["clusterIP"] == "None"
    assert service.get("loadBalancerSourceRanges") == (["192.0.2.0/24"] if case == "load balancer" else None)
    assert "nobody from outside of the cluster gets in" in render_text(values_of(case))["NOTES.txt"]
    block = {"networkPolicy": {"clients": [{"ipBlock": {"cidr": "192.0.2.0/24"}}]}}
    assert "nobody from outside" not in render_text(merged(values_of(case), block))["NOTES.txt"]


def test_the_test_asks_models_that_are_served_from_where_routers_may_run():
    models = [{"model": "demo", "replicas": 0}, {"model": "demo", "served_model_name": "second"}]
    (test,) = of_kind(render({**AUTH, "models": models, "router": PLACED}), "Pod")
    assert [c["args"][3] for c in containers(test)] == ["--model=second"]
    for name in ("nodeSelector", "tolerations", "affinity", "priorityClassName", "runtimeClassName"):
        assert test["spec"][name] == PLACED[name]
    assert of_kind(render(values_of("no replica")), "Pod") == []


@pytest.mark.parametrize(
    ("version", "policy"),
    [("v1.26.9", None), ("v1.27.0", "AlwaysAllow"), ("v1.30.1+k3s1", "AlwaysAllow"), (NEW, "AlwaysAllow")],
)
def test_pods_that_serve_nothing_hold_up_no_node(version: str, policy: str | None):
    budgets = of_kind(render(AUTH, kube_version=version), "PodDisruptionBudget")
    assert {budget["spec"].get("unhealthyPodEvictionPolicy") for budget in budgets} == {policy}


def test_a_budget_can_keep_the_controller():
    assert (
        one(render(values_of("controller stays")), "PodDisruptionBudget", "-controller")["spec"]["maxUnavailable"] == 0
    )
    names = {budget["metadata"]["name"] for budget in of_kind(render(AUTH), "PodDisruptionBudget")}
    assert names == {"demo-llm-cluster-router", "demo-llm-cluster-workers"}


def test_a_gpu_group_without_bytes_is_warned_of():
    values = {**values_of("gpus"), "workers": [{**GPUS, "modelBytes": 0}]}
    assert "workers h100: modelBytes is 0" in render_text(values)["NOTES.txt"]
    assert "modelBytes" not in render_text(values_of("gpus"))["NOTES.txt"]
