"""What holds for every object of every rendered combination."""

from __future__ import annotations

import re
from pathlib import Path

from chart_harness import CHART, RELEASE, component, containers, matches, of_kind, one, pods, render, render_text
from chart_matrix import MONITORS, rendered, values_of
from helm_python import Chart
from yaml import safe_load

import cluster

# What the chart is told of and does not make: by the values that name it.
GIVEN = {
    "Secret": {"ray-token", "other", "hub", "registry"},
    "ConfigMap": {"given"},
    "ServiceAccount": {"c", "w", "r", "readers"},
    "PersistentVolumeClaim": {"models", "state"},
}


def named(objects: list[dict], kind: str) -> set[str]:
    return {found["metadata"]["name"] for found in of_kind(objects, kind)}


def referenced(pod: dict) -> set[tuple[str, str]]:
    spec = pod["spec"]
    found = {("ServiceAccount", spec["serviceAccountName"])}
    found |= {("Secret", secret["name"]) for secret in spec.get("imagePullSecrets", [])}
    for volume in spec["volumes"]:
        if "configMap" in volume:
            found.add(("ConfigMap", volume["configMap"]["name"]))
        if "secret" in volume:
            found.add(("Secret", volume["secret"]["secretName"]))
        if "persistentVolumeClaim" in volume:
            found.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
    for container in containers(pod):
        sources = [variable["valueFrom"] for variable in container["env"] if "valueFrom" in variable]
        found |= {("Secret", source["secretKeyRef"]["name"]) for source in sources if "secretKeyRef" in source}
    return found


def test_whatever_a_pod_refers_to_is_made_or_given():
    for case, objects in rendered().items():
        for what, pod in pods(objects):
            for kind, name in referenced(pod):
                assert name in named(objects, kind) | GIVEN[kind], (case, what)


def test_every_mount_has_its_volume_and_every_volume_its_mount():
    for case, objects in rendered().items():
        for maker in of_kind(objects, "StatefulSet", "Deployment", "Pod"):
            pod = maker["spec"].get("template", maker)
            claims = {claim["metadata"]["name"] for claim in maker["spec"].get("volumeClaimTemplates", [])}
            volumes = [volume["name"] for volume in pod["spec"]["volumes"]]
            assert len(volumes) == len(set(volumes))
            for container in containers(pod):
                mounts = [mount["name"] for mount in container["volumeMounts"]]
                assert set(mounts) == {*volumes, *claims}, (case, maker["metadata"]["name"])
                assert len({mount["mountPath"] for mount in container["volumeMounts"]}) == len(mounts)


def test_every_selector_selects_exactly_its_own_pods():
    for case, objects in rendered().items():
        made = {what: pod["metadata"]["labels"] for what, pod in pods(objects)}
        for maker in of_kind(objects, "StatefulSet", "Deployment"):
            own = f"{maker['kind']}/{maker['metadata']['name']}"
            assert [what for what, labels in made.items() if matches(maker["spec"]["selector"], labels)] == [own], case
        for budget in of_kind(objects, "PodDisruptionBudget"):
            (selected,) = [what for what, labels in made.items() if matches(budget["spec"]["selector"], labels)]
            assert selected.split("/")[1] == budget["metadata"]["name"]
        for service in of_kind(objects, "Service"):
            selector = {"matchLabels": service["spec"]["selector"]}
            (selected,) = [what for what, labels in made.items() if matches(selector, labels)]
            assert selected.split("/")[1] == service["metadata"]["name"].removesuffix("-metrics")


def test_services_and_probes_lead_to_ports_that_exist():
    for case, objects in rendered().items():
        made = {what.split("/")[1]: pod for what, pod in pods(objects)}
        for service in of_kind(objects, "Service"):
            (container,) = containers(made[service["metadata"]["name"].removesuffix("-metrics")])
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= set(ports), case
        for pod in made.values():
            for container in containers(pod):
                ports = [port["containerPort"] for port in container.get("ports", [])]
                names = [port["name"] for port in container.get("ports", [])]
                assert len(set(ports)) == len(ports)
                assert all(len(name) <= 15 for name in names)
                probes = [container[f"{probe}Probe"] for probe in ("startup", "liveness", "readiness") if ports]
                assert {probe["httpGet"]["port"] for probe in probes} <= set(names)


