"""Every pod of every rendered combination satisfies the restricted Pod Security Standard."""

from __future__ import annotations

import copy

import pytest
from chart_harness import AUTH, CHART, component, containers, pods, render
from chart_matrix import CASES, rendered, values_of
from pod_security import APPARMOR, RULES, broken_rules

GOOD = next(pod for _, pod in pods(render(AUTH)) if component(pod) == "worker")


def test_every_pod_of_every_rendered_combination_is_restricted():
    seen = 0
    for case, objects in rendered().items():
        for what, pod in pods(objects):
            seen += 1
            # The one exception has a name, and breaks that rule only, where models are read.
            reads = "host path" in case and component(pod) in ("controller", "worker")
            assert broken_rules(pod) == ({"host path"} if reads else set()), (case, what)
    assert seen > 1000


def test_every_pod_has_a_read_only_root_and_room_to_write():
    for _, pod in pods(render(values_of("gpus"))):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        for container in containers(pod):
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert "emptyDir" in volumes[mounts["/tmp"]]
            assert "emptyDir" in volumes[mounts["/var/lib/llm-cluster"]]


def broken(rule: str) -> dict:
    """A restricted pod, then broken in one way."""
    pod = copy.deepcopy(GOOD)
    spec, container = pod["spec"], pod["spec"]["containers"][0]
    context, inner = spec["securityContext"], container["securityContext"]
    match rule:
        case "host process":
            context["windowsOptions"] = {"hostProcess": True}
        case "host namespaces":
            spec["hostNetwork"] = True
        case "privileged":
            inner["privileged"] = True
        case "capabilities":
            inner["capabilities"] = {"drop": ["ALL"], "add": ["SYS_PTRACE"]}
        case "host path":
            spec["volumes"].append({"name": "x", "hostPath": {"path": "/"}})
        case "volume types":
            spec["volumes"].append({"name": "x", "nfs": {"server": "a", "path": "/"}})
        case "host ports":
            container["ports"][0]["hostPort"] = 1
        case "host of probes":
            container["livenessProbe"]["httpGet"]["host"] = "192.0.2.1"
        case "AppArmor":
            pod["metadata"]["annotations"][f"{APPARMOR}worker"] = "unconfined"
        case "SELinux":
            context["seLinuxOptions"] = {"type": "spc_t"}
        case "proc mount":
            inner["procMount"] = "Unmasked"
        case "seccomp":
            del context["seccompProfile"], inner["seccompProfile"]
        case "sysctls":
            context["sysctls"] = [{"name": "net.core.somaxconn", "value": "1"}]
        case "privilege escalation":
            del inner["allowPrivilegeEscalation"]
        case "non-root":
            inner["runAsNonRoot"] = False
        case "user":
            inner["runAsUser"] = 0
    return pod


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_catches_a_pod_that_breaks_it(rule: str):
    assert broken_rules(GOOD) == set()
    assert broken_rules(broken(rule)) == {rule}


@pytest.mark.parametrize(
    ("values", "holders"),
    [({}, {"controller"}), ({"rbac": {"create": False}}, set())],
)
def test_only_the_controller_has_a_service_account_token(values: dict, holders: set[str]):
    for case in CASES:
        if case in ("no rbac", "given accounts"):
            continue
        objects = render({**values_of(case), **values})
        found = {component(pod) for _, pod in pods(objects) if pod["spec"]["automountServiceAccountToken"]}
        assert found == holders, case
        accounts = [account for account in objects if account["kind"] == "ServiceAccount"]
        assert [account for account in accounts if account["automountServiceAccountToken"]] == []


def test_the_controller_may_read_pods_and_nothing_else():
    objects = render(AUTH)
    roles = [found for found in objects if found["kind"] in ("Role", "ClusterRole")]
    assert [role["rules"] for role in roles] == [
        [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]
    ]
    (binding,) = [found for found in objects if found["kind"] in ("RoleBinding", "ClusterRoleBinding")]
    assert binding["kind"] == "RoleBinding"
    assert [subject["name"] for subject in binding["subjects"]] == ["demo-llm-cluster-controller"]
    assert binding["roleRef"]["name"] == roles[0]["metadata"]["name"]


def test_no_template_grants_a_cluster_role():
    assert [path for path in (CHART / "templates").rglob("*.*") if "ClusterRole" in path.read_text()] == []
