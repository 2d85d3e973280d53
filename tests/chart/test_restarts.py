"""Which change restarts which pods, and how long a pod that ends may drain."""

from __future__ import annotations

from typing import Any

import pytest
from chart_harness import AUTH, component, config_file, merged, of_kind, one, pods, render
from chart_matrix import CASES, values_of
from yaml import safe_load

BASE = merged(
    AUTH,
    {
        "models": [{"model": "demo", "max_model_len": 4096, "replicas": 1}],
        "workers": [{"name": "workers", "devicesPerPod": 4}],
        "rbac": {"create": False},
    },
)


def templates(values: dict) -> dict[str, Any]:
    return {component(pod): pod for what, pod in pods(render(values)) if not what.startswith("Pod/")}


def restarted(change: dict) -> set[str]:
    before, after = templates(BASE), templates(merged(BASE, change))
    return {name for name, pod in before.items() if after[name] != pod}


@pytest.mark.parametrize(
    ("change", "who"),
    [
        ({"models": [{"model": "demo", "max_model_len": 4096, "replicas": 3}]}, set()),
        (
            {
                "models": [
                    {"model": "demo", "max_model_len": 4096},
                    {"model": "demo", "served_model_name": "b", "max_model_len": 9},
                ]
            },
            set(),
        ),
        ({"models": [{"model": "demo", "max_model_len": 4096, "max_num_seqs": 7}]}, set()),
        # A longer generation lengthens the grace periods, which are part of every pod.
        ({"models": [{"model": "demo", "max_model_len": 8192}]}, {"controller", "router", "worker"}),
        ({"config": {"router": {"failover_wait_s": 7}}}, {"router"}),
        ({"config": {"controller": {"rank_silence_s": 7}}}, {"controller"}),
        ({"config": {"controller": {"drain_deadline_s": 7}}}, {"controller", "worker"}),
        ({"clusterName": "other"}, {"controller"}),
        ({"auth": {"existingSecret": "other"}}, {"controller", "worker"}),
        ({"workers": [{"name": "workers", "devicesPerPod": 4, "replicas": 9}]}, set()),
        ({"router": {"replicas": 9}}, set()),
        ({"metrics": {"podMonitor": {"enabled": True}}}, set()),
        ({"image": {"digests": {"router": "sha256:" + "a" * 64}}}, {"router"}),
    ],
    ids=str,
)
def test_a_change_restarts_only_what_it_is_about(change: dict, who: set[str]):
    assert restarted(change) == who


def test_with_deadlines_that_are_set_models_never_restart_a_pod():
    fixed = merged(BASE, {"config": {"router": {"drain_deadline_s": 60}, "controller": {"drain_deadline_s": 60}}})
    longer = merged(fixed, {"models": [{"model": "demo", "max_model_len": 131072}]})
    assert templates(fixed) == templates(longer)


def test_a_model_that_changes_changes_the_file():
    """The controller reads it again; no pod has to restart for that."""
    more = merged(BASE, {"models": [{"model": "demo", "max_model_len": 4096, "replicas": 3}]})
    assert config_file(render(BASE)) != config_file(render(more))
    (mount,) = [
        mount
        for mount in one(render(BASE), "StatefulSet", "-controller")["spec"]["template"]["spec"]["containers"][0][
            "volumeMounts"
        ]
        if mount["name"] == "config"
    ]
    assert "subPath" not in mount  # a file that is mounted by subPath never changes


@pytest.mark.parametrize(
    ("values", "router", "controller"),
    [
        ({"models": []}, 600, 600),
        ({"models": [{"model": "demo"}]}, 600, 600),
        ({"models": [{"model": "demo", "max_model_len": 131072}]}, 6554, 6554),
        ({"models": [{"model": "demo", "max_model_len": 1}]}, 1, 1),
        ({"models": [{"model": "demo", "max_model_len": 10_000_000}]}, 86_400, 86_400),
        ({"models": [{"model": "demo", "max_model_len": 9}, {"model": "demo", "served_model_name": "b"}]}, 600, 600),
        ({"drain": {"longestGenerationSeconds": 1800}}, 1800, 1800),
        ({"drain": {"secondsPerToken": 0.5}, "models": [{"model": "demo", "max_model_len": 1000}]}, 500, 500),
        ({"config": {"router": {"drain_deadline_s": 12.5}}}, 12.5, 600),
        ({"config": {"controller": {"drain_deadline_s": 0}}}, 600, 0),
        ({"config": {"router": {"drain_deadline_s": None}}}, 600, 600),
    ],
    ids=str,
)
def test_the_longest_allowed_generation_may_finish(values: dict, router: float, controller: float):
    objects = render({**AUTH, **values, "checks": {"devices": False}})
    file = safe_load(config_file(objects))
    assert (file["router"]["drain_deadline_s"], file["controller"]["drain_deadline_s"]) == (router, controller)
    grace = {component(pod): pod["spec"].get("terminationGracePeriodSeconds") for _, pod in pods(objects)}
    assert grace["router"] == -(-router // 1) + 20
    assert grace["controller"] == grace["worker"] == controller + 60


@pytest.mark.parametrize("case", CASES)
def test_the_grace_period_outlasts_the_drain(case: str):
    """Kubernetes counts the time of preStop too, then kills."""
    objects = render(values_of(case))
    file = safe_load(config_file(objects))
    for _, pod in pods(objects):
        name = component(pod)
        if name == "test":
            continue
        section = "router" if name == "router" else "controller"
        hook = pod["spec"]["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        seconds = file[section]["drain_deadline_s"]
        if name == "worker":
            assert hook[2].endswith(f" --deadline-s {-(-seconds // 1):.0f}")
        if name == "router":
            assert hook == ["/bin/sleep", "5"]
            seconds += 5
        assert pod["spec"]["terminationGracePeriodSeconds"] > seconds + 10


FIXED = ("serviceName", "selector", "volumeClaimTemplates", "podManagementPolicy")
# What makes or names claims, which a StatefulSet keeps for life, as the values' descriptions say; and other names.
NEW_SETS = {"names", "persistent", "local", "hub"}


@pytest.mark.parametrize("case", sorted(set(CASES) - NEW_SETS))
def test_an_upgrade_to_these_values_is_possible(case: str):
    """The API refuses a change of any other field of a StatefulSet than its template, replicas and strategy."""

    def fixed(values: dict) -> dict[str, Any]:
        sets = of_kind(render(values), "StatefulSet")
        return {found["metadata"]["name"]: [found["spec"].get(name) for name in FIXED] for found in sets}

    before, after = fixed(AUTH), fixed(values_of(case))
    assert [name for name in before if name in after and before[name] != after[name]] == []
    assert "demo-llm-cluster-controller" in after
