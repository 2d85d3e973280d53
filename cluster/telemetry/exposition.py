"""The small HTTP server of every process: /metrics, and /healthz, /readyz where somebody asks."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from cluster.config.listening import refusal
from cluster.domain.errors import PortTakenError

PORTS_TRIED = 64


def new_registry() -> CollectorRegistry:
    """A registry of a process's own, with the usual process metrics."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


class MetricsServer:
    """Serves ``registry`` on the first free port from ``first_port`` on (0: any), in a thread of its own.

    ``ready`` answers /readyz; /healthz says only that the process lives. PortTakenError when the
    64 ports from ``first_port`` on are all taken, another ConfigError when ``host`` is no address of ours.
    """

    def __init__(
        self, registry: CollectorRegistry, host: str, first_port: int, ready: Callable[[], bool] | None = None
    ) -> None:
        self._server = _bind(_request_class(registry, ready or (lambda: True)), host, first_port)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64


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


def _request_class(registry: CollectorRegistry, ready: Callable[[], bool]) -> type[BaseHTTPRequestHandler]:
    class Request(BaseHTTPRequestHandler):
        timeout = 10  # a client that sends nothing is dropped

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                self._answer(200, encode(registry), content_type)
            elif path == "/healthz":
                self._answer(200, b"ok\n", "text/plain")
            elif path == "/readyz":
                is_ready = ready()
                self._answer(200 if is_ready else 503, b"ready\n" if is_ready else b"not ready\n", "text/plain")
            else:
                self._answer(404, b"try /metrics, /healthz or /readyz\n", "text/plain")

        def _answer(self, status: int, body: bytes, content_type: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            """Scrapes are not news."""

    return Request
