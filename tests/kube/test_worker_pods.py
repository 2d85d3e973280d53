"""The controller reads its worker pods with nothing but what its own pod is given."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cluster.kube.kube_client import KubePods, connect
from cluster.kube.pod_watch import PodsUnavailable
from tests.kube.chart_values import SMALLEST
from tests.kube.releases import RELEASE, Site, by_kind, component_of

pytestmark = pytest.mark.timeout(300, func_only=True)
WORKERS = f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component=worker"


def as_pod_of(component: str, site: Site, folder: Path) -> KubePods:
    """The adapter in a pod of this component: the token of its ServiceAccount, and where the API is."""
    accounts = by_kind(list(site.objects().values()), "ServiceAccount")
    (name,) = [one["metadata"]["name"] for one in accounts if component_of(one) == component]
    (folder / "token").write_text(site.api.token_of(site.namespace, name))
    (folder / "namespace").write_text(site.namespace)
    configuration = site.api.configuration
    (folder / "ca.crt").write_text(configuration.ca_cert_data or Path(configuration.ssl_ca_cert).read_text())
    server = urlsplit(configuration.host)
    where = {"KUBERNETES_SERVICE_HOST": str(server.hostname), "KUBERNETES_SERVICE_PORT": str(server.port or 443)}
    return connect(WORKERS, where, folder)


def test_lists_the_workers_and_sees_one_come(site: Site, tmp_path: Path) -> None:
    site.install(SMALLEST)
    site.until_pods(worker=2)
    pods = as_pod_of("controller", site, tmp_path)
    listed = pods.list_pods()
    expected = {pod["metadata"]["name"] for pod in site.pods("worker")}
    assert {pod.name for pod in listed.pods} == expected

    group = {**SMALLEST["workers"][0], "replicas": 3}
    site.upgrade({**SMALLEST, "workers": [group]})
    (new,) = {event.pod.name for event in first(pods, listed.version) if event.pod} - expected
    assert new in {pod["metadata"]["name"] for pod in site.pods("worker")}
    pods.close()


def first(pods: KubePods, version: str) -> list:
    """Events up to the first of a new pod."""
    return [next(event for event in pods.watch_pods(version) if event.pod and event.pod.name.endswith("-2"))]


@pytest.mark.parametrize("component", ["worker", "router"])
def test_nobody_else_can(site: Site, tmp_path: Path, component: str) -> None:
    site.install(SMALLEST)
    with pytest.raises(PodsUnavailable, match="cannot list resource"):
        as_pod_of(component, site, tmp_path).list_pods()
