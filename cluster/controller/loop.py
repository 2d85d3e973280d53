"""Observe, reconcile, act: the controller's event loop around its pure decisions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, replace
from functools import partial

from cluster.config.schema import ControllerConfig, ModelConfig
from cluster.controller.actions import Advance, Fence, Remove, Start
from cluster.controller.actuator import Actuator, Explanation, ModelPlanner, StartOrder, Talk
from cluster.controller.attendance import Attendance
from cluster.controller.cluster_status import ProcessFacts, cluster_status
from cluster.controller.desired import Desired, DesiredModel, asks_the_same, find_model, require_names_differ
from cluster.controller.endpoints import first_epoch, next_table
from cluster.controller.fleet import Fleet, SlotRecord, Transition
from cluster.controller.node_drain import Errands, NodeDrains
from cluster.controller.observed import Report
from cluster.controller.ports import SPARE, PortRange
from cluster.controller.reconcile import reconcile
from cluster.controller.rendezvous import ports_needed
from cluster.controller.replica_lifecycle import ReplicaEvent
from cluster.controller.replica_series import ReplicaSeries
from cluster.controller.store import Store, StoredState
from cluster.domain.clock import Clock
from cluster.domain.endpoint import EndpointTable
from cluster.domain.errors import ClusterError, ConfigError, ReplicaError
from cluster.domain.ids import Incarnation, RankId, ReplicaId
from cluster.domain.replica import ReplicaPhase
from cluster.telemetry.logs import Logger
from cluster.telemetry.metrics import ControllerMetrics
from cluster.v1 import control_pb2

ADOPT_S = 3.0
# After the drain's own deadline: killing, giving back, sweeping.
SHUTDOWN_MARGIN_S = 90.0
# A node that does not answer is swept later, with pauses that double.
SWEEP_RETRY_S = 5.0
SWEEP_RETRY_MAX_S = 60.0


@dataclass(frozen=True, slots=True)
class Parts:
    """What the loop is composed of. ``run_dir`` state survives in ``store``."""

    cluster_name: str
    settings: ControllerConfig
    store: Store
    actuator: Actuator
    planner: ModelPlanner
    clock: Clock
    metrics: ControllerMetrics
    log: Logger


class ControllerLoop:
    """Owns desired state, fleet and endpoint table. Everything runs on one event loop.

    ``control_address`` (HOST:PORT as ranks reach it) and ``process`` (this one) are known once the server is bound.
    """

    def __init__(self, parts: Parts, state: StoredState) -> None:
        self._parts = parts
        self._settings = parts.settings
        self._state = state
        self._desired: Desired = state.desired
        self._ports = PortRange(*parts.settings.rank_ports, state.port_cursor)
        adopt_s = ADOPT_S if state.slots and state.desired else 0.0
        now_s = parts.clock.now()
        self._fleet = Fleet(parts.settings, state.slots, now_s, adopt_s, self._on_transition)
        self._table = EndpointTable(first_epoch(state.life), state_id=state.state_id)
        self._table_changed = asyncio.Event()
        self._wake = asyncio.Event()
        errands = Errands(self._wake.set, self._spawn, self._save)
        self._node_drains = NodeDrains(self._fleet, parts.actuator, parts.clock, parts.log, errands)
        self._tasks: set[asyncio.Task[None]] = set()
        self.attendance = Attendance()
        self._changing = asyncio.Lock()
        self._saving = asyncio.Lock()
        self._series = ReplicaSeries(parts.metrics)
        self._settled = False
        self._stopping = False
        self.control_address = ""
        self.process: ProcessFacts | None = None

    # ---- the loop ----

    async def run(self) -> None:
        """Until cancelled."""
        self._node_drains.resume(self._state.draining)
        while True:
            began_s = self._parts.clock.now()
            self._wake.clear()  # before the pass: what happens during it asks for another one
            try:
                await self._pass()
            except (ClusterError, OSError) as error:
                self._parts.log.warning("reconcile_failed", caused_by=str(error))
            self._parts.metrics.reconcile_seconds.observe(self._parts.clock.now() - began_s)
            try:
                # Not wait_for: Python 3.11's forgets a cancellation that meets a wake-up.
                async with asyncio.timeout(self._settings.reconcile_interval_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _pass(self) -> None:
        actions = reconcile(self._desired, self._fleet.observed(), self._settings, self._parts.clock.now())
        for action in actions:  # starts last: they wait for the disk, and nothing else shall have changed meanwhile
            if not isinstance(action, Start):
                self._carry_out(action)
        for action in actions:
            if isinstance(action, Start):
                await self._start(action)
        if not self._settled and self._adoption_is_over():
            self._settled = True
            self._announce()
            self._spawn(self._sweep_remains())
        self._publish()

    async def _sweep_remains(self) -> None:
        """What earlier lives left on any node; until every node that lives has been swept, or we shut down."""
        newest = frozenset(Incarnation(slot, record.generation) for slot, record in self._fleet.slots().items())
        pause_s = SWEEP_RETRY_S
        while not self._stopping:
            try:
                await self._parts.actuator.sweep(self._fleet.live(), newest)
            except ClusterError as error:
                self._parts.log.warning("sweep_failed", caused_by=str(error), again_in_s=pause_s)
            else:
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, SWEEP_RETRY_MAX_S)

    def _adoption_is_over(self) -> bool:
        """Time is up, or every replica that is wanted has been found ready."""
        observed = self._fleet.observed()
        ready = sum(view.phase is ReplicaPhase.READY for view in observed.replicas)
        all_ready = bool(self._desired) and ready >= sum(model.replicas for model in self._desired)
        return all_ready or self._parts.clock.now() >= observed.adopt_until_s

    def _carry_out(self, action: Advance | Remove | Fence) -> None:
        now_s = self._parts.clock.now()
        match action:
            case Advance():
                self._fleet.advance(action.incarnation, action.event, action.reason, now_s, action.drain_s)
                self._wake.set()
            case Remove():
                view = self._fleet.view(action.incarnation)
                self._fleet.removing(action.incarnation)
                self._spawn(self._remove(action.incarnation, len(view.ranks) if view else 1))
            case Fence():
                self._fleet.fencing(action.incarnation, now_s)
                self._parts.log.warning(
                    "fenced", incarnation=str(action.incarnation), caused_by="it is not its slot's current generation"
                )
                self._spawn(self._remove(action.incarnation, action.world_size))

    async def _start(self, action: Start) -> None:
        """Makes the generation durable before anything acts on it: none is ever used twice."""
        incarnation = action.incarnation
        model = find_model(self._desired, incarnation.replica.model)
        if model is None:
            return  # no longer wanted: the disk was slow
        candidates, ports = self._ports.take(ports_needed(model.layout) + SPARE)
        world_size = model.layout.world_size
        record = SlotRecord(incarnation.generation, model.fingerprint, world_size)
        try:
            await self._save(
                lambda state: replace(
                    state, slots={**state.slots, incarnation.replica: record}, port_cursor=ports.cursor
                )
            )
        except OSError as error:
            self._parts.log.warning("state_not_saved", incarnation=str(incarnation), caused_by=str(error))
            return  # nothing has happened; the next pass asks again
        if self._stopping:
            return
        self._ports = ports
        self._fleet.start(incarnation, model.fingerprint, world_size, action.reason, self._parts.clock.now())
        total = sum(m.replicas * m.layout.world_size for m in self._desired if m.device is model.device)
        order = StartOrder(incarnation, model, candidates, self.control_address, total)
        self._parts.log.info("replica_start", incarnation=str(incarnation), caused_by=action.reason)
        self._spawn(self._bring_up(order))

    async def _bring_up(self, order: StartOrder) -> None:
        incarnation, actuator = order.incarnation, self._parts.actuator

        fleet = self._fleet
        talk = Talk(partial(fleet.note_blocked, incarnation), partial(fleet.note_placed, incarnation), fleet.draining)
        try:
            await actuator.start(order, talk)
        except Exception as error:  # boundary: whatever a start breaks on fails this replica only
            if not isinstance(error, ReplicaError):
                self._parts.log.exception("start_broke", incarnation=str(incarnation))
            self._advance(incarnation, ReplicaEvent.FAIL, f"start: {error}")
            return
        view = self._fleet.view(incarnation)
        if view is None or view.phase is not ReplicaPhase.PENDING:
            return
        self._advance(incarnation, ReplicaEvent.PLACED, "ranks started")
        self._advance(incarnation, ReplicaEvent.FAIL, await actuator.watch(incarnation))

    async def _remove(self, incarnation: Incarnation, world_size: int) -> None:
        gone = True
        try:
            await self._parts.actuator.destroy(incarnation, world_size)
        except Exception as error:  # boundary: a slot whose removal broke is tried again, not blocked for ever
            gone = False
            self._parts.log.warning("removal_failed", incarnation=str(incarnation), caused_by=repr(error))
        self._fleet.removed(incarnation, self._parts.clock.now(), gone=gone)
        self._wake.set()

    def _advance(self, incarnation: Incarnation, event: ReplicaEvent, reason: str) -> None:
        self._fleet.advance(incarnation, event, reason, self._parts.clock.now())
        self._wake.set()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except Exception:  # boundary: a bug in one replica's task must not end the others' controller
            self._parts.log.exception("task_failed")

    def _on_transition(self, step: Transition) -> None:
        failed = step.event is ReplicaEvent.FAIL
        label = step.reason.partition(":")[0] if failed else step.event.value
        self._parts.metrics.transitions.labels(step.before.value, step.after.value, label).inc()
        write = self._parts.log.error if failed else self._parts.log.info
        story = {"story": step.story} if failed else {}
        write(
            "replica_transition",
            replica=str(step.incarnation.replica),
            generation=step.incarnation.generation,
            before=step.before.value,
            after=step.after.value,
            caused_by=step.reason,
            **story,
        )

    async def _save(self, change: Callable[[StoredState], StoredState]) -> None:
        """Writes the state that ``change`` makes of the last one. Elsewhere, for this thread must hear its ranks."""
        async with self._saving:
            state = change(self._state)
            await asyncio.to_thread(self._parts.store.save, state)
            self._state = state

    def _publish(self) -> None:
        """A new table to whoever watches, if it changed; gauges."""
        observed = self._fleet.observed()
        table = next_table(self._table, self._desired, observed)
        if table is not self._table:
            self._table = table
            self._announce()
        self._series.follow(self._desired, observed, self._parts.clock.now())

    def _announce(self) -> None:
        """Wakes whoever watches; those who come later wait for the next time."""
        self._table_changed.set()
        self._table_changed = asyncio.Event()

    # ---- what operators ask ----

    async def apply(self, configs: tuple[ModelConfig, ...]) -> Desired:
        """Replaces the desired state once every model is checked and planned; nothing changes before that."""
        self._refuse_while_stopping()
        require_names_differ(configs)
        async with self._changing:
            kept = tuple(m.scaled(c.replicas) for c in configs for m in self._desired if asks_the_same(m.config, c))
            planned: dict[str, DesiredModel] = {model.name: model for model in kept}
            for config in configs:
                if config.name not in planned:
                    planned[config.name] = await self._parts.planner.plan(config, tuple(planned.values()))
            self._refuse_while_stopping()
            await self._set_desired(tuple(planned[config.name] for config in configs), "apply")
            self._fleet.end_pauses(planned)
        return self._desired

    async def scale(self, name: str, replicas: int) -> None:
        self._refuse_while_stopping()
        async with self._changing:
            model = find_model(self._desired, name)
            if model is None:
                known = ", ".join(m.name for m in self._desired) or "none"
                raise ConfigError(f"No model is called {name!r}; served are: {known}.")
            self._refuse_while_stopping()
            changed = tuple(m.scaled(replicas) if m.name == name else m for m in self._desired)
            await self._set_desired(changed, f"scale {name} to {replicas}")

    async def drain(self, replica: ReplicaId, deadline_s: float) -> None:
        """Takes a ready replica out of service; it is replaced once its streams have ended."""
        view = next((v for v in self._fleet.observed().replicas if v.replica == replica), None)
        if view is None or view.phase is not ReplicaPhase.READY:
            phase = view.phase.value if view else "unknown"
            raise ConfigError(f"Replica {replica} is {phase}; only a READY one can be drained (llm-cluster status).")
        now_s = self._parts.clock.now()
        self._fleet.advance(view.incarnation, ReplicaEvent.DRAIN, "an operator asked for it", now_s, deadline_s)
        self._publish()
        self._wake.set()

    async def drain_node(self, host: str, deadline_s: float) -> None:
        """Returns when no rank is left on the node at ``host``; also while everything shuts down, which empties it."""
        await self._node_drains.drain(host, deadline_s)

    async def explain(self, config: ModelConfig) -> Explanation:
        kept = tuple(model for model in self._desired if model.name != config.name)
        return await self._parts.planner.explain(config, kept)

    async def shutdown(self, drain_deadline_s: float) -> None:
        """Drains and removes everything; returns when nothing is left, ReplicaError when that takes too long."""
        self._stopping = True  # an apply that is still planning will find this and change nothing
        now_s = self._parts.clock.now()
        self._fleet.end_by(now_s + drain_deadline_s)
        for view in self._fleet.observed().replicas:
            if view.phase is ReplicaPhase.READY:
                self._fleet.advance(view.incarnation, ReplicaEvent.DRAIN, "shutdown", now_s, drain_deadline_s)
        await self._want_nothing()
        give_up_s = now_s + drain_deadline_s + SHUTDOWN_MARGIN_S
        while self._fleet.observed().replicas or self._fleet.observed().stale or not self._settled:
            if self._parts.clock.now() > give_up_s:
                left = ", ".join(str(view.incarnation) for view in self._fleet.observed().replicas)
                raise ReplicaError(f"Something is left after the shutdown: {left}; see the controller's log.")
            await asyncio.sleep(0.05)
        await self._parts.actuator.sweep(frozenset())

    async def _want_nothing(self) -> None:
        """As desired from now on; a full disk must not keep a cluster from being stopped."""
        self._want((), "shutdown")
        try:
            await self._save(lambda state: replace(state, desired=(), draining={}))
        except OSError as error:
            self._parts.log.warning("state_not_saved", caused_by=str(error))

    def status(self) -> control_pb2.ClusterStatus:
        processes = [self.process] if self.process else []
        return cluster_status(
            self._parts.cluster_name,
            self._table.epoch,
            self._desired,
            self._fleet.observed(),
            [*processes, *self.attendance.processes],
            self._parts.clock.now(),
        )

    def _refuse_while_stopping(self) -> None:
        if self._stopping:
            raise ReplicaError("The cluster is shutting down; start it again with llm-cluster serve.")

    async def _set_desired(self, desired: Desired, cause: str) -> None:
        """ReplicaError, and nothing changed, when it cannot be made durable."""
        try:
            await self._save(lambda state: replace(state, desired=desired))
        except OSError as error:
            raise ReplicaError(f"The controller's state cannot be saved: {error}; make room and try again.") from error
        self._refuse_while_stopping()
        self._want(desired, cause)

    def _want(self, desired: Desired, cause: str) -> None:
        self._desired = desired
        models = {model.name: model.replicas for model in desired}
        self._parts.log.info("desired_changed", models=models, caused_by=cause)
        self._publish()
        self._wake.set()

    # ---- what ranks and routers bring ----

    def take_report(self, report: Report, stream: object) -> None:
        """One report. A change that matters is acted on at once."""
        view = self._fleet.view(report.rank_id.incarnation)
        last = view.ranks[report.rank_id.rank] if view and report.rank_id.rank < len(view.ranks) else None
        self._fleet.report(report, stream, self._parts.clock.now())
        if last is None or last.report.phase is not report.phase:
            self._wake.set()

    def rank_stream_ended(self, rank_id: RankId, stream: object) -> None:
        if self._fleet.stream_broken(rank_id, stream):
            self._parts.log.warning("rank_stream_broken", rank=str(rank_id), caused_by="its process or network ended")
            self._wake.set()

    async def watch_endpoints(self, router: ProcessFacts) -> AsyncGenerator[EndpointTable, None]:
        """The table now, and every later one; while it is read the router counts as a process of the cluster.

        A restarted controller says nothing before it has found the replicas that live: routers keep what they have.
        """
        sent: EndpointTable | None = None
        with self.attendance.present(router):
            while True:
                while not self._settled or self._table is sent:
                    await self._table_changed.wait()
                sent = self._table
                yield sent
