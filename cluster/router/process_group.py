"""A router of several processes: the parent that starts them, starts them again, shows their metrics, ends them.

A child that does not say that its event loop runs, several times in a row, is killed: stopped or stuck, it keeps its
connections and serves nobody. How long its metrics take is no sign of that.

The parent holds the port and serves /metrics, /healthz and /readyz; requests never pass through it. Its children end
themselves when it dies.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Collection, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.client.presence import Presence
from cluster.config.listening import reserve_port
from cluster.config.schema import RouterConfig
from cluster.domain.clock import Clock, MonotonicClock
from cluster.domain.errors import ReplicaError
from cluster.router.loop_beat import LoopBeat
from cluster.router.process_order import ProcessAnswer, ProcessOrder
from cluster.router.respawn import Respawn, Silence
from cluster.router.service import node_of
from cluster.telemetry.exposition import MetricsServer, new_registry
from cluster.telemetry.logs import Logger, get_logger
from cluster.telemetry.merged_exposition import MergedProcesses
from cluster.telemetry.metrics import ALIKE_IN_PROCESSES, RouterMetrics
from cluster.v1 import control_pb2

START_DEADLINE_S = 45.0
# A process listens when it has an endpoint, at the latest after this: at first, and started again.
JOIN_WAIT_S, REJOIN_WAIT_S = 2.0, 5.0
END_MARGIN_S = 5.0  # beyond drain_deadline_s, before a child is killed
ROLL_CALL_S = 2.0  # between two rounds of asking who lives
# Between two rounds of asking for metrics: what a child has counted is lost with it for so long at most. Where pages
# are so large that a round takes long, it pauses some times as long: making them costs a child's clients time.
REFRESH_S, REFRESH_PAUSES, REFRESH_MOST_S = 2.0, 9.0, 30.0
CHILD = (sys.executable, "-P", "-m", "cluster.router.one_process")  # -P: not what is called "cluster" in our folder


@dataclass(frozen=True, slots=True)
class RunningProcesses:
    """A router whose processes serve: the parent's pid, the ports by name ("grpc", "metrics"), the way to stop it."""

    pid: int
    ports: Mapping[str, int]
    children: Callable[[], tuple[int, ...]]
    stop: Callable[[], None]

    @property
    def ready_line(self) -> Mapping[str, object]:
        """What the process prints when it listens."""
        return {"kind": "router", "pid": self.pid, "ports": dict(self.ports)}


