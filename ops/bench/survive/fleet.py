"""A router as a user starts it, before replicas that are processes of their own: they become slow, break and die."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.domain.endpoint import Endpoint, EndpointTable
from cluster.domain.ids import Incarnation, ReplicaId
from cluster.v1 import control_pb2_grpc
from cluster.wire import channel, convert
from ops.bench.overload.replicas import BLOCK_SIZE, DIGEST, MODEL
from ops.bench.provenance import ROOT

START_DEADLINE_S, END_DEADLINE_S = 60.0, 15.0
REPLICA = (sys.executable, "-m", "ops.bench.survive.replica")


class Control(control_pb2_grpc.ControlServicer):
    """Pushes every table to whoever watches."""

    def __init__(self) -> None:
        self._table: EndpointTable | None = None
        self._epoch = 0
        self._changed = asyncio.Event()
        self._server = channel.new_server()
        control_pb2_grpc.add_ControlServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{channel.bind(self._server, '127.0.0.1', 0)}"

    async def start(self) -> None:
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(0)

    def push(self, *endpoints: Endpoint) -> None:
        self._epoch += 1
        self._table = EndpointTable(self._epoch, endpoints, (MODEL,))
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def WatchEndpoints(self, _request: Any, context: Any) -> None:  # noqa: N802
        while True:
            changed, table = self._changed, self._table
            if table is not None:
                await context.write(convert.endpoint_table_to_message(table))
            await changed.wait()


class Process:
    """A process that has said, as a JSON line, that it serves: ``said``."""

    def __init__(self, process: asyncio.subprocess.Process, said: dict[str, Any]) -> None:
        self.process, self.said = process, said
        self._stopped = False

    @classmethod
    async def start(cls, log: Path, *command: str) -> Process:
        """SystemExit, with the end of its log, when it does not come up."""
        with log.open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                *command, cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=errors
            )
        assert process.stdout is not None
        with suppress(TimeoutError):
            async with asyncio.timeout(START_DEADLINE_S):
                while line := await process.stdout.readline():
                    if line.startswith(b"{") and "pid" in (said := json.loads(line)):
                        return cls(process, said)
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        said = await asyncio.to_thread(log.read_text)
        raise SystemExit(f"{' '.join(command)} does not start: {said[-2000:]}")

    def tell(self, word: str, value: float) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word} {value:g}\n".encode())

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """It stands still, with all its connections."""
        self._stopped = True
        os.kill(self.process.pid, signal.SIGSTOP)

    async def end(self) -> None:
        if self._stopped:  # it hears nothing else
            self.kill()
        with suppress(ProcessLookupError):
            self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), END_DEADLINE_S)
        except TimeoutError:
            self.kill()
            await self.process.wait()


class Fleet:
    """Control, replicas and router; an asynchronous context manager. ``router``: its settings, by name."""

    def __init__(self, folder: Path, replicas: int, slots: int, step_ms: float, router: dict[str, Any]) -> None:
        self._folder, self._count, self._slots, self._step_ms = folder, replicas, slots, step_ms
        self._settings = {"port": 0, "metrics_port": 0, "drain_deadline_s": 1.0, **router}
        self._generation = 0
        self.replicas: list[Process] = []
        self._processes: list[Process] = []

    async def __aenter__(self) -> Fleet:
        self._folder.mkdir(parents=True)
        self._control = Control()
        await self._control.start()
        self.push(await self.spawn())
        settings = self._folder / "router.yaml"
        settings.write_text(json.dumps({"router": self._settings}))  # JSON is YAML
        self.router = await Process.start(
            self._folder / "router.err", sys.executable, "-m", "cluster", "router", "--controller",
            self._control.address, "--config", str(settings), "--run-dir", str(self._folder / "run"),
        )  # fmt: skip
        self._processes.append(self.router)
        self.address = f"127.0.0.1:{self.router.said['ports']['grpc']}"
        await self.until_ready()
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            await process.end()
        await self._control.stop()

    async def spawn(self) -> list[Process]:
        """Processes of the next generation, not yet in the table."""
        self._generation += 1
        sizes = ["--slots", str(self._slots), "--step-ms", str(self._step_ms), "--generation", str(self._generation)]
        starts = [
            Process.start(self._folder / f"replica-{slot}.err", *REPLICA, "--slot", str(slot), *sizes)
            for slot in range(self._count)
        ]
        found = await asyncio.gather(*starts)
        self._processes += found
        return list(found)

    def push(self, replicas: list[Process]) -> None:
        """They are the fleet from now on."""
        self.replicas = replicas
        self._control.push(
            *(
                Endpoint(Incarnation(ReplicaId(MODEL, slot), self._generation), one.said["address"], DIGEST, BLOCK_SIZE)
                for slot, one in enumerate(replicas)
            )
        )

    async def kill_all(self) -> float:
        """SIGKILL for every replica; the clock when the last one is no more: the kernel needs a while for that."""
        for replica in self.replicas:
            replica.kill()
        for replica in self.replicas:
            await replica.process.wait()
        return time.monotonic()

    async def series(self, name: str) -> dict[str, float]:
        """Labels as they stand on the router's /metrics -> value."""
        url = f"http://127.0.0.1:{self.router.said['ports']['metrics']}/metrics"

        def read() -> str:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return str(answer.read().decode())

        page = await asyncio.to_thread(read)
        return {labels: float(value) for labels, value in re.findall(rf"^{name}(\S*) (\S+)$", page, re.MULTILINE)}

    async def total(self, name: str) -> float:
        return sum((await self.series(name)).values())

    async def until_ready(self) -> None:
        async with asyncio.timeout(START_DEADLINE_S):
            while await self.total("cluster_router_endpoints") < self._count:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.05)
