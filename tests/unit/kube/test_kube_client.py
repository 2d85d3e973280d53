"""The adapter and its loop against a server that speaks the API's wire format."""

from __future__ import annotations

import base64
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.domain.clock import ManualClock
from cluster.kube import pod_watch
from cluster.kube.kube_client import KubePods, connect
from cluster.kube.pod_watch import PodEvent, PodsUnavailable, PodWatch, VersionGone
from cluster.kube.pods import PodState
from tests.unit.kube.api_server import CUT, END, Script, api_server, status

SELECTOR = "app.kubernetes.io/instance=r,app.kubernetes.io/component=worker"
FORBIDDEN = 'pods is forbidden: User "x" cannot list resource "pods" in the namespace "serving"'


def pod(name: str, version: int, phase: str = "Running") -> dict[str, Any]:
    return {
        "kind": "Pod", "apiVersion": "v1", "metadata": {"name": name, "resourceVersion": str(version)},
        "status": {"phase": phase},
    }  # fmt: skip


def event(kind: str, found: dict[str, Any]) -> dict[str, Any]:
    return {"type": kind, "object": found}


def kubeconfig(folder: Path, url: str, token: str = "secret", **context: str) -> dict[str, str]:
    file = folder / "kubeconfig"
    file.write_text(
        yaml.safe_dump({
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "clusters": [{"name": "c", "cluster": {"server": url}}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"} | context}],
        })
    )  # fmt: skip
    return {"KUBECONFIG": str(file)}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[KubePods, Script]]:
    with api_server() as (url, script):
        yield connect(SELECTOR, kubeconfig(tmp_path, url, namespace="serving"), tmp_path / "none"), script


def test_a_list_asks_for_its_own_pods_only(site: tuple[KubePods, Script]) -> None:
    pods, script = site
    script.pods = [pod("w-0", 7), pod("w-1", 8, "Pending")]
    found = pods.list_pods()
    assert found.version == "100"
    assert [state.name for state in found.pods if state.trouble] == ["w-1"]
    (query,) = script.of("list")
    assert (query["path"], query["labelSelector"]) == ("/api/v1/namespaces/serving/pods", SELECTOR)


def test_a_watch_tells_what_came_changed_and_went(site: tuple[KubePods, Script]) -> None:
    pods, script = site
    bookmark = {"kind": "Pod", "metadata": {"resourceVersion": "105"}}
    script.watch(
        event("ADDED", pod("w-0", 101)), event("MODIFIED", pod("w-0", 102, "Pending")), b"\n", b"no json\n",
        event("BOOKMARK", bookmark), event("DELETED", pod("w-0", 106)), END,
    )  # fmt: skip
    assert list(pods.watch_pods("100")) == [
        PodEvent("101", PodState("w-0")),
        PodEvent("102", PodState("w-0", "is scheduled and not started yet")),
        PodEvent("105"),
        PodEvent("106", gone="w-0"),
    ]
    (query,) = script.of("watch")
    assert query["resourceVersion"] == "100"
    assert query["allowWatchBookmarks"].lower() == "true"
    assert int(query["timeoutSeconds"]) > 0


@pytest.mark.parametrize("answered", ["in the stream", "to the request"])
def test_a_version_that_is_too_old_is_gone(site: tuple[KubePods, Script], answered: str) -> None:
    pods, script = site
    gone = status(410, "Expired", "too old resource version: 1 (100)")
    if answered == "in the stream":
        script.watch(event("ERROR", gone), END)
    else:
        script.refuse = gone
    with pytest.raises(VersionGone):
        list(pods.watch_pods("1"))


def test_a_refusal_is_the_apis_own_sentence(site: tuple[KubePods, Script]) -> None:
    pods, script = site
    script.refuse = status(403, "Forbidden", FORBIDDEN)
    with pytest.raises(PodsUnavailable, match="worker pods cannot be listed: pods is forbidden"):
        pods.list_pods()
    with pytest.raises(PodsUnavailable, match=r"worker pods cannot be watched: .*[Ff]orbidden"):
        list(pods.watch_pods("1"))


def test_a_broken_connection_is_no_crash(site: tuple[KubePods, Script]) -> None:
    pods, script = site
    script.watch(event("ADDED", pod("w-0", 101)), CUT)
    found = pods.watch_pods("100")
    assert next(found).version == "101"
    with pytest.raises(PodsUnavailable, match="worker pods cannot be watched: "):
        list(found)


def test_nobody_there_is_one_sentence(tmp_path: Path) -> None:
    pods = connect(SELECTOR, kubeconfig(tmp_path, "http://127.0.0.1:9"), tmp_path)
    with pytest.raises(PodsUnavailable, match="worker pods cannot be listed"):
        pods.list_pods()


def test_inside_a_pod_the_service_account_speaks(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not here, which makes the certificate for a server of this test's own")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=test", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", tmp_path / "key", "-out", tmp_path / "ca.crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "ca.crt", tmp_path / "key")
    with api_server(tls) as (url, script):
        script.token = "mounted"
        (tmp_path / "token").write_text("mounted")
        (tmp_path / "namespace").write_text("serving\n")
        host, _, port = url.removeprefix("https://").partition(":")
        environment = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}
        assert connect(SELECTOR, environment, tmp_path).list_pods().pods == ()
        assert script.of("list")[0]["path"] == "/api/v1/namespaces/serving/pods"


