"""The small HTTP server of every process: /metrics, /healthz, /readyz, and what else a process has to tell."""

from __future__ import annotations

import errno
import selectors
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from cluster.config.listening import refusal
from cluster.domain.errors import PortTakenError

PORTS_TRIED = 64
NO_ROOM_PAUSE_S = 0.1
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(frozen=True, slots=True)
class Page:
    """An answer to a GET."""

    status: int
    body: bytes
    content_type: str = "text/plain"


Routes = Mapping[str, Callable[[], Page]]


def new_registry() -> CollectorRegistry:
    """A registry of a process's own, with the usual process metrics.

    No page of this process says when each series began: that would be one more gauge for each counter and histogram.
    """
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


class MetricsServer:
    """Serves ``metrics`` on the first free port from ``first_port`` on (0: any), in a thread of its own.

    ``metrics``: a registry, or what makes the page. ``ready`` answers /readyz; /healthz says only that the process
    lives. ``routes``: further paths, or other answers for these two. All of these functions are called in a thread of
    the request's own. PortTakenError when the 64 ports from ``first_port`` on are all taken, another ConfigError when
    ``host`` is no address of ours.
    """

    def __init__(
        self,
        metrics: CollectorRegistry | Callable[[], Page],
        host: str,
        first_port: int,
        ready: Callable[[], bool] | None = None,
        routes: Routes | None = None,
    ) -> None:
        pages = {"/healthz": _alive, "/readyz": _readiness(ready or (lambda: True)), **(routes or {})}
        self._server = _bind(_request_class(_metrics_page(metrics), pages), host, first_port)
        self.port: int = self._server.server_address[1]
        try:
            self._closed, self._close = socket.socketpair()
        except OSError:
            self._server.server_close()
            raise
        self._thread = threading.Thread(target=self._serve, name="metrics", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        """Sleeps while nobody asks: ``serve_forever`` would wake up, and take the interpreter, many times a second."""
        self._server.timeout = 0  # whoever asked may have left
        # Of a kind that needs no descriptor of its own.
        with selectors.PollSelector() as asked, selectors.PollSelector() as closed:
            asked.register(self._server, selectors.EVENT_READ)
            for either in (asked, closed):
                either.register(self._closed, selectors.EVENT_READ)
            while all(key.fileobj is self._server for key, _ in asked.select()):
                self._server.handle_request()
                if self._server.full and closed.select(NO_ROOM_PAUSE_S):
                    return

    def close(self) -> None:
        with suppress(OSError):  # closed before
            self._close.shutdown(socket.SHUT_RDWR)  # heard even where a child has inherited it
        self._close.close()
        self._thread.join(timeout=5)
        self._server.server_close()
        self._closed.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.full = False  # there was no descriptor for who asked last: he is still there

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            asked = super().get_request()
        except OSError as error:
            self.full = error.errno in _NO_ROOM
            raise
        self.full = False
        return asked


class _Server6(_Server):
    address_family = socket.AF_INET6


def _bind(request_class: type[BaseHTTPRequestHandler], host: str, first_port: int) -> _Server:
    ports = [0] if first_port == 0 else range(first_port, min(first_port + PORTS_TRIED, 65536))
    kind = _Server6 if ":" in host else _Server
    for port in ports:
        try:
            return kind((host, port), request_class)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise refusal(error, host, port, "metrics_port") from error
    raise PortTakenError(
        f"Ports {first_port} to {first_port + PORTS_TRIED - 1} on {host} are all taken; choose another metrics_port."
    )


def _alive() -> Page:
    return Page(200, b"ok\n")


def _readiness(ready: Callable[[], bool]) -> Callable[[], Page]:
    return lambda: Page(200, b"ready\n") if ready() else Page(503, b"not ready\n")


def _metrics_page(metrics: CollectorRegistry | Callable[[], Page]) -> Callable[[str], Page]:
    """From the Accept header to the page."""
    if not isinstance(metrics, CollectorRegistry):
        return lambda _: metrics()

    def page(accept: str) -> Page:
        encode, content_type = choose_encoder(accept)
        return Page(200, encode(metrics), content_type)

    return page


def _request_class(metrics: Callable[[str], Page], pages: Routes) -> type[BaseHTTPRequestHandler]:
    known = f"try {', '.join(['/metrics', *pages])}\n".encode()

    class Request(BaseHTTPRequestHandler):
        timeout = 10  # a client that sends nothing is dropped

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                self._answer(metrics(self.headers.get("Accept", "")))
            elif path in pages:
                self._answer(pages[path]())
            else:
                self._answer(Page(404, known))

        def _answer(self, page: Page) -> None:
            self.send_response(page.status)
            self.send_header("Content-Type", page.content_type)
            self.send_header("Content-Length", str(len(page.body)))
            self.end_headers()
            self.wfile.write(page.body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            """Scrapes are not news."""

    return Request
