"""The controller's process: a named, detached, restartable Ray actor around an event loop of its own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config.listening import require_free
from cluster.config.schema import ClusterConfig
from cluster.controller.actuator import Actuator, ModelPlanner
from cluster.controller.attentive_clock import AttentiveClock, keep_ticking
from cluster.controller.checkpoint_planner import CheckpointPlanner
from cluster.controller.cluster_status import ProcessFacts
from cluster.controller.loop import ControllerLoop, Parts
from cluster.controller.node_outlook import OutlookActuator, OutlookEntry, OutlookPlanner
from cluster.controller.rank_actor import RANK_ENTRY, die_with_parent
from cluster.controller.rank_specs import ClusterFacts
from cluster.controller.ray_actuator import NAMESPACE, RayActuator
from cluster.controller.ray_observer import RayCalls, RayObserver
from cluster.controller.scrape_targets import PATH as TARGETS_PATH
from cluster.controller.scrape_targets import scrape_targets_json
from cluster.controller.server import ControlService
from cluster.controller.store import Store
from cluster.domain.clock import MonotonicClock
from cluster.domain.errors import ClusterError, PortTakenError, ReplicaError
from cluster.telemetry.exposition import MetricsServer, Page, new_registry
from cluster.telemetry.logs import configure_logs, get_logger
from cluster.telemetry.metrics import ControllerMetrics
from cluster.v1 import control_pb2, control_pb2_grpc
from cluster.wire.channel import bind, new_server

START_DEADLINE_S = 60.0
REBIND_DEADLINE_S = 10.0
TARGETS_DEADLINE_S = 5.0
_ANY_HOST = ("", "0.0.0.0", "::")  # noqa: S104 - compared with, not bound to


def controller_name(cluster_name: str) -> str:
    return f"llm-cluster-controller:{cluster_name}"


@dataclass(frozen=True, slots=True)
class ControllerFacts:
    """Where the controller's process is."""

    address: str
    pid: int
    metrics_port: int


