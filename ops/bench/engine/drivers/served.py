"""A server that a driver starts by its command, waits for, and ends; and clients that send a job to it.

Standard library only: it runs in any environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from wire import Job, Request

REQUEST_DEADLINE_S, STOP_DEADLINE_S = 300.0, 40.0
LOOK_EVERY_S = 0.05


class Server:
    """One process, from its command to its end. ``name``: how it is called when it fails."""

    def __init__(self, name: str, command: Sequence[str | Path], env: Mapping[str, str]) -> None:
        self._name = name
        self._process = subprocess.Popen(command, stdout=sys.stderr, env=dict(env))

    async def ready(self, is_ready: Callable[[], Awaitable[bool]], deadline_s: float) -> None:
        """Asks every 50 ms whether it serves."""
        until_s = time.monotonic() + deadline_s
        while True:
            if self._process.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError(f"{self._name} does not get ready; what it printed above says why")
            if await is_ready():
                return
            await asyncio.sleep(LOOK_EVERY_S)

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_DEADLINE_S)


async def send(job: Job, stream: Callable[[list[int], Request], Awaitable[None]]) -> list[Request]:
    """The job's clients; ``stream`` sends one prompt and gives its tokens to the request."""
    requests: list[Request] = []
    waiting = iter(job.prompts)

    async def client() -> None:
        for prompt in waiting:
            request = Request(time.monotonic())
            requests.append(request)
            await stream(prompt, request)

    await asyncio.gather(*(client() for _ in range(job.concurrency)))
    return requests
