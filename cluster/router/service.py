"""The router's process: everything built, run until told to stop, drained."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import socket
import uuid
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from cluster.config.schema import LOOPBACK, RouterConfig
from cluster.domain.clock import Clock, MonotonicClock
from cluster.router.fleet import Fleet
from cluster.router.fleet_health import FleetHealth
from cluster.router.fleet_series import FleetSeries
from cluster.router.health import Health
from cluster.router.inference_service import add_inference
from cluster.router.listener import Listener
from cluster.router.loop_beat import LoopBeat
from cluster.router.policy.profiles import PROFILES
from cluster.router.prefix_series import PrefixSeries
from cluster.router.server import InferenceServer
from cluster.router.session import SessionSettings
from cluster.router.surroundings import Surroundings
from cluster.router.tokenizer_cache import TokenizerCache
from cluster.router.watch import EndpointWatch
from cluster.telemetry.exposition import MetricsServer, Page, new_registry
from cluster.telemetry.logs import Logger, get_logger
from cluster.telemetry.metrics import RouterMetrics
from cluster.v1 import control_pb2

STOP_GRACE_S = 0.5
GC_ALLOCATIONS = 20_000  # more made than freed, before the youngest objects are looked at
ANY_HOST = ("", "0.0.0.0", "::")  # noqa: S104 - compared with, not bound to


@dataclass(frozen=True, slots=True)
class OneOfSeveral:
    """A router process that shares its port, which somebody holds by ``reserve_port``.

    It listens as soon as it has a ready endpoint, at the latest after ``ready_wait_s``: the kernel gives it
    connections from then on, while others could serve them. Its metrics are for whoever merges them, on loopback.
    """

    ready_wait_s: float


@dataclass(frozen=True, slots=True)
class RunningRouter:
    """A router that serves: its ports by name ("grpc", "metrics"), and the ways to stop it.

    ``leave_port`` stops and gives up the port at once, for those who come after: streams go on as when draining.
    """

    router_id: str
    pid: int
    ports: Mapping[str, int]
    fleet: Fleet
    server: InferenceServer
    stop: Callable[[], None]
    leave_port: Callable[[], None]

    @property
    def ready_line(self) -> Mapping[str, object]:
        """What the process prints when it listens."""
        return {"kind": "router", "pid": self.pid, "ports": dict(self.ports)}


async def serve_router(
    config: RouterConfig,
    controller_address: str,
    *,
    state_file: Path | None = None,
    log: Logger | None = None,
    started: Callable[[RunningRouter], None] = lambda _: None,
    clock: Clock | None = None,
    one_of: OneOfSeveral | None = None,
) -> int:
    """Serves until SIGTERM, SIGINT or ``stop``; then drains and returns the exit code, 0.

    ``started`` is called when it listens; /healthz says whether the event loop runs. PortTakenError when a port is not
    to be had. ``one_of``: it shares ``config.port`` with other processes.
    """
    log = log or get_logger()
    router_id = str(uuid.uuid4())
    stopping = asyncio.Event()
    async with AsyncExitStack() as exits:
        registry = new_registry()
        listener = Listener(client_stall_s=config.client_stall_s, shared=one_of is not None)
        exits.push_async_callback(listener.stop, STOP_GRACE_S)
        metrics = RouterMetrics(registry)
        parts = _build(config, router_id, listener, metrics, stopping, exits, log, clock or MonotonicClock())
        fleet, server, health = parts.fleet, parts.server, parts.health
        port = config.port if one_of else listener.bind(config.host, config.port)
        metrics_host = LOOPBACK if one_of else config.host
        routes = {"/healthz": _beat_of_loop(exits, clock or MonotonicClock())}
        metrics_server = MetricsServer(registry, metrics_host, config.metrics_port, lambda: health.ready, routes)
        exits.push_async_callback(asyncio.to_thread, metrics_server.close)
        if one_of is None:
            await listener.start()
        ports = {"grpc": port, "metrics": metrics_server.port}
        introduction = control_pb2.WatchEndpointsRequest(
            router_id=router_id, pid=os.getpid(), node=node_of(config.host), ports={"grpc": port} if one_of else ports
        )
        watch = EndpointWatch(controller_address, introduction, fleet.apply, state_file, log)
        exits.push_async_callback(watch.close)
        _stop_on_signals(stopping, exits)
        if one_of is not None:
            await _until_ready(fleet, stopping, one_of.ready_wait_s)
            listener.bind(config.host, config.port)
            await listener.start()

        def leave_port() -> None:
            listener.leave_port(config.drain_deadline_s + STOP_GRACE_S)
            stopping.set()

        metrics.processes.set(1)
        log.info("router_started", router_id=router_id, ports=ports)
        started(RunningRouter(router_id, os.getpid(), ports, fleet, server, stopping.set, leave_port))
        await stopping.wait()
        log.info("router_draining", requests=server.active_requests)
        parts.publish_readiness()
        await health.settle()  # readiness goes first, then requests are refused
        await server.drain(config.drain_deadline_s)
    log.info("router_stopped", router_id=router_id)
    return 0


def _beat_of_loop(exits: AsyncExitStack, clock: Clock) -> Callable[[], Page]:
    beat = LoopBeat(clock)
    exits.callback(beat.close)
    return beat.page


@dataclass(frozen=True, slots=True)
class _Parts:
    fleet: Fleet
    server: InferenceServer
    health: Health
    publish_readiness: Callable[[], None]


def _build(
    config: RouterConfig,
    router_id: str,
    listener: Listener,
    metrics: RouterMetrics,
    stopping: asyncio.Event,
    exits: AsyncExitStack,
    log: Logger,
    clock: Clock,
) -> _Parts:
    """Everything between the listener and the engines; ``exits`` take it down."""
    tokenizers = TokenizerCache(clock=clock)
    exits.callback(tokenizers.close)
    health = Health(listener.server)
    exits.push_async_callback(health.close)

    def publish_readiness() -> None:
        health.set_ready(ready=fleet.ready and not stopping.is_set())
        series.follow({model: fleet.ready_replicas(model) for model in fleet.models}, fleet.replicas)

    rng = random.Random(router_id)  # noqa: S311 - routers break ties and draw lots differently, that is all
    fleet_health = FleetHealth(clock, metrics, rng=rng)
    settings = SessionSettings(
        router_id, config.engine_silence_s, config.engine_step_deadline_s, tokenizers, fleet_health,
        config.max_index_blocks, PrefixSeries(metrics).observe,
    )  # fmt: skip
    fleet = Fleet(settings, log, publish_readiness, rng, PROFILES[config.policy], clock=clock)
    exits.push_async_callback(fleet.close)
    series = FleetSeries(metrics, config)
    server = InferenceServer(Surroundings(fleet, config, metrics, clock), tokenizers, log)
    add_inference(server, listener.server)
    return _Parts(fleet, server, health, publish_readiness)


async def _until_ready(fleet: Fleet, stopping: asyncio.Event, limit_s: float) -> None:
    """Until some endpoint is ready, the router is to stop, or ``limit_s`` have passed."""

    async def ready() -> None:
        while not fleet.ready:
            await fleet.change()

    waits = [asyncio.ensure_future(ready()), asyncio.ensure_future(stopping.wait())]
    await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    await asyncio.wait(waits)


def node_of(host: str) -> str:
    """The address by which others know this machine; its name where the router listens on all of them."""
    return socket.gethostname() if host in ANY_HOST else host


def _stop_on_signals(stopping: asyncio.Event, exits: AsyncExitStack) -> None:
    """SIGTERM and SIGINT drain; not in a thread, where no signal arrives."""
    loop = asyncio.get_running_loop()
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
            exits.callback(loop.remove_signal_handler, number)
    except (ValueError, RuntimeError):
        return


def run_router(
    config: RouterConfig,
    controller_address: str,
    *,
    state_file: Path | None = None,
    started: Callable[[RunningRouter], None] = lambda _: None,
    one_of: OneOfSeveral | None = None,
) -> int:
    """``serve_router`` on an event loop of its own: what a router process calls."""
    import uvloop

    # Each text is tokenized by itself: the library's own threads would be woken for each, and have nothing to share.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # What was imported lives as long as the process: never looked at again. The rest is looked at less often, since
    # requests leave no cycles behind.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS)
    serving = serve_router(config, controller_address, state_file=state_file, started=started, one_of=one_of)
    return int(uvloop.run(serving))
