"""An OpenAI-like HTTP worker without a model: what stands behind the routers that speak HTTP. Standard library only.

    python http_worker.py

Its port comes as a JSON line. ``POST /v1/completions`` with prompt "PACE_MS DELAY_MS" answers max_tokens tokens of one
character each: as server-sent events when "stream" is true, one for each tick of PACE_MS, as mock_replica does it.
Every GET is answered with what routers want to hear of a healthy worker. Written on asyncio's protocols, since a
framework would cost more than the routers it stands behind.
"""

from __future__ import annotations

import asyncio
import json
import os

HEALTHY = json.dumps({
    "status": "ok", "object": "list", "data": [{"id": "mock", "object": "model"}], "model_path": "mock",
    "served_model_name": "mock", "is_generation": True, "version": "0.0.0", "tp_size": 1, "dp_size": 1,
}).encode()  # fmt: skip
EVENT = (
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"mock",'
    b'"choices":[{"index":0,"text":"x"}]}\n\n'
)
DONE = b"data: [DONE]\n\n"
WHOLE = (
    b'{"id":"cmpl-1","object":"text_completion","created":1,"model":"mock","choices":[{"index":0,"text":"x",'
    b'"finish_reason":"length"}],"usage":{"prompt_tokens":2,"completion_tokens":1,"total_tokens":3}}'
)


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


EVENT_CHUNK, END_CHUNKS = chunk(EVENT), chunk(DONE) + b"0\r\n\r\n"
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def whole(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


class Pace:
    """All streams of one pace; each gets its event at every tick."""

    def __init__(self, pace_ms: int) -> None:
        self.pace_s = pace_ms / 1e3
        self.streams: set[Worker] = set()
        self._ticking = False

    def join(self, stream: Worker) -> None:
        self.streams.add(stream)
        if not self._ticking:
            self._ticking = True
            self._plan()

    def _plan(self) -> None:
        loop = asyncio.get_running_loop()
        if self.pace_s:
            loop.call_at((round(loop.time() / self.pace_s) + 1) * self.pace_s, self._tick)  # timers may be early
        else:
            loop.call_soon(self._tick)

    def _tick(self) -> None:
        for stream in tuple(self.streams):
            if stream.send():
                self.streams.discard(stream)
        if self.streams:
            self._plan()
        else:
            self._ticking = False


PACES: dict[int, Pace] = {}


class Worker(asyncio.Protocol):
    """One connection; requests come one after the other."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._buffer = b""
        self._left = 0
        self._writable = True

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True

    def connection_lost(self, _error: Exception | None) -> None:
        for pace in PACES.values():
            pace.streams.discard(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while b"\r\n\r\n" in self._buffer:
            head, _, rest = self._buffer.partition(b"\r\n\r\n")
            length = 0
            for line in head.split(b"\r\n")[1:]:
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            if len(rest) < length:
                return
            self._buffer = rest[length:]
            self._answer(head, rest[:length])

    def _answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"GET"):
            self._transport.write(whole(HEALTHY))
            return
        asked = json.loads(body)
        if not asked.get("stream"):
            self._transport.write(whole(WHOLE))
            return
        pace_ms, delay_ms = (int(word) for word in asked["prompt"].split())
        self._left = asked["max_tokens"]
        self._transport.write(STREAM_HEAD)
        begin = PACES.setdefault(pace_ms, Pace(pace_ms))
        if delay_ms:
            asyncio.get_running_loop().call_later(delay_ms / 1e3, self._begin, begin)
        else:
            self._begin(begin)

    def _begin(self, pace: Pace) -> None:
        if not self.send():
            pace.join(self)

    def send(self) -> bool:
        """The next token, unless the connection is full; True after the last one."""
        if self._writable:
            self._left -= 1
            self._transport.write(EVENT_CHUNK if self._left else EVENT_CHUNK + END_CHUNKS)
        return self._left <= 0


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(Worker, "127.0.0.1", 0, backlog=4096)
    port = server.sockets[0].getsockname()[1]
    print(json.dumps({"pid": os.getpid(), "port": port}), flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    try:
        import uvloop

        uvloop.run(serve())
    except ImportError:
        asyncio.run(serve())
