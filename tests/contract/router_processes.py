"""Routers as processes of their own, as a test starts, kills and asks them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc.aio

from cluster.client import AsyncClient
from cluster.wire import channel

CHILD = """
import json, sys
from pathlib import Path
from cluster.config.schema import RouterConfig
from cluster.router.process_group import run_processes
from cluster.router.service import run_router
from cluster.telemetry.logs import configure_logs
order = json.loads(sys.argv[1])
configure_logs("router", Path(order["log_file"]) if order["log_file"] else None)
config = RouterConfig(**order["config"])
run = run_processes if config.processes > 1 else run_router
state_file = Path(order["state_file"]) if order["state_file"] else None
say = lambda router: print(json.dumps(router.ready_line), flush=True)
sys.exit(run(config, order["controller"], state_file=state_file, started=say))
"""
START_DEADLINE_S = 60.0


class RouterProcess:
    """A router with one process or several. ``kill`` is SIGKILL for the parent alone."""

    def __init__(self, process: asyncio.subprocess.Process, ready: dict[str, Any]) -> None:
        self.process, self.ready = process, ready
        self.ports: dict[str, int] = ready["ports"]
        self.address = f"127.0.0.1:{self.ports['grpc']}"

    @classmethod
    async def start(
        cls, controller: str, *, state_file: Path | None = None, log_file: Path | None = None, **config: Any
    ) -> RouterProcess:
        settings = {"port": 0, "metrics_port": 0, "drain_deadline_s": 5.0, **config}
        order = {"config": settings, "controller": controller}
        order |= {"state_file": str(state_file or ""), "log_file": str(log_file or "")}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CHILD, json.dumps(order),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), START_DEADLINE_S)
        assert line, f"the router ended with {await process.wait()}"
        return cls(process, json.loads(line))

    async def until_ready(self) -> None:
        async with AsyncClient(self.address) as client:
            await client.wait_ready(20)

    async def page(self, path: str) -> tuple[int, str]:
        """Status and body of a page of its HTTP server."""
        url = f"http://127.0.0.1:{self.ports['metrics']}{path}"

        def read() -> tuple[int, str]:
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()

        return await asyncio.to_thread(read)

    async def series(self, name: str) -> dict[str, float]:
        """Labels as they stand on /metrics -> value, of every series that is not 0."""
        found = re.findall(rf"^{name}(\S*) (\S+)$", (await self.page("/metrics"))[1], re.MULTILINE)
        return {labels: float(value) for labels, value in found if float(value)}

    async def outcomes(self) -> dict[str, int]:
        totals: dict[str, int] = {}
        for labels, value in (await self.series("cluster_router_requests_total")).items():
            outcome = labels.partition('outcome="')[2].partition('"')[0]
            totals[outcome] = totals.get(outcome, 0) + int(value)
        return totals

    def kill(self) -> None:
        self.process.kill()

    async def end(self) -> int:
        """SIGTERM; the exit code."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), 30)

    async def close(self) -> None:
        """Whatever is left of it ends."""
        if self.process.returncode is None:
            self.process.kill()
        await asyncio.wait_for(self.process.wait(), 30)


def own_connection(address: str) -> grpc.aio.Channel:
    """A channel that shares no connection with others of this process, as all channels to one address do."""
    return grpc.aio.insecure_channel(address, options=(*channel.CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)))


def is_gone(pid: int) -> bool:
    """Whether no such process runs; one that only waits to be reaped does not.

    The first thread of a killed process may be a zombie while others still hold its sockets.
    """
    process = Path(f"/proc/{pid}")
    try:
        ended = process.joinpath("stat").read_text("ascii").rpartition(")")[2].split()[0] == "Z"
        return ended and len(list(process.joinpath("task").iterdir())) <= 1
    except (FileNotFoundError, ProcessLookupError):
        return True


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
