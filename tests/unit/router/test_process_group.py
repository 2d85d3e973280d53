"""A process group outlives what the machine and its children do: no child to be had, another first line, odd metrics."""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.config.schema import RouterConfig
from cluster.domain.clock import ManualClock
from cluster.domain.errors import ReplicaError
from cluster.router import process_group
from cluster.router.process_group import ProcessGroup
from cluster.router.process_order import ProcessOrder
from cluster.router.respawn import SILENT_ROUNDS
from cluster.telemetry import merged_exposition
from cluster.telemetry.logs import get_logger

SERVES = 'import sys; print(\'{"pid": 1, "ports": {"metrics": 1}}\', flush=True); sys.stdin.read()'
MUMBLES = "import sys; print({line!r}, flush=True); sys.stdin.read()"

STOPS = SERVES.replace("sys.stdin.read()", "import os; os.kill(os.getpid(), 19)")
ANSWERS = """
import json, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Page(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        if self.path == "/metrics": {metrics}
    def log_message(self, *_): ...
server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
server.daemon_threads = True
print(json.dumps({{"pid": 1, "ports": {{"metrics": server.server_address[1]}}}}), flush=True)
server.serve_forever()
"""
# Its metrics come, and its event loop hangs.
HANGS = """
import asyncio, json, threading
from cluster.domain.clock import MonotonicClock
from cluster.router import loop_beat
from cluster.telemetry.exposition import MetricsServer, new_registry
loop_beat.LATE_S = 0.3
async def main():
    routes = {"/healthz": loop_beat.LoopBeat(MonotonicClock()).page}
    server = MetricsServer(new_registry(), "127.0.0.1", 0, routes=routes)
    print(json.dumps({"pid": 1, "ports": {"metrics": server.port}}), flush=True)
    threading.Event().wait()
asyncio.run(main())
"""


@pytest.fixture
async def group(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(process_group, "CHILD", (sys.executable, "-S", "-c", SERVES))
    order = ProcessOrder(RouterConfig(processes=1), "127.0.0.1:1", 0, 0.0)
    group = ProcessGroup(order, get_logger(), ManualClock())
    yield group
    group.stop()
    await group._end(0.0)
    group.merged.close()


async def until_started(group: ProcessGroup) -> None:
    async with asyncio.timeout(10):
        while not group.merged._ports:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("error", [BlockingIOError(11, "EAGAIN"), OSError(24, "EMFILE")])
async def test_a_process_that_cannot_be_started_is_tried_again(
    group: ProcessGroup, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    plain, asked = asyncio.create_subprocess_exec, 0

    async def scarce(*arguments: Any, **options: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise error
        return await plain(*arguments, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", scarce)
    running = asyncio.create_task(group.run())
    await until_started(group)
    assert asked == 2
    group.stop()
    await asyncio.wait_for(running, 10)


async def test_a_start_without_processes_is_a_typed_error(group: ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "CHILD", ("/nowhere/python",))
    with pytest.raises(ReplicaError, match="did not start"):
        await asyncio.wait_for(group.start(), 10)


@pytest.mark.parametrize("line", ["hello", "5", "[]", '{"who": 1}', '{"pid": 1, "ports": {}}', "x" * 100_000])
async def test_a_child_that_says_something_else_is_killed(
    group: ProcessGroup, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setattr(process_group, "CHILD", (sys.executable, "-S", "-c", MUMBLES.format(line=line)))
    born: list[int] = []
    plain = asyncio.create_subprocess_exec

    async def watched(*arguments: Any, **options: Any) -> Any:
        child = await plain(*arguments, **options)
        born.append(child.pid)
        return child

    monkeypatch.setattr(asyncio, "create_subprocess_exec", watched)
    with pytest.raises(ReplicaError, match="no answer"):
        await asyncio.wait_for(group.start(), 10)
    assert group.pids == ()
    (pid,) = born
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_refreshing_goes_on_after_a_refresh_that_failed(
    group: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_group, "REFRESH_S", 0.001)
    refreshed, asked = asyncio.Event(), 0
    loop = asyncio.get_running_loop()

    def refresh() -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise ValueError("no metrics")
        loop.call_soon_threadsafe(refreshed.set)

    monkeypatch.setattr(group.merged, "refresh", refresh)
    refreshing = asyncio.create_task(group._refresh())
    await asyncio.wait_for(refreshed.wait(), 5)
    group.stop()
    await asyncio.wait_for(refreshing, 5)


@pytest.mark.parametrize("program", [STOPS, HANGS])
async def test_a_child_that_stands_still_is_replaced(
    group: ProcessGroup, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr(process_group, "ROLL_CALL_S", 0.001)
    monkeypatch.setattr(process_group, "CHILD", (sys.executable, "-c", program))
    running = asyncio.create_task(group.run())
    await until_started(group)
    (stopped,) = group.pids
    async with asyncio.timeout(20):
        while group.pids in ((), (stopped,)):
            await asyncio.sleep(0.005)
    with pytest.raises(ProcessLookupError):
        os.kill(stopped, 0)
    group.stop()
    await group._end(0.0)
    await asyncio.wait_for(running, 10)


@pytest.mark.parametrize("metrics", ['self.wfile.write(b"<html>")', "threading.Event().wait()"])
async def test_a_child_that_says_that_it_lives_does_whatever_its_metrics_are(
    group: ProcessGroup, monkeypatch: pytest.MonkeyPatch, metrics: str
) -> None:
    monkeypatch.setattr(process_group, "CHILD", (sys.executable, "-c", ANSWERS.format(metrics=metrics)))
    monkeypatch.setattr(process_group, "REFRESH_S", 0.001)
    monkeypatch.setattr(process_group, "ROLL_CALL_S", 0.001)
    monkeypatch.setattr(merged_exposition, "REFRESH_DEADLINE_S", 0.05)
    rounds, plain, merge, merges = 0, group.merged.silent, group.merged.refresh, 0

    def silent() -> frozenset[object]:
        nonlocal rounds
        rounds += bool(group.merged._ports)
        return plain()

    def refresh() -> None:
        nonlocal merges
        merge()
        merges += bool(group.merged._ports)

    monkeypatch.setattr(group.merged, "silent", silent)
    monkeypatch.setattr(group.merged, "refresh", refresh)
    running = asyncio.create_task(group.run())
    await until_started(group)
    before = group.pids
    async with asyncio.timeout(10):
        while min(rounds, merges) <= 2 * SILENT_ROUNDS:
            await asyncio.sleep(0.005)
    assert group.pids == before
    group.stop()
    await asyncio.wait_for(running, 10)


async def test_rounds_of_metrics_that_take_long_come_seldom(
    group: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    took_s, pauses = [0.001, 1.8, 60.0], []

    async def stopped_within(limit_s: float) -> bool:
        pauses.append(limit_s)
        return not took_s

    monkeypatch.setattr(group, "_stopped_within", stopped_within)
    monkeypatch.setattr(group.merged, "refresh", lambda: group._clock.advance(took_s.pop(0)))
    await asyncio.wait_for(group._refresh(), 5)
    assert pauses == [2.0, 2.0, pytest.approx(16.2), 30.0]


async def test_a_child_is_this_package_whatever_the_folder_holds(tmp_path: Path) -> None:
    (tmp_path / "cluster.py").write_text("raise RuntimeError('not this one')")
    child = await asyncio.create_subprocess_exec(
        *process_group.CHILD,
        cwd=tmp_path,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await asyncio.wait_for(child.communicate(), 60)
    assert b"not this one" not in said
