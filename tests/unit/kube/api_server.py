"""A real HTTP server on loopback that speaks the list and watch of pods as the Kubernetes API does."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue
from typing import Any
from urllib.parse import parse_qs, urlsplit

Json = dict[str, Any]
# Put into a watch's queue: ends it properly, or cuts the connection inside a line.
END, CUT = object(), object()


def status(code: int, reason: str, message: str) -> Json:
    return {
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "reason": reason, "code": code,
    }  # fmt: skip


@dataclass
class Script:
    """What the server does. ``refuse``: answer to everything; ``watches``: what the next watches say, in order."""

    pods: list[Json] = field(default_factory=list)
    version: str = "100"
    refuse: Json | None = None
    watches: Queue[Queue[Any]] = field(default_factory=Queue)
    asked: list[tuple[str, Json]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    token: str = "secret"
    closing: threading.Event = field(default_factory=threading.Event)

    def watch(self, *events: Any) -> Queue[Any]:
        """The next watch says ``events`` and whatever is put into the queue afterwards."""
        queue: Queue[Any] = Queue()
        for event in events:
            queue.put(event)
        self.watches.put(queue)
        return queue

    def note(self, kind: str, query: Json) -> None:
        with self.changed:
            self.asked.append((kind, query))
            self.changed.notify_all()

    def wait_for(self, count: int, kind: str) -> list[Json]:
        """The queries of ``kind``, once there are ``count``."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.of(kind)) >= count, 20), (kind, count, self.asked)
            return self.of(kind)

    def of(self, kind: str) -> list[Json]:
        return [query for found, query in self.asked if found == kind]


class Api(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    script: Script

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its base's name
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        watching = query.get("watch") in ("true", "True")
        self.script.note("watch" if watching else "list", query | {"path": url.path})
        if self.headers.get("Authorization", "").split(" ")[-1] != self.script.token:
            self._json(401, status(401, "Unauthorized", "Unauthorized"))
        elif self.script.refuse is not None:
            self._json(self.script.refuse["code"], self.script.refuse)
        elif watching:
            self._stream(
                self.script.watches.get(timeout=20) if not self.script.watches.empty() else self.script.watch()
            )
        else:
            answer = {"kind": "PodList", "apiVersion": "v1", "items": self.script.pods}
            self._json(200, answer | {"metadata": {"resourceVersion": self.script.version}})

    def _json(self, code: int, body: Json) -> None:
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, events: Queue[Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while (event := events.get(timeout=60)) is not END:
            if event is CUT:
                self.wfile.write(b'400\r\n{"type": "MODIFIED", "obj')
                self.close_connection = True
                return
            line = event if isinstance(event, bytes) else json.dumps(event).encode() + b"\n"
            self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")


@contextmanager
def api_server(tls: ssl.SSLContext | None = None) -> Iterator[tuple[str, Script]]:
    """(its URL, its script)."""
    script = Script()
    streams: list[Queue[Any]] = []
    original = script.watch

    def remembered(*events: Any) -> Queue[Any]:
        streams.append(original(*events))
        return streams[-1]

    script.watch = remembered  # type: ignore[method-assign]
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("ScriptedApi", (Api,), {"script": script}))
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}", script
    finally:
        for stream in streams:
            stream.put(END)
        server.shutdown()
        server.server_close()
        thread.join(10)
        assert not thread.is_alive()