class ControllerActor:
    """Everything happens in a thread; the actor's own methods serve start-up only."""

    def __init__(
        self, config: ClusterConfig, run_dir: str, entry: str = RANK_ENTRY, outlook: OutlookEntry | None = None
    ) -> None:
        die_with_parent()
        self._config = config
        self._run_dir = Path(run_dir)
        self._entry = entry
        self._outlook = outlook
        self._again = ray.get_runtime_context().was_current_actor_reconstructed
        self._started = threading.Event()
        self._clock = AttentiveClock(MonotonicClock())
        self._facts: ControllerFacts | None = None
        self._failure: Exception | None = None
        threading.Thread(target=self._run, name="controller", daemon=True).start()

    def ping(self) -> ControllerFacts:
        """Answers once Control listens; raises why it does not."""
        if not self._started.wait(START_DEADLINE_S):
            raise ReplicaError(f"The controller did not start within {START_DEADLINE_S:.0f} s; see its log.")
        if self._failure is not None:
            raise self._failure
        assert self._facts is not None
        return self._facts

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:  # boundary: the thread's end is the process's end
            get_logger().exception("controller_failed")
            self._failure = error if isinstance(error, ClusterError) else ReplicaError(repr(error))
            self._started.set()
            if self._again or self._facts is not None:
                os._exit(1)  # Ray starts it again

    async def _serve(self) -> None:
        config, settings = self._config, self._config.controller
        logs = self._run_dir / "logs"
        logs.mkdir(mode=0o700, parents=True, exist_ok=True)
        configure_logs("controller", logs / "controller.log")
        store = Store(self._run_dir)
        state = await asyncio.to_thread(store.begin_life)
        server = new_server()
        port = await self._bind(server, port_to_bind(settings.port, state.control_port, again=self._again))
        state = replace(state, control_port=port)
        await asyncio.to_thread(store.save, state)
        registry = new_registry()
        metrics = ControllerMetrics(registry)
        loop = self._compose(store, metrics, state)
        routes = {TARGETS_PATH: targets_page(loop.status, asyncio.get_running_loop())}
        exposition = MetricsServer(registry, settings.host, settings.metrics_port, routes=routes)
        host = ray.util.get_node_ip_address() if settings.host in _ANY_HOST else settings.host
        loop.control_address = f"{host}:{port}"
        loop.process = ProcessFacts("controller", os.getpid(), host, {"grpc": port, "metrics": exposition.port})
        ended = asyncio.Event()
        service = ControlService(loop, ended.set)
        control_pb2_grpc.add_ControlServicer_to_server(service, server)
        await server.start()
        self._facts = ControllerFacts(loop.control_address, os.getpid(), exposition.port)
        self._started.set()
        get_logger().info(
            "controller_started",
            address=loop.control_address,
            cluster=config.cluster_name,
            life=state.life,
            caused_by="it was restarted" if self._again else "it was started",
        )
        await self._until_ended(loop, ended)
        service.close()
        await server.stop(grace=1.0)
        exposition.close()
        ray.kill(ray.get_actor(controller_name(config.cluster_name), namespace=NAMESPACE), no_restart=True)

    def _compose(self, store: Store, metrics: ControllerMetrics, state: Any) -> ControllerLoop:
        config = self._config
        calls = RayCalls(lambda call: metrics.ray_calls.labels(call).inc())
        observer = RayObserver(calls)
        shared = ClusterFacts(config.cluster_name, str(self._run_dir), config.controller)
        actuator: Actuator = RayActuator(shared, observer, calls, self._entry)
        planner: ModelPlanner = CheckpointPlanner(observer.devices_for)
        outlook = self._outlook.load() if self._outlook else None
        if outlook is not None:
            actuator, planner = OutlookActuator(actuator, outlook), OutlookPlanner(planner, outlook)
        parts = Parts(
            cluster_name=config.cluster_name,
            settings=config.controller,
            store=store,
            actuator=actuator,
            planner=planner,
            clock=self._clock,
            metrics=metrics,
            log=get_logger(cluster=config.cluster_name),
        )
        return ControllerLoop(parts, state)

    async def _bind(self, server: Any, port: int) -> int:
        """A restarted controller must have its old port: whoever reports to it knows no other."""
        host = self._config.controller.host
        for _ in range(int(REBIND_DEADLINE_S / 0.2) if self._again else 0):
            try:
                return bind(server, host, port)
            except PortTakenError:
                await asyncio.sleep(0.2)
        return bind(server, host, port)

    async def _until_ended(self, loop: ControllerLoop, ended: asyncio.Event) -> None:
        running, end = asyncio.ensure_future(loop.run()), asyncio.ensure_future(ended.wait())
        ticking = asyncio.ensure_future(keep_ticking(self._clock))
        await asyncio.wait((running, end), return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()  # it never returns, so this raises what ended it
        running.cancel()
        ticking.cancel()


def targets_page(
    status: Callable[[], control_pb2.ClusterStatus], loop: asyncio.AbstractEventLoop
) -> Callable[[], Page]:
    """Where Prometheus scrapes, for a thread of the metrics server; ``status`` is asked on ``loop``, which owns it."""

    async def ask() -> control_pb2.ClusterStatus:
        return status()

    def page() -> Page:
        asked = asyncio.run_coroutine_threadsafe(ask(), loop)
        try:
            return Page(200, scrape_targets_json(asked.result(TARGETS_DEADLINE_S)), "application/json")
        except TimeoutError:  # whoever asks keeps the targets it has
            asked.cancel()
            return Page(503, b"the controller is busy; ask again\n")

    return page


def port_to_bind(configured: int, stored: int, *, again: bool) -> int:
    """0 for any. Who reports to a controller that died knows its old port only; a new cluster's may be any."""
    return configured or (stored if again else 0)


def start_controller(
    config: ClusterConfig, run_dir: Path, entry: str = RANK_ENTRY, outlook: OutlookEntry | None = None
) -> str:
    """The Control address (HOST:PORT) of the cluster's controller, started if there is none. Ray is connected.

    ``outlook``: who knows why nodes are missing; made in the controller's process.
    PortTakenError, ConfigError or ReplicaError when it cannot be started.
    """
    address = find_controller(config.cluster_name)
    if address is not None:
        return address
    require_free(config.controller.host, config.controller.port, "controller port")
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = (
        ray.remote(ControllerActor)
        .options(
            name=controller_name(config.cluster_name),
            namespace=NAMESPACE,
            lifetime="detached",
            max_restarts=-1,
            max_concurrency=4,
            num_cpus=0,
            scheduling_strategy=here,  # beside its state
        )
        .remote(config, str(run_dir.resolve()), entry, outlook)
    )
    try:
        return _ping(actor).address
    except ClusterError:
        ray.kill(actor, no_restart=True)
        raise


def find_controller(cluster_name: str) -> str | None:
    """The Control address of a living controller of that name in the connected Ray cluster."""
    try:
        actor = ray.get_actor(controller_name(cluster_name), namespace=NAMESPACE)
    except ValueError:  # Ray's word for "no such actor"
        return None
    return _ping(actor).address


def end_controller(cluster_name: str) -> None:
    """Kills the controller's actor, if there is one, without asking it. Ray is connected."""
    try:
        ray.kill(ray.get_actor(controller_name(cluster_name), namespace=NAMESPACE), no_restart=True)
    except ValueError:  # Ray's word for "no such actor"
        return


def _ping(actor: Any) -> ControllerFacts:
    try:
        facts: ControllerFacts = ray.get(actor.ping.remote(), timeout=START_DEADLINE_S)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, ClusterError) else ReplicaError(str(cause)) from error
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise ReplicaError(f"The controller does not answer ({error}); see its log, or stop the cluster.") from error
    return facts
