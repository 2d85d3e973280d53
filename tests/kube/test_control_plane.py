"""The control plane that the other tests use, when no cluster was given."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from contextlib import ExitStack

import psutil
import pytest

from ops.kube.control_plane import ControlPlane, UnavailableError
from tests.kube.kube_api import KubeApi

pytestmark = pytest.mark.timeout(120, func_only=True)


def test_serves_those_who_have_a_token_and_leaves_nothing() -> None:
    try:
        plane = ControlPlane(build=False)
        plane.__enter__()
    except UnavailableError as error:
        pytest.skip(f"no control plane was started: {error}")
    with ExitStack() as stack:
        stack.push(plane)
        pids, folder = plane.pids, plane.folder
        assert KubeApi.from_kubeconfig(plane.kubeconfig).get("/api/v1/namespaces")["items"]
        stranger = ssl.create_default_context(cafile=str(folder / "certs/apiserver.crt"))
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{plane.server}/api/v1/namespaces", context=stranger, timeout=10)
        assert len(pids) == 3
        assert all(psutil.pid_exists(pid) for pid in pids)
        exposed = {c.laddr.ip for pid in pids for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"}
        assert exposed == {"127.0.0.1"}
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []
    assert not folder.exists()
