"""Install, change, roll back and uninstall on a real API server; what its controllers make of it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from helm_python import HelmReleaseError

from tests.kube.chart_values import EVERYTHING_ON, SETS, SMALLEST, merged, smallest
from tests.kube.kube_api import Json, until
from tests.kube.releases import RELEASE, Site, by_kind, component_of, intent, lost

pytestmark = pytest.mark.timeout(300, func_only=True)
# What values may name and the chart does not make.
CLASSES = {
    "/apis/scheduling.k8s.io/v1/priorityclasses": {"metadata": {"name": "high"}, "value": 1000},
    "/apis/node.k8s.io/v1/runtimeclasses": {"metadata": {"name": "nvidia"}, "handler": "nvidia"},
}
ACCOUNTS = ("c", "w", "r")
TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"


@pytest.fixture
def surroundings(site: Site) -> Iterator[None]:
    """Classes and accounts that are named in the matrix of values; without them no pod could be made."""
    added = []
    for account in ACCOUNTS:
        path = f"/api/v1/namespaces/{site.namespace}/serviceaccounts"
        site.api.ok("POST", path, {"metadata": {"name": account}})
    for path, one in CLASSES.items():
        if site.api.call("GET", f"{path}/{one['metadata']['name']}").status == 404:
            site.api.ok("POST", path, one)
            added.append(f"{path}/{one['metadata']['name']}")
    yield
    for path in added:
        site.api.ok("DELETE", path)


def intents(site: Site) -> dict[str, Json]:
    """What was asked for, by the chart or by the controllers for it; pods come and go under other names."""
    return {name: intent(one) for name, one in site.objects().items() if one["kind"] != "Pod"}


def wanted_pods(rendered: list[Json]) -> dict[str, int]:
    """component -> pods, by the manifests themselves; a Deployment without a number has an autoscaler."""
    counts: dict[str, int] = {}
    scaled = {
        hpa["spec"]["scaleTargetRef"]["name"]: hpa["spec"]["minReplicas"]
        for hpa in by_kind(rendered, "HorizontalPodAutoscaler")
    }
    for workload in [*by_kind(rendered, "StatefulSet"), *by_kind(rendered, "Deployment")]:
        number = workload["spec"].get("replicas", scaled.get(workload["metadata"]["name"]))
        counts[component_of(workload)] = counts.get(component_of(workload), 0) + number
    return counts


@pytest.mark.parametrize("values", SETS.values(), ids=SETS.keys())
def test_every_set_of_values_comes_stays_and_goes(site: Site, values: Json, surroundings: None) -> None:
    """No field is refused, dropped or changed; every pod can be made; the same again changes nothing; nothing is left."""
    before = set(site.objects())
    for rendered in site.install(values, dry_run="server"):
        assert list(lost(rendered, site.dry_run(rendered))) == [], rendered["kind"]
    assert set(site.objects()) == before, "a dry run made something"

    rendered = site.install(values)
    for one in rendered:
        assert list(lost(one, site.live(one))) == [], one["kind"]
    site.until_pods(**wanted_pods(rendered))
    assert site.complaints() == []

    installed, pods = intents(site), {pod["metadata"]["uid"] for pod in all_pods(site)}
    site.upgrade(values)
    assert intents(site) == installed
    assert {pod["metadata"]["uid"] for pod in all_pods(site)} == pods

    site.helm.uninstall(RELEASE)
    claims = {f"PersistentVolumeClaim/{claim}" for claim in claims_of_templates(rendered)}
    until(lambda: set(site.objects()) - claims == before, told=lambda: set(site.objects()) ^ before)
    assert claims <= set(site.objects()), "Kubernetes keeps the claims of a StatefulSet's templates"
    assert cluster_wide(site) == []


def claims_of_templates(rendered: list[Json]) -> set[str]:
    return {
        f"{template['metadata']['name']}-{owner['metadata']['name']}-{index}"
        for owner in by_kind(rendered, "StatefulSet")
        for template in owner["spec"].get("volumeClaimTemplates", [])
        for index in range(owner["spec"]["replicas"])
    }


def all_pods(site: Site) -> list[Json]:
    return site.api.pods(site.namespace, **{"app.kubernetes.io/instance": RELEASE})


def cluster_wide(site: Site) -> list[str]:
    """Objects of the release that lie outside of any namespace."""
    found = []
    for resource in site.api.resources():
        if not resource.namespaced and "list" in resource.verbs and "/" not in resource.name:
            items = site.api.get(resource.path(), labelSelector=f"app.kubernetes.io/instance={RELEASE}")["items"]
            found += [f"{resource.kind}/{item['metadata']['name']}" for item in items]
    return found


class TestChanges:
    def test_the_number_of_pods_follows_the_values_and_comes_back_with_a_rollback(self, site: Site) -> None:
        first = site.install(SMALLEST)
        site.until_pods(**wanted_pods(first))
        original = intents(site)

        group = {**SMALLEST["workers"][0], "replicas": 3}
        site.upgrade(smallest(workers=[group], router={"replicas": 3}))
        site.until_pods(controller=1, worker=3, router=3)
        gpus = {**SMALLEST["workers"][0], "name": "gpus", "replicas": 2, "deviceKind": "gpu"}
        site.upgrade(smallest(workers=[group, gpus], router={"replicas": 1}))
        site.until_pods(controller=1, worker=5, router=1)

        site.helm.rollback(RELEASE, version=1)
        site.until_pods(**wanted_pods(first))
        assert without_generation(intents(site)) == without_generation(original)
        history = site.helm.history(RELEASE)
        assert [entry["revision"] for entry in history] == [1, 2, 3, 4]
        assert [entry["status"] for entry in history] == ["superseded"] * 3 + ["deployed"]

    def test_models_are_scaled_without_a_restart(self, site: Site) -> None:
        """The controller reads its file again; no pod is made anew for it."""
        site.until_pods(**wanted_pods(site.install(SMALLEST)))
        before = templates(site)
        site.upgrade(smallest(models=[{**SMALLEST["models"][0], "replicas": 2}]))
        assert templates(site) == before
        (text,) = [
            m["data"]["cluster.yaml"]
            for n, m in site.objects().items()
            if m["kind"] == "ConfigMap" and "cluster.yaml" in m["data"]
        ]
        assert "replicas: 2" in text

    def test_other_settings_of_the_controller_restart_it_alone(self, site: Site) -> None:
        site.until_pods(**wanted_pods(site.install(SMALLEST)))
        before = templates(site)
        site.upgrade(smallest(config={"controller": {"restart_backoff_s": 7}}))
        changed = {name for name, template in templates(site).items() if template != before[name]}
        assert [name for name in changed if "controller" not in name] == []
        assert len(changed) == 1

    def test_an_autoscaled_deployment_keeps_its_size_through_an_upgrade(self, site: Site) -> None:
        (router,) = by_kind(site.install(EVERYTHING_ON), "Deployment")
        assert "replicas" not in router["spec"], "the autoscaler owns the number"
        site.until_pods(router=2)
        path = f"/apis/apps/v1/namespaces/{site.namespace}/deployments/{router['metadata']['name']}"
        site.api.ok("PATCH", f"{path}/scale", {"spec": {"replicas": 3}})
        site.until_pods(router=3)
        site.upgrade(merged(EVERYTHING_ON, {"config": {"router": {"failover_wait_s": 33}}}))
        # One new pod beside the three, and since nobody runs it, none of the old ones goes.
        site.until_pods(router=4)
        assert site.api.get(path)["spec"]["replicas"] == 3


def without_generation(found: dict[str, Json]) -> dict[str, Json]:
    return {
        name: {**one, "metadata": {**one["metadata"], "generation": 0}}
        for name, one in found.items()
        if one["kind"] != "ReplicaSet"
    }


def templates(site: Site) -> dict[str, Json]:
    """Pod templates; a changed one restarts pods."""
    workloads = {"StatefulSet", "Deployment"}
    return {name: one["spec"]["template"] for name, one in site.objects().items() if one["kind"] in workloads}


class TestWhatControllersMakeOfIt:
    def test_budgets_and_autoscalers_find_their_pods(self, site: Site) -> None:
        rendered = site.install(EVERYTHING_ON)
        budgets, scalers = by_kind(rendered, "PodDisruptionBudget"), by_kind(rendered, "HorizontalPodAutoscaler")
        assert budgets
        assert len(scalers) == 1
        site.until_pods(**wanted_pods(rendered))
        for budget in budgets:
            selected = site.api.pods(site.namespace, **budget["spec"]["selector"]["matchLabels"])
            assert {component_of(pod) for pod in selected} == {component_of(budget)}
            until(lambda budget=budget, pods=selected: expected_pods(site.live(budget)) == len(pods))
        until(lambda: "lastScaleTime" in site.live(scalers[0]).get("status", {}), told=lambda: site.live(scalers[0]))

    def test_every_selector_finds_the_pods_of_its_own_component_only(self, site: Site) -> None:
        rendered = site.install(EVERYTHING_ON)
        site.until_pods(**wanted_pods(rendered))
        selectors = {f"Service/{s['metadata']['name']}": s["spec"]["selector"] for s in by_kind(rendered, "Service")}
        assert len(selectors) >= 3
        for name, selector in selectors.items():
            assert len({component_of(pod) for pod in site.api.pods(site.namespace, **selector)}) == 1, name
        services = {service["metadata"]["name"] for service in by_kind(rendered, "Service")}
        assert {owner["spec"]["serviceName"] for owner in by_kind(rendered, "StatefulSet")} <= services

    def test_only_the_controller_gets_a_token(self, site: Site) -> None:
        """By the pods as they were admitted, not by the manifests."""
        rendered = site.install(EVERYTHING_ON)
        site.until_pods(**wanted_pods(rendered))
        holders = {component_of(pod) for pod in all_pods(site) if has_token(pod)}
        assert holders == {"controller"}
        tests = [hook for hook in hooks(site) if hook["kind"] == "Pod"]
        assert tests, "the chart has a test"
        assert [has_token(site.dry_run(pod)) for pod in tests] == [False] * len(tests)


class TestHelmTest:
    @pytest.mark.parametrize(("phase", "passes"), [("Succeeded", True), ("Failed", False)])
    def test_runs_one_pod_and_tells_how_it_ended(self, site: Site, phase: str, passes: bool) -> None:
        """No node runs it here: what a kubelet would report is said by hand."""
        site.install(SMALLEST)
        (hook,) = [hook for hook in hooks(site) if hook["kind"] == "Pod"]
        path = f"/api/v1/namespaces/{site.namespace}/pods/{hook['metadata']['name']}"
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(site.helm.test, RELEASE, timeout=60)
            until(lambda: site.api.call("GET", path).status == 200)
            site.api.ok("PATCH", f"{path}/status", {"status": {"phase": phase}})
            if passes:
                running.result(90)
            else:
                with pytest.raises(HelmReleaseError):
                    running.result(90)


def expected_pods(budget: Json) -> int:
    return int(budget.get("status", {}).get("expectedPods", 0))


def hooks(site: Site) -> list[Json]:
    return [yaml.safe_load(hook["manifest"]) for hook in site.helm.get_all(RELEASE)["hooks"]]


def has_token(pod: Json) -> bool:
    containers = [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]
    mounted = any(mount["mountPath"] == TOKEN_FOLDER for one in containers for mount in one.get("volumeMounts", []))
    sources = [
        source for volume in pod["spec"].get("volumes", []) for source in volume.get("projected", {}).get("sources", [])
    ]
    return mounted or any("serviceAccountToken" in source for source in sources)