class ProcessGroup:
    """``config.processes`` children on one port. ``run`` once; ``stop`` drains them."""

    def __init__(self, order: ProcessOrder, log: Logger, clock: Clock) -> None:
        """``order``: the one for every child, whose index is filled in here."""
        self._order, self._log, self._clock = order, log, clock
        self._stopping = asyncio.Event()
        self._children: dict[int, Process] = {}
        self._silences: dict[int, Silence] = {}
        own = new_registry()
        self._metrics = RouterMetrics(own)
        self.merged = MergedProcesses(own, ALIKE_IN_PROCESSES, clock)

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(child.pid for child in self._children.values())

    def stop(self) -> None:
        self._stopping.set()

    def ready(self) -> bool:
        """Whether some child is ready and none was told to end; any thread may ask."""
        return not self._stopping.is_set() and self.merged.ready()

    async def start(self) -> None:
        """Returns when every child listens; ReplicaError when one does not, and all are ended."""
        try:
            await asyncio.gather(*(self._spawn(replace(self._order, index=i)) for i in range(self.size)))
        except BaseException:
            await self._end(0.0)
            raise

    @property
    def size(self) -> int:
        return self._order.config.processes

    async def run(self) -> None:
        """Keeps every child alive until ``stop``, then drains them all at once."""
        keepers = [asyncio.create_task(self._keep(index)) for index in range(self.size)]
        keepers += [asyncio.create_task(self._refresh()), asyncio.create_task(self._call_roll())]
        await self._stopping.wait()
        self._log.info("router_draining", processes=len(self._children))
        await self._end(self._order.config.drain_deadline_s + END_MARGIN_S)
        await asyncio.wait(keepers)

    async def _keep(self, index: int) -> None:
        respawn, born_s = Respawn(), self._clock.now()
        while True:
            child = self._children.get(index)
            if child is not None:
                code = await child.wait()
                await self._left(index)
                if self._stopping.is_set():
                    return
                self._log.error("router_process_died", index=index, pid=child.pid, code=code)
            if await self._stopped_within(respawn.pause_after_s(self._clock.now() - born_s)):
                return
            born_s = self._clock.now()
            self._metrics.process_restarts.inc()
            try:
                await self._spawn(replace(self._order, index=index, ready_wait_s=REJOIN_WAIT_S))
            except ReplicaError as error:
                self._log.error("router_process_not_started", index=index, caused_by=str(error))

    async def _spawn(self, order: ProcessOrder) -> None:
        """ReplicaError when no process could be started, or it does not serve."""
        try:
            child = await asyncio.create_subprocess_exec(*CHILD, stdin=PIPE, stdout=PIPE)
        except OSError as error:  # no memory, process or file descriptor left: perhaps later
            raise ReplicaError(f"A router process did not start: {error}") from error
        self._children[order.index] = child
        if self._stopping.is_set():  # it was not there yet when all were told to end
            child.terminate()
        assert child.stdin is not None and child.stdout is not None  # noqa: PT018 - asked for
        child.stdin.write(order.to_line())
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                answer = ProcessAnswer.from_line(await child.stdout.readline())
        except TimeoutError:
            answer = ProcessAnswer(child.pid, {}, f"it did not listen within {START_DEADLINE_S:g} s")
        except (ValueError, TypeError):
            answer = ProcessAnswer(child.pid, {}, "the first line of its standard output is no answer")
        if answer is not None and not answer.error:
            self.merged.join(order.index, answer.ports["metrics"])
            self._log.info("router_process_started", index=order.index, pid=child.pid)
            return
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()
        del self._children[order.index]
        if not self._stopping.is_set():
            said = answer.error if answer else "it ended without a word"
            raise ReplicaError(f"A router process did not start: {said}")

    async def _left(self, index: int) -> None:
        del self._children[index]
        self._silences.pop(index, None)
        await asyncio.to_thread(self.merged.leave, index)

    async def _stopped_within(self, limit_s: float) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), limit_s)
        return self._stopping.is_set()

    async def _refresh(self) -> None:
        pause_s = REFRESH_S
        while not await self._stopped_within(pause_s):
            began_s = self._clock.now()
            try:
                await asyncio.to_thread(self.merged.refresh)
            except Exception:  # boundary: whatever a process shows, all are asked again
                self._log.exception("router_metrics_not_merged")
            pause_s = min(max(REFRESH_S, REFRESH_PAUSES * (self._clock.now() - began_s)), REFRESH_MOST_S)

    async def _call_roll(self) -> None:
        while not await self._stopped_within(ROLL_CALL_S):
            try:
                silent = await asyncio.to_thread(self.merged.silent)
            except Exception:  # boundary: whatever happens, all are asked again
                self._log.exception("router_processes_not_asked")
            else:
                self._end_silent(silent)

    def _end_silent(self, silent: Collection[object]) -> None:
        """SIGKILL, which stopped processes feel as well, for those that have been silent for too long."""
        self._silences = {i: self._silences.get(i, Silence()) for i in self._children}
        for index, silence in self._silences.items():
            if silence.asked(answered=index not in silent):
                self._log.error("router_process_silent", index=index, pid=self._children[index].pid)
                with suppress(ProcessLookupError):
                    self._children[index].kill()

    async def _end(self, limit_s: float) -> None:
        """SIGTERM for all; SIGKILL for those that live after ``limit_s``."""
        waits = []
        for child in self._children.values():
            with suppress(ProcessLookupError):
                child.terminate()
            waits.append(asyncio.create_task(child.wait()))
        if not waits:
            return
        await asyncio.wait(waits, timeout=limit_s)
        for child in self._children.values():
            if child.returncode is None:
                self._log.error("router_process_killed", pid=child.pid)
                with suppress(ProcessLookupError):
                    child.kill()
        await asyncio.wait(waits)


async def serve_processes(
    config: RouterConfig,
    controller_address: str,
    *,
    state_file: Path | None = None,
    log_file: Path | None = None,
    started: Callable[[RunningProcesses], None] = lambda _: None,
    clock: Clock | None = None,
) -> int:
    """``config.processes`` routers on one port until SIGTERM, SIGINT or ``stop``; then 0 when they have drained.

    ``started`` is called when all listen. PortTakenError when a port is not to be had, ReplicaError when a process
    does not start.
    """
    log = get_logger()
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as exits:
        reserved = exits.enter_context(reserve_port(config.host, config.port))
        port = int(reserved.getsockname()[1])
        order = ProcessOrder(
            config.model_copy(update={"port": port, "metrics_port": 0}), controller_address, 0, JOIN_WAIT_S,
            str(state_file or ""), str(log_file or ""),
        )  # fmt: skip
        group = ProcessGroup(order, log, clock or MonotonicClock())
        exits.callback(group.merged.close)
        beat = LoopBeat(clock or MonotonicClock())
        exits.callback(beat.close)
        routes = {"/healthz": beat.page}
        metrics_server = MetricsServer(group.merged.page, config.host, config.metrics_port, group.ready, routes)
        exits.push_async_callback(asyncio.to_thread, metrics_server.close)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, group.stop)
            exits.callback(loop.remove_signal_handler, number)
        await group.start()
        ports = {"grpc": port, "metrics": metrics_server.port}
        facts = control_pb2.ProcessStatus(kind="router", pid=os.getpid(), node=node_of(config.host), ports=ports)
        presence = Presence(controller_address, facts)
        exits.push_async_callback(asyncio.to_thread, presence.close)
        log.info("router_started", ports=ports, processes=group.pids)
        started(RunningProcesses(os.getpid(), ports, lambda: group.pids, group.stop))
        await group.run()
    log.info("router_stopped")
    return 0


def run_processes(
    config: RouterConfig,
    controller_address: str,
    *,
    state_file: Path | None = None,
    log_file: Path | None = None,
    started: Callable[[RunningProcesses], None] = lambda _: None,
) -> int:
    """``serve_processes`` on an event loop of its own."""
    serving = serve_processes(config, controller_address, state_file=state_file, log_file=log_file, started=started)
    return asyncio.run(serving)
