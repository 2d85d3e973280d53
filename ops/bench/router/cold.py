"""What the same work costs after a pause: how soon this machine's caches forget a process.

    python -m ops.bench.router.cold

The work is one gRPC call between two h2 connections in this process, without sockets: about as much Python as a router
touches for a request. Within the pauses the thread spins, so no core goes idle, nothing has to wake up and the clock
stays up. Where the figures grow with the pause all the same, memory is what the difference was spent on: other
programs, or other guests of the host, have had the caches meanwhile.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence

from h2.config import H2Configuration
from h2.connection import H2Connection

PAUSES_MS = (0.0, 1.0, 2.0, 4.0, 7.0, 20.0)
TIMES, TIMES_BEFORE = 60, 200
REQUEST = [
    (":method", "POST"), (":scheme", "http"), (":path", "/cluster.v1.Inference/Complete"), (":authority", "router"),
    ("te", "trailers"), ("content-type", "application/grpc"), ("user-agent", "grpc-python-asyncio/1.80.0"),
]  # fmt: skip
RESPONSE = [(":status", "200"), ("content-type", "application/grpc")]
TRAILERS = [("grpc-status", "0")]


class CallsInMemory:
    """A client and a server that hand each other bytes."""

    def __init__(self) -> None:
        self._client = H2Connection(H2Configuration(client_side=True))
        self._server = H2Connection(H2Configuration(client_side=False))
        self._client.initiate_connection()
        self._server.initiate_connection()

    def call(self) -> int:
        """One call; the bytes that came back."""
        client, server = self._client, self._server
        stream_id = client.get_next_available_stream_id()
        client.send_headers(stream_id, REQUEST)
        client.send_data(stream_id, bytes(60), end_stream=True)
        server.receive_data(client.data_to_send())
        server.acknowledge_received_data(60, stream_id)
        server.send_headers(stream_id, RESPONSE)
        server.send_data(stream_id, bytes(30))
        server.send_headers(stream_id, TRAILERS, end_stream=True)
        answer = server.data_to_send()
        client.receive_data(answer)
        client.acknowledge_received_data(30, stream_id)
        return len(answer)


def after_pauses(
    pauses_ms: Sequence[float] = PAUSES_MS, times: int = TIMES, work: Callable[[], object] | None = None
) -> dict[str, float]:
    """Microseconds of CPU time for the work after each pause: medians of so many times."""
    work = work or CallsInMemory().call
    for _ in range(TIMES_BEFORE):
        work()
    found: dict[str, list[float]] = {f"{pause_ms:g}": [] for pause_ms in pauses_ms}
    for _ in range(times):
        for pause_ms in pauses_ms:
            work()  # so that no pause begins with what the one before has left
            until_s = time.perf_counter() + pause_ms / 1e3
            while pause_ms and time.perf_counter() < until_s:
                pass
            began_ns = time.thread_time_ns()
            work()
            found[f"{pause_ms:g}"].append((time.thread_time_ns() - began_ns) / 1e3)
    return {pause_ms: round(statistics.median(taken), 1) for pause_ms, taken in found.items()}


def main() -> None:
    print(json.dumps({"same_work_us_after_pause_ms": after_pauses()}))


if __name__ == "__main__":
    main()
