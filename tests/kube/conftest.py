"""A cluster to install the chart on: that of ``KUBECONFIG``, else a control plane of this machine."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from ops.kube.control_plane import ControlPlane, UnavailableError
from tests.kube.custom_resources import installed
from tests.kube.kube_api import KubeApi, until
from tests.kube.releases import Site


@pytest.fixture(scope="session")
def kubeconfig() -> Iterator[Path]:
    given = os.environ.get("KUBECONFIG")
    if given:
        yield Path(given)
        return
    try:
        plane = ControlPlane().__enter__()
    except UnavailableError as error:
        pytest.skip(f"the chart was not installed on a real API server, for there is none here: {error}")
    try:
        yield plane.kubeconfig
    finally:
        plane.__exit__()


@pytest.fixture(scope="session")
def api(kubeconfig: Path) -> Iterator[KubeApi]:
    """As the administrator, with the custom resources of the Prometheus operator known to the server."""
    api = KubeApi.from_kubeconfig(kubeconfig)
    with installed(api):
        yield api


@pytest.fixture(scope="session")
def namespaces(api: KubeApi) -> Iterator[list[str]]:
    """Those that tests made and deleted; they take seconds to go, so all are waited for together, at the end."""
    made: list[str] = []
    yield made
    for name in made:
        until(lambda name=name: api.call("GET", f"/api/v1/namespaces/{name}").status == 404, 120)


@pytest.fixture
def site(api: KubeApi, kubeconfig: Path, namespaces: list[str]) -> Iterator[Site]:
    """A namespace of its own, gone at the end with everything in it."""
    namespace = f"llm-cluster-test-{secrets.token_hex(4)}"
    api.ok("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
    namespaces.append(namespace)
    try:
        with Site(api, kubeconfig, namespace) as site:
            # What controllers put into every new namespace; pods can be made once it has its service account.
            for path in ("serviceaccounts/default", "configmaps/kube-root-ca.crt"):
                until(lambda path=path: api.call("GET", f"/api/v1/namespaces/{namespace}/{path}").status == 200)
            yield site
    finally:
        api.ok("DELETE", f"/api/v1/namespaces/{namespace}")
