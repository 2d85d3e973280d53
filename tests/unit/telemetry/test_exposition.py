from __future__ import annotations

import errno
import selectors
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import ThreadingHTTPServer

import pytest
from prometheus_client import Counter, Gauge, Histogram, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from cluster.domain.errors import ConfigError, PortTakenError
from cluster.telemetry import exposition
from cluster.telemetry.exposition import MetricsServer, Page, new_registry

LOOPBACK = "127.0.0.1"
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Readiness:
    ready = False


@pytest.fixture
def readiness() -> Readiness:
    return Readiness()


@pytest.fixture
def server(readiness: Readiness) -> Iterator[MetricsServer]:
    registry = new_registry()
    Gauge("cluster_test_things", "Things.", registry=registry).set(7)
    server = MetricsServer(registry, LOOPBACK, 0, ready=lambda: readiness.ready)
    yield server
    server.close()


def get(server: MetricsServer, path: str, accept: str = "*/*") -> tuple[int, str, str]:
    request = urllib.request.Request(f"http://{LOOPBACK}:{server.port}{path}", headers={"Accept": accept})
    try:
        with opener.open(request, timeout=5) as answer:
            return answer.status, answer.read().decode(), answer.headers["Content-Type"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), error.headers["Content-Type"]


def test_metrics_and_those_of_the_process(server: MetricsServer) -> None:
    status, page, kind = get(server, "/metrics")
    assert status == 200
    assert kind.startswith("text/plain")
    assert "cluster_test_things 7.0" in page
    assert "process_resident_memory_bytes" in page


def test_when_a_series_began_is_not_told() -> None:
    registry = new_registry()
    Counter("requests", "Requests.", registry=registry).inc()
    Histogram("seconds", "Durations.", registry=registry).observe(1.0)
    page = generate_latest(registry).decode()
    assert "requests_total 1.0" in page
    assert "_created" not in page


def test_open_metrics_for_those_who_ask(server: MetricsServer) -> None:
    _, page, kind = get(server, "/metrics", accept="application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    assert "cluster_test_things" in {family.name for family in text_string_to_metric_families(page)}


def test_a_query_string_does_no_harm(server: MetricsServer) -> None:
    assert get(server, "/metrics?x=1")[0] == 200


def test_readiness_follows_the_process(server: MetricsServer, readiness: Readiness) -> None:
    assert get(server, "/healthz")[:2] == (200, "ok\n")
    assert get(server, "/readyz")[:2] == (503, "not ready\n")
    readiness.ready = True
    assert get(server, "/readyz")[:2] == (200, "ready\n")


def test_other_pages_say_what_there_is(server: MetricsServer) -> None:
    status, page, _ = get(server, "/")
    assert status == 404
    assert "/metrics" in page


def test_the_next_free_port_is_taken() -> None:
    with socket.create_server((LOOPBACK, 0)) as other:
        taken = other.getsockname()[1]
        server = MetricsServer(new_registry(), LOOPBACK, taken)
        try:
            assert taken < server.port < taken + exposition.PORTS_TRIED
            assert get(server, "/healthz")[0] == 200
        finally:
            server.close()


def test_no_free_port_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "PORTS_TRIED", 1)
    with socket.create_server((LOOPBACK, 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(PortTakenError, match=f"Ports {taken} to .*choose another metrics_port"):
            MetricsServer(new_registry(), LOOPBACK, taken)


def test_an_address_that_is_not_ours_is_no_taken_port() -> None:
    with pytest.raises(ConfigError, match="no address of this machine") as caught:
        MetricsServer(new_registry(), "192.0.2.1", 0)
    assert not isinstance(caught.value, PortTakenError)


def test_closing_frees_the_port() -> None:
    first = MetricsServer(new_registry(), LOOPBACK, 0)
    first.close()
    second = MetricsServer(new_registry(), LOOPBACK, first.port)
    second.close()
    assert second.port == first.port


def test_a_process_may_have_pages_of_its_own() -> None:
    told = iter((Page(503, b"{}", "application/json"), Page(200, b"[1]", "application/json")))
    server = MetricsServer(new_registry(), LOOPBACK, 0, routes={"/told": lambda: next(told)})
    try:
        assert get(server, "/told") == (503, "{}", "application/json")
        assert get(server, "/told?x=1") == (200, "[1]", "application/json")
        assert get(server, "/readyz")[0] == 200
        assert "/told" in get(server, "/elsewhere")[1]
    finally:
        server.close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """How long the server was ready to wait, each time it did."""
    found: list[float | None] = []

    class Recording(selectors.PollSelector):
        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            found.append(timeout)
            return super().select(timeout)

    monkeypatch.setattr(exposition.selectors, "PollSelector", Recording)
    return found


def test_nothing_wakes_up_while_nobody_asks(waits: list[float | None]) -> None:
    server = MetricsServer(new_registry(), LOOPBACK, 0)
    assert get(server, "/healthz")[0] == 200
    server.close()
    server.close()
    assert len(waits) == 2
    assert set(waits) == {None}
    with pytest.raises(urllib.error.URLError):
        get(server, "/healthz")


def test_whoever_asks_while_no_descriptor_is_left_is_answered_when_there_is_one(
    monkeypatch: pytest.MonkeyPatch, waits: list[float | None]
) -> None:
    accept, refused = ThreadingHTTPServer.get_request, 0

    def full(self: ThreadingHTTPServer) -> tuple[socket.socket, object]:
        nonlocal refused
        if refused < 3:
            refused += 1
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(self)

    monkeypatch.setattr(ThreadingHTTPServer, "get_request", full)
    monkeypatch.setattr(exposition, "NO_ROOM_PAUSE_S", 0.01)
    server = MetricsServer(new_registry(), LOOPBACK, 0)
    try:
        assert get(server, "/healthz")[0] == 200
    finally:
        server.close()
    assert waits.count(0.01) == 3, "it does not ask again and again at once"


def test_a_server_that_cannot_be_built_leaves_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with socket.create_server((LOOPBACK, 0)) as probe:
        port = probe.getsockname()[1]
    with monkeypatch.context() as patched:
        patched.setattr(exposition.socket, "socketpair", full)
        with pytest.raises(OSError, match="Too many open files"):
            MetricsServer(new_registry(), LOOPBACK, port)
    server = MetricsServer(new_registry(), LOOPBACK, port)
    server.close()
    assert server.port == port