def test_stateful_sets_have_their_service():
    for objects in rendered().values():
        services = {service["metadata"]["name"]: service["spec"] for service in of_kind(objects, "Service")}
        for found in of_kind(objects, "StatefulSet"):
            service = services[found["spec"]["serviceName"]]
            assert service["publishNotReadyAddresses"] is True
            headless = component(found["spec"]["template"]) == "worker"
            assert (service.get("clusterIP") == "None") == headless


def test_every_container_says_what_it_needs_and_which_image():
    for case, objects in rendered().items():
        for _, pod in pods(objects):
            for container in containers(pod):
                resources = container["resources"]
                assert {"cpu", "memory"} <= set(resources["requests"]), case
                assert "memory" in resources["limits"], case
                assert re.search(r":[0-9]+\.[0-9]+\.[0-9]+$|@sha256:[0-9a-f]{64}$", container["image"]), container[
                    "image"
                ]


def test_images_are_those_of_the_values():
    images = {component(pod): containers(pod)[0]["image"] for _, pod in pods(render(values_of("images")))}
    prefix = "registry.example.com/ai/llm-cluster"
    assert images["controller"] == f"{prefix}-controller:1.2.3"
    assert images["worker"] == f"{prefix}-worker:1.2.3"
    assert images["router"] == images["test"] == f"{prefix}-router@sha256:{'a' * 64}"


def test_every_object_is_labelled_as_ours_and_named_as_kubernetes_wants():
    for case, objects in rendered().items():
        seen = set()
        for found in objects:
            name = found["metadata"]["name"]
            assert (found["kind"], name) not in seen, case
            seen.add((found["kind"], name))
            assert re.fullmatch("[a-z]([a-z0-9-]{0,61}[a-z0-9])?", name), name
            if name != f"{RELEASE}-extra":
                labels = found["metadata"]["labels"]
                assert labels["app.kubernetes.io/instance"] == RELEASE
                assert labels["app.kubernetes.io/part-of"] == "llm-cluster"
                assert labels["app.kubernetes.io/version"] == cluster.__version__


def test_the_longest_names_fit():
    """A StatefulSet's name and a hash of eleven characters make a label of its pods, of 63 at most."""
    group = {"name": "a" * 20, "replicas": 2}
    values = values_of("monitors") | {"workers": [group]}
    for name in ("r" * 53, "llm-cluster-" + "x" * 41, "with.dots.in.it", "llm-cluster"):
        for found in render(values, name=name):
            limit = 52 if found["kind"] == "StatefulSet" else 63
            assert re.fullmatch("[a-z]([a-z0-9-]*[a-z0-9])?", found["metadata"]["name"]), found["metadata"]["name"]
            assert len(found["metadata"]["name"]) <= limit
            for value in found["metadata"].get("labels", {}).values():
                assert len(value) <= 63


def test_what_is_scraped():
    objects = render(values_of("monitors"))
    services = {s["metadata"]["name"]: s["metadata"]["labels"] for s in of_kind(objects, "Service")}
    monitor = one(objects, "ServiceMonitor")
    scraped = {name for name, labels in services.items() if matches(monitor["spec"]["selector"], labels)}
    assert scraped == {"demo-llm-cluster-controller", "demo-llm-cluster-router"}
    assert [(e["port"], e["interval"]) for e in monitor["spec"]["endpoints"]] == [("metrics", "30s")]
    assert monitor["metadata"]["labels"]["release"] == "kube-prometheus"
    endpoints = one(objects, "PodMonitor")["spec"]["podMetricsEndpoints"]
    selected = [
        pod
        for _, pod in pods(objects)
        if matches(one(objects, "PodMonitor")["spec"]["selector"], pod["metadata"]["labels"])
    ]
    assert [component(pod) for pod in selected] == ["worker"]
    declared = {port["name"] for port in containers(selected[0])[0]["ports"]}
    assert {endpoint["port"] for endpoint in endpoints} == declared - {"engine"}
    # What the rules say of processes that are down is about jobs called llm-cluster; idle ports of ranks are none.
    for found in (monitor, one(objects, "PodMonitor")):
        label = found["spec"]["jobLabel"]
        targets = [s["metadata"]["labels"] for s in of_kind(objects, "Service")] + [
            p["metadata"]["labels"] for p in selected
        ]
        assert {labels[label] for labels in targets} == {"llm-cluster"}
    jobs = {e["port"]: [r["replacement"] for r in e.get("relabelings", [])] for e in endpoints}
    assert jobs.pop("metrics") == []
    assert set(map(tuple, jobs.values())) == {("llm-rank-ports",)}


