"""Several processes' metrics, asked for over HTTP: what one of them answers must not cost the others."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client import Counter

from cluster.telemetry.exposition import new_registry
from cluster.telemetry.merged_exposition import MergedProcesses

PAGE = "# HELP done_total Done.\n# TYPE done_total counter\ndone_total {value}\n"
StartPage = Callable[[bytes], tuple[int, dict[str, bytes]]]


@pytest.fixture
def page() -> Iterator[StartPage]:
    """Serves a page on a loopback port; both come back, the page to be changed."""
    servers: list[ThreadingHTTPServer] = []

    def start(content: bytes) -> tuple[int, dict[str, bytes]]:
        shown = {"content": content}

        class Page(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(shown["content"])

            def log_message(self, *_: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server.server_address[1], shown

    yield start
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
    return merged.registry.get_sample_value("done_total")


@pytest.mark.parametrize("odd", [b"done_total{ 1\n", b"done_total many\n", b"\xff\xfe{=", b"<html>"])
def test_one_that_shows_no_metrics_counts_with_what_it_showed_last(
    merged: MergedProcesses, page: StartPage, odd: bytes
) -> None:
    first, second = page(PAGE.format(value=3).encode()), page(PAGE.format(value=4).encode())
    for key, (port, _) in enumerate((first, second)):
        merged.join(key, port)
    assert done(merged) == 7
    first[1]["content"], second[1]["content"] = odd, PAGE.format(value=9).encode()
    assert merged.refresh() == frozenset(), "it answered"
    assert done(merged) == 12


def test_those_that_do_not_answer_are_named(merged: MergedProcesses, page: StartPage) -> None:
    merged.join("there", page(PAGE.format(value=3).encode())[0])
    merged.join("away", 1)
    assert merged.refresh() == {"away"}
    assert done(merged) == 3
