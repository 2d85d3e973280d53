"""Several processes' metrics, asked for over HTTP: what one of them answers must not cost the others."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client import Counter
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from cluster.telemetry import merged_exposition
from cluster.telemetry.exposition import new_registry
from cluster.telemetry.merged_exposition import MergedProcesses
from cluster.telemetry.merging import Series

PAGE = "# HELP done_total Done.\n# TYPE done_total counter\ndone_total {value}\n"
StartPage = Callable[..., tuple[int, dict[str, bytes]]]


@pytest.fixture
def page() -> Iterator[StartPage]:
    """Serves a page on a loopback port; both come back, the page to be changed. ``others``: statuses by path.

    Metrics wait for ``gate``.
    """
    servers: list[ThreadingHTTPServer] = []
    gates: list[threading.Event] = []

    def start(
        content: bytes, others: dict[str, int] | None = None, gate: threading.Event | None = None
    ) -> tuple[int, dict[str, bytes]]:
        shown = {"content": content}

        class Page(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if gate is not None and self.path == "/metrics":
                    gate.wait()
                self.send_response((others or {}).get(self.path, 200))
                self.end_headers()
                with suppress(OSError):  # whoever asked has gone
                    self.wfile.write(shown["content"])

            def log_message(self, *_: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
        server.daemon_threads = True
        servers.append(server)
        gates.extend([gate] if gate is not None else [])
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server.server_address[1], shown

    yield start
    for gate in gates:
        gate.set()
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def merged() -> Iterator[MergedProcesses]:
    own = new_registry()
    Counter("restarts", "Of processes.", registry=own)
    processes = MergedProcesses(own, frozenset())
    yield processes
    processes.close()


def done(merged: MergedProcesses) -> float | None:
    shown = merged.page().body.decode()
    found = {s.name: s.value for family in text_string_to_metric_families(shown) for s in family.samples}
    return found.get("done_total")


@pytest.mark.parametrize("odd", [b"done_total{ 1\n", b"done_total many\n", b"\xff\xfe{=", b"<html>"])
def test_one_that_shows_no_metrics_counts_with_what_it_showed_last(
    merged: MergedProcesses, page: StartPage, odd: bytes
) -> None:
    first, second = page(PAGE.format(value=3).encode()), page(PAGE.format(value=4).encode())
    for key, (port, _) in enumerate((first, second)):
        merged.join(key, port)
    assert done(merged) == 7
    first[1]["content"], second[1]["content"] = odd, PAGE.format(value=9).encode()
    with capture_logs() as logs:
        merged.refresh()
    assert [(log["event"], log["port"]) for log in logs] == [("process_metrics_unreadable", first[0])]
    assert done(merged) == 12


def test_those_that_do_not_say_that_they_live_are_named(merged: MergedProcesses, page: StartPage) -> None:
    merged.join("there", page(PAGE.format(value=3).encode())[0])
    merged.join("hanging", page(PAGE.format(value=4).encode(), {"/healthz": 503})[0])
    merged.join("away", 1)
    assert merged.silent() == {"hanging", "away"}
    assert done(merged) == 7, "metrics are no sign of life, and no less true without one"


def test_whoever_takes_long_over_its_metrics_lives_and_counts_when_they_have_come(
    merged: MergedProcesses, page: StartPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged_exposition, "SCRAPE_FIRST_S", 0.05)
    gate = threading.Event()
    for key in range(merged_exposition.ASKED_AT_ONCE):  # as many as are asked at once
        merged.join(key, page(PAGE.format(value=1).encode(), gate=gate)[0])
    patient = threading.Thread(target=merged.refresh)
    patient.start()
    elsewhere = ThreadPoolExecutor(1)
    assert elsewhere.submit(merged.silent).result(10) == frozenset()
    assert elsewhere.submit(merged.ready).result(10)
    gate.set()
    patient.join(20)
    assert done(merged) == merged_exposition.ASKED_AT_ONCE


def test_a_scrape_waits_some_times_what_the_last_answer_took_within_bounds() -> None:
    def limit_s(took_s: float) -> float:
        return merged_exposition._scrape_limit_s(merged_exposition._Answer(Series(), 0.0, took_s))

    assert limit_s(0.001) == merged_exposition.SCRAPE_LEAST_S
    assert limit_s(1.8) == pytest.approx(1.8 * merged_exposition.SCRAPE_TIMES)
    assert limit_s(60.0) == merged_exposition.SCRAPE_MOST_S


def test_an_older_answer_does_not_replace_a_younger_one(merged: MergedProcesses, page: StartPage) -> None:
    port, shown = page(PAGE.format(value=9).encode())
    merged.join("it", port)
    merged.refresh()
    merged._last["it"] = merged._last["it"]._replace(asked_s=merged._clock.now() + 3600)
    shown["content"] = PAGE.format(value=8).encode()
    assert done(merged) == 9
