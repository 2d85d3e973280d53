"""What a write costs that wakes its reader: where cores are virtual, that is much of a small request's CPU time.

    python -m ops.bench.router.waking

Eighty bytes over loopback to a process that has waited for them for so many milliseconds, and as many right behind
them. The writer spins in the pauses: nothing of its own goes to sleep, and the reader wakes on another core if there is
one. The first write finds the kernel's path cold as well. A request crosses a router in two such writes, one each way;
where its neighbours sleep, as they do when requests are few, whoever is in the middle pays them.
"""

from __future__ import annotations

import json
import multiprocessing
import socket
import statistics
import time
from collections.abc import Sequence

PAUSES_MS = (0.5, 2.0, 7.0, 20.0)
TIMES = 100
BYTES = 80  # a request of one token, as it goes to a replica
PATIENCE_S = 20.0


def _read(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        while connection.recv(4 * BYTES):
            pass


def after_sleeps(pauses_ms: Sequence[float] = PAUSES_MS, times: int = TIMES) -> dict[str, float]:
    """Microseconds of the writer's CPU time by the reader's pause, and "at once": medians of so many times."""
    found: dict[str, list[float]] = {f"{pause_ms:g}": [] for pause_ms in pauses_ms} | {"at once": []}
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(PATIENCE_S)
        reader = multiprocessing.get_context("spawn").Process(target=_read, args=(listening.getsockname()[1],))
        reader.start()
        try:
            connection, _ = listening.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.settimeout(PATIENCE_S)
                for _ in range(times):
                    for pause_ms in pauses_ms:
                        until_s = time.perf_counter() + pause_ms / 1e3
                        while time.perf_counter() < until_s:
                            pass
                        found[f"{pause_ms:g}"].append(_timed_us(connection))
                        found["at once"].append(_timed_us(connection))
        finally:
            reader.join(PATIENCE_S)
            reader.kill()
            reader.join()
    return {pause_ms: round(statistics.median(taken), 1) for pause_ms, taken in found.items()}


def _timed_us(connection: socket.socket) -> float:
    began_ns = time.thread_time_ns()
    connection.sendall(bytes(BYTES))
    return (time.thread_time_ns() - began_ns) / 1e3


def main() -> None:
    print(json.dumps({"waking_write_us_after_pause_ms": after_sleeps()}))


if __name__ == "__main__":
    main()