@pytest.mark.parametrize("environment", [{}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}])
def test_outside_kubernetes_it_says_so(tmp_path: Path, environment: dict[str, str]) -> None:
    with pytest.raises(PodsUnavailable, match="outside Kubernetes, or its pod has no token"):
        connect(SELECTOR, environment, tmp_path)


def test_a_kubeconfig_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config").write_text(base64.b64encode(b"no yaml").decode())
    with pytest.raises(PodsUnavailable, match="cannot be reached from here"):
        connect(SELECTOR, {"KUBECONFIG": str(tmp_path / "config")}, tmp_path)


# ---- the loop ----


class Followed:
    """A watch of pods, and what it told."""

    def __init__(self, pods: KubePods, clock: ManualClock) -> None:
        self.told: list[str] = []
        self._news = threading.Condition()
        self.watch = PodWatch(pods, SELECTOR, clock, self._hear)
        self.watch.start()

    def _hear(self, why: str) -> None:
        with self._news:
            self.told.append(why)
            self._news.notify_all()

    def wait_until_told(self, count: int) -> list[str]:
        with self._news:
            assert self._news.wait_for(lambda: len(self.told) >= count, 20), self.told
            return self.told

    def wait_for_reason(self, part: str) -> str:
        pause = threading.Event()
        for _ in range(400):
            reason = self.watch.reason()
            if (part in reason) if part else not reason:
                return reason
            pause.wait(0.05)
        raise AssertionError(f"{part!r} was never said; last: {self.watch.reason()!r}")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def followed(
    site: tuple[KubePods, Script], clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Followed, Script]]:
    monkeypatch.setattr(pod_watch, "RETRY_S", 0.05)
    pods, script = site
    script.pods = [pod("w-0", 7), pod("w-1", 8, "Pending")]
    first = script.watch()
    found = Followed(pods, clock)
    script.wait_for(1, "watch")
    script.first = first  # type: ignore[attr-defined]
    yield found, script
    found.watch.close()
    assert not found.watch._thread.is_alive()


def test_reasons_follow_the_pods_and_a_watch_goes_on_where_the_last_ended(followed: tuple[Followed, Script]) -> None:
    found, script = followed
    assert found.watch.reason().startswith("1 of 2 worker pods wait: w-1 ")
    script.first.put(event("MODIFIED", pod("w-1", 120)))
    found.wait_for_reason("")
    script.watch(event("ADDED", pod("w-2", 130, "Pending")))
    script.first.put(END)
    assert "1 of 3" in found.wait_for_reason("w-2")
    assert [query["resourceVersion"] for query in script.of("watch")] == ["100", "120"]
    assert len(script.of("list")) == 1
    assert found.told == []


def test_after_a_broken_connection_it_lists_again(followed: tuple[Followed, Script]) -> None:
    found, script = followed
    script.pods, script.version = [pod("w-0", 7), pod("w-1", 210), pod("w-2", 220, "Pending")], "300"
    script.first.put(CUT)
    assert "1 of 3" in found.wait_for_reason("w-2")
    assert script.wait_for(2, "watch")[1]["resourceVersion"] == "300"
    told = found.wait_until_told(2)
    assert told[0].startswith("worker pods cannot be watched")
    assert told[1] == ""


def test_a_version_that_is_gone_is_listed_again(followed: tuple[Followed, Script]) -> None:
    found, script = followed
    script.pods, script.version = [pod("w-9", 900, "Pending")], "1000"
    script.first.put(event("ERROR", status(410, "Expired", "too old")))
    script.first.put(END)
    assert "1 of 1 worker pod waits: w-9" in found.wait_for_reason("w-9")
    assert script.wait_for(2, "watch")[1]["resourceVersion"] == "1000"
    assert found.told == []


def test_a_refusal_is_told_once_and_what_was_seen_grows_old(
    followed: tuple[Followed, Script], clock: ManualClock
) -> None:
    found, script = followed
    script.refuse = status(403, "Forbidden", FORBIDDEN)
    script.first.put(END)
    found.wait_until_told(1)
    script.wait_for(3, "list")
    assert len(set(found.told)) == len(found.told) <= 2  # the watch's failure, then the list's, once each
    assert "w-1" in found.watch.reason()
    clock.advance(pod_watch.STALE_S + 1)
    assert found.watch.reason() == ""
    script.refuse = None
    found.wait_for_reason("w-1")
    assert found.wait_until_told(3)[-1] == ""


def test_a_server_that_ends_every_watch_at_once_is_not_asked_without_pause(followed: tuple[Followed, Script]) -> None:
    found, script = followed
    for _ in range(5):
        script.watch(END)
    script.first.put(END)
    queries = script.wait_for(6, "watch")
    assert {query["resourceVersion"] for query in queries} == {"100"}
    assert len(script.of("list")) == 1
    assert found.told == []