def test_every_rule_and_dashboard_of_the_chart_is_rendered():
    objects = render(values_of("monitors"))
    rules = [safe_load(path.read_text())["groups"] for path in sorted((CHART / "rules").glob("*.yaml"))]
    groups = [group for found in rules for group in found]
    rendered_groups = one(objects, "PrometheusRule")["spec"]["groups"]
    assert groups
    assert sorted(rendered_groups, key=lambda g: g["name"]) == sorted(groups, key=lambda g: g["name"])
    found = {}
    for config in of_kind(objects, "ConfigMap"):
        if config["metadata"]["labels"].get("grafana_dashboard") == "1":
            assert config["metadata"]["annotations"] == MONITORS["dashboards"]["annotations"]
            found |= config["data"]
    files = {path.name: path.read_text() for path in (CHART / "dashboards").glob("*.json")}
    assert files
    assert {name: text.strip() for name, text in found.items()} == {name: text.strip() for name, text in files.items()}


def test_toggles_that_are_off_make_nothing():
    kinds = {found["kind"] for found in render(values_of("no policies"))}
    assert "NetworkPolicy" not in kinds
    assert not {"ServiceMonitor", "PodMonitor", "PrometheusRule", "HorizontalPodAutoscaler"} & kinds
    assert "Role" not in {found["kind"] for found in render(values_of("no rbac"))}
    assert "ServiceAccount" not in {found["kind"] for found in render(values_of("given accounts"))}
    assert "Pod" not in {found["kind"] for found in render(values_of("no test"))}
    assert "Secret" not in {found["kind"] for found in render(values_of("defaults"))}
    assert named(render(values_of("no budgets")), "PodDisruptionBudget") == set()


def test_the_token_is_in_a_secret_and_nowhere_else():
    texts = render_text(values_of("token"))
    assert [path for path, text in texts.items() if "0123456789abcdef" in text] == []
    assert "MDEyMzQ1Njc4OWFiY2RlZg==" in texts["secret-token.yaml"]


def test_an_autoscaler_owns_the_number_of_routers():
    objects = render(values_of("autoscaled"))
    assert "replicas" not in one(objects, "Deployment")["spec"]
    target = one(objects, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", one(objects, "Deployment")["metadata"]["name"])


def test_the_notes_name_what_exists():
    for case in ("defaults", "no models", "host path", "no policies", "no test", "no replica"):
        objects, notes = render(values_of(case)), render_text(values_of(case))["NOTES.txt"]
        assert "demo-llm-cluster-controller-0" in notes
        assert "demo-llm-cluster-router" in named(objects, "Service")
        assert ("helm test" in notes) == bool(of_kind(objects, "Pod")), case
        assert ("restricted" in notes) == (case == "host path")
        assert ("networkPolicy.enabled is false" in notes) == (case == "no policies")


def test_the_package_renders_the_same(tmp_path: Path):
    """Whatever the templates read is packed."""
    archive = Chart.load(CHART).save(tmp_path)
    values = values_of("monitors")
    assert Chart.load(archive).render(values) == Chart.load(CHART).render(values)
    assert Path(archive).stat().st_size < 1_000_000  # Helm keeps releases in Secrets
