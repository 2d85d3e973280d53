"""Who stands between load and mock, as processes: started in a session of their own, waited for, ended."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ops.bench.provenance import ROOT

READY_DEADLINE_S, END_DEADLINE_S = 120.0, 15.0
HERE = Path(__file__).parent
TOKENIZER = ROOT / "cluster/models/demo"


class ContenderError(Exception):
    """It does not start or does not answer; the reason is its name's in the result."""


@dataclass
class Contender:
    """One that serves: where, how it is spoken to, and the processes whose cost is its own."""

    name: str
    address: str
    protocol: str  # grpc | grpc_ids | http
    pids: list[int]
    started: list[subprocess.Popen] = field(default_factory=list)
    application: str = ""
    parent: int | None = None  # one of ``pids`` that serves nobody

    def end(self) -> None:
        """In the order of starting backwards; whoever stays is killed."""
        for process in reversed(self.started):
            if process.stdin is not None:
                process.stdin.close()
            if self.application:  # it ends by itself, and only then all that it has started
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(END_DEADLINE_S)
            for number in (signal.SIGTERM, signal.SIGKILL):
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, number)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(END_DEADLINE_S)


class Starter:
    """Starts contenders by name; ``folder`` takes their logs and settings, ``peers`` is the peers' environment."""

    def __init__(self, folder: Path, peers: Path | None) -> None:
        self._folder, self._peers = folder, peers
        self.known: dict[str, Callable[[list[subprocess.Popen]], Contender]] = {
            "ours": lambda started: self._ours("ours", started, ids=False),
            "ours_ids": lambda started: self._ours("ours_ids", started, ids=True),
            "ours_2": lambda started: self._ours("ours_2", started, ids=False, processes=2),
            "ours_4": lambda started: self._ours("ours_4", started, ids=False, processes=4),
            "grpcio": self._grpcio,
            "envoy": self._envoy,
            "serve": self._serve,
            "http": self._http,
            "sglang": lambda started: self._rust("sglang", started),
            "vllm": lambda started: self._rust("vllm", started),
        }

    def start(self, name: str) -> Contender:
        """ContenderError when it does not come up; nothing of it is left then."""
        started: list[subprocess.Popen] = []
        try:
            found = self.known[name](started)
        except (ContenderError, OSError, TimeoutError) as error:
            Contender(name, "", "", [], started).end()
            raise ContenderError(f"{name}: {error}") from error
        found.started = started
        return found

    def _ours(self, name: str, started: list[subprocess.Popen], *, ids: bool, processes: int = 1) -> Contender:
        tokenizer = [] if ids else ["--tokenizer", str(TOKENIZER)]
        mock = self._json(
            name, started, [sys.executable, "-m", "ops.bench.router.mock_replica", *tokenizer], lambda _: True
        )
        settings = self._folder / f"{name}.yaml"
        settings.write_text(
            f"router: {{max_concurrent_requests: 100000, port: 0, metrics_port: 0, processes: {processes}}}\n"
        )
        router = self._json(
            name,
            started,
            [sys.executable, "-m", "cluster", "router", "--controller", f"127.0.0.1:{mock['port']}", "--config",
             str(settings), "--run-dir", str(self._folder / f"{name}-{time.monotonic_ns()}")],
            lambda said: said.get("kind") == "router",
        )  # fmt: skip
        _until_ready(f"http://127.0.0.1:{router['ports']['metrics']}/readyz")
        address = f"127.0.0.1:{router['ports']['grpc']}"
        pids = [router["pid"], *_children(router["pid"])]
        if processes > 1 and len(pids) != 1 + processes:
            raise ContenderError(f"it has {len(pids) - 1} processes instead of {processes}")
        parent = pids[0] if processes > 1 else None
        return Contender(name, address, "grpc_ids" if ids else "grpc", pids, parent=parent)

    def _grpcio(self, started: list[subprocess.Popen]) -> Contender:
        mock = self._mock("grpcio", started)
        return Contender("grpcio", f"127.0.0.1:{mock['port']}", "grpc", [mock["pid"]])

    def _mock(self, name: str, started: list[subprocess.Popen]) -> dict:
        return self._json(name, started, [sys.executable, "-m", "ops.bench.router.mock_replica"], lambda _: True)

    def envoy_before(self, backend: Contender) -> Contender:
        """A plain balancer before one that serves already; it is ended by itself."""
        started: list[subprocess.Popen] = []
        try:
            found = self._envoy_to(int(backend.address.rpartition(":")[2]), started)
        except (OSError, ContenderError):
            Contender("envoy", "", "", [], started).end()
            raise
        found.started = started
        return found

    def _envoy(self, started: list[subprocess.Popen]) -> Contender:
        return self._envoy_to(self._mock("envoy", started)["port"], started)

    def _envoy_to(self, backend: int, started: list[subprocess.Popen]) -> Contender:
        port, settings = _free_port(), self._folder / "envoy.json"
        settings.write_text(json.dumps(_envoy_settings(port, backend)))
        command = [str(self._peer("envoy")), "-c", str(settings), "--concurrency", "1", "--disable-hot-restart"]
        process = self._spawn("envoy", started, command)
        _until_open(port, process)
        return Contender("envoy", f"127.0.0.1:{port}", "grpc", [_served_by(process.pid)])

    def _serve(self, started: list[subprocess.Popen]) -> Contender:
        command = [str(self._peer("python")), str(HERE / "serve_front.py"), str(ROOT)]
        found = self._json("serve", started, command, lambda _: True)
        return Contender("serve", f"127.0.0.1:{found['port']}", "grpc", [found["pid"]], application="mock")

    def _worker(self, name: str, started: list[subprocess.Popen]) -> dict:
        return self._json(name, started, [sys.executable, str(HERE / "http_worker.py")], lambda _: True)

    def _http(self, started: list[subprocess.Popen]) -> Contender:
        worker = self._worker("http", started)
        return Contender("http", f"127.0.0.1:{worker['port']}", "http", [worker["pid"]])

    def _rust(self, name: str, started: list[subprocess.Popen]) -> Contender:
        worker, port, metrics = self._worker(name, started), _free_port(), _free_port()
        module = "sglang_router.launch_router" if name == "sglang" else "vllm_router.launch_router"
        command = [str(self._peer("python")), "-m", module, "--host", "127.0.0.1", "--port", str(port), "--worker-urls",
                   f"http://127.0.0.1:{worker['port']}", "--policy", "round_robin", "--log-level", "error",
                   "--prometheus-port", str(metrics), "--max-concurrent-requests", "100000"]  # fmt: skip
        process = self._spawn(name, started, command)
        _until_open(port, process)
        _until_ready(f"http://127.0.0.1:{port}/v1/models")
        return Contender(name, f"127.0.0.1:{port}", "http", [_served_by(process.pid)])

    def _peer(self, program: str) -> Path:
        if self._peers is None or not (found := self._peers / "bin" / program).exists():
            raise ContenderError(f"there is no {program} in the peers' environment; METHODOLOGY.md says how it is made")
        return found

    def _spawn(self, name: str, started: list[subprocess.Popen], command: list[str]) -> subprocess.Popen:
        with (self._folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        started.append(process)
        return process

    def _json(
        self, name: str, started: list[subprocess.Popen], command: list[str], wanted: Callable[[dict], bool]
    ) -> dict:  # fmt: skip
        """The first line of its output that is a JSON object and ``wanted``."""
        process = self._spawn(name, started, command)
        until_s = time.monotonic() + READY_DEADLINE_S
        heard = b""
        assert process.stdout is not None
        while (left_s := until_s - time.monotonic()) > 0:
            readable, _, _ = select.select([process.stdout], [], [], left_s)
            data = os.read(process.stdout.fileno(), 65536) if readable else b""
            if not data:
                break
            *lines, heard = (heard + data).split(b"\n")
            for line in lines:
                if line.startswith(b"{") and wanted(found := json.loads(line)):
                    return found
        raise ContenderError(f"it did not say that it serves; see {self._folder / name}.log")


def _served_by(pid: int) -> int:
    """The process that does the work: the one itself, or the last of its descendants where a wrapper starts it."""
    children = _children(pid)
    return _served_by(children[-1]) if children else pid


def _children(pid: int) -> list[int]:
    """Those that its first thread has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _until_open(port: int, process: subprocess.Popen) -> None:
    until_s = time.monotonic() + READY_DEADLINE_S
    while time.monotonic() < until_s and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise ContenderError("it opens no port")


def _until_ready(url: str) -> None:
    until_s = time.monotonic() + READY_DEADLINE_S
    while time.monotonic() < until_s:
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.05)
    raise ContenderError(f"{url} does not become ready")


def _envoy_settings(port: int, backend: int) -> dict:
    def address(number: int) -> dict:
        return {"socket_address": {"address": "127.0.0.1", "port_value": number}}

    package = "type.googleapis.com/envoy.extensions"
    route = {"match": {"prefix": "/"}, "route": {"cluster": "mock", "timeout": "0s"}}
    connections = {
        "@type": f"{package}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "codec_type": "HTTP2",
        "stat_prefix": "bench",
        "stream_idle_timeout": "0s",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {"name": "router", "typed_config": {"@type": f"{package}.filters.http.router.v3.Router"}},
        ],
    }
    http2 = {
        "@type": f"{package}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {"max_concurrent_streams": 100_000}},
    }
    many = {"max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000}
    endpoint = {"endpoint": {"address": address(backend)}}
    return {
        "static_resources": {
            "listeners": [
                {
                    "address": address(port),
                    "filter_chains": [{"filters": [{"name": "http", "typed_config": connections}]}],
                }
            ],
            "clusters": [
                {
                    "name": "mock", "type": "STATIC", "lb_policy": "ROUND_ROBIN",
                    "circuit_breakers": {"thresholds": [many]},
                    "typed_extension_protocol_options": {http2["@type"].rpartition("/")[2]: http2},
                    "load_assignment": {"cluster_name": "mock", "endpoints": [{"lb_endpoints": [endpoint]}]},
                }
            ],
        }
    }  # fmt: skip
