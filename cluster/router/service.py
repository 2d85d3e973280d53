"""The router's process: everything built, run until told to stop, drained."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import uuid
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from cluster.config.schema import RouterConfig
from cluster.domain.clock import Clock, MonotonicClock
from cluster.router.fleet import Fleet
from cluster.router.fleet_series import FleetSeries
from cluster.router.health import Health
from cluster.router.listener import Listener
from cluster.router.server import InferenceServer
from cluster.router.session import SessionSettings
from cluster.router.surroundings import Surroundings
from cluster.router.tokenization import TokenizerCache
from cluster.router.watch import EndpointWatch
from cluster.telemetry.exposition import MetricsServer, new_registry
from cluster.telemetry.logs import Logger, get_logger
from cluster.telemetry.metrics import RouterMetrics
from cluster.v1 import control_pb2, inference_pb2_grpc

STOP_GRACE_S = 0.5
ANY_HOST = ("", "0.0.0.0", "::")  # noqa: S104 - compared with, not bound to


@dataclass(frozen=True, slots=True)
class RunningRouter:
    """A router that serves: its ports by name ("grpc", "metrics"), and the way to stop it."""

    router_id: str
    pid: int
    ports: Mapping[str, int]
    fleet: Fleet
    server: InferenceServer
    stop: Callable[[], None]

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
) -> int:
    """Serves until SIGTERM, SIGINT or ``stop``; then drains and returns the exit code, 0.

    ``started`` is called when the ports are bound. PortTakenError when one is not to be had.
    """
    log = log or get_logger()
    router_id = str(uuid.uuid4())
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    async with AsyncExitStack() as exits:
        tokenizers = TokenizerCache()
        exits.callback(tokenizers.close)
        registry = new_registry()
        listener = Listener()
        exits.push_async_callback(listener.stop, STOP_GRACE_S)
        health = Health(listener.server)
        exits.push_async_callback(health.close)

        def publish_readiness() -> None:
            health.set_ready(ready=fleet.ready and not stopping.is_set())
            series.follow({model: fleet.ready_replicas(model) for model in fleet.models}, fleet.replicas)

        settings = SessionSettings(router_id, config.engine_silence_s, config.engine_step_deadline_s, tokenizers)
        rng = random.Random(router_id)  # noqa: S311 - routers break ties differently, that is all
        fleet = Fleet(settings, log, publish_readiness, rng)
        exits.push_async_callback(fleet.close)
        metrics = RouterMetrics(registry)
        series = FleetSeries(metrics, config)
        around = Surroundings(fleet, config, metrics, clock or MonotonicClock())
        server = InferenceServer(around, tokenizers, log)
        inference_pb2_grpc.add_InferenceServicer_to_server(server, listener.server)
        port = listener.bind(config.host, config.port)
        metrics_server = MetricsServer(registry, config.host, config.metrics_port, lambda: health.ready)
        exits.push_async_callback(asyncio.to_thread, metrics_server.close)
        await listener.start()
        ports = {"grpc": port, "metrics": metrics_server.port}
        introduction = control_pb2.WatchEndpointsRequest(
            router_id=router_id, pid=os.getpid(), node=_node(config.host), ports=ports
        )
        watch = EndpointWatch(controller_address, introduction, fleet.apply, state_file, log)
        exits.push_async_callback(watch.close)
        _stop_on_signals(loop, stopping, exits)
        log.info("router_started", router_id=router_id, ports=ports)
        started(RunningRouter(router_id, os.getpid(), ports, fleet, server, stopping.set))
        await stopping.wait()
        log.info("router_draining", requests=server.active_requests)
        publish_readiness()
        await server.drain(config.drain_deadline_s)
    log.info("router_stopped", router_id=router_id)
    return 0


def _node(host: str) -> str:
    """The address by which others know this machine; its name where the router listens on all of them."""
    return socket.gethostname() if host in ANY_HOST else host


def _stop_on_signals(loop: asyncio.AbstractEventLoop, stopping: asyncio.Event, exits: AsyncExitStack) -> None:
    """SIGTERM and SIGINT drain; not in a thread, where no signal arrives."""
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
) -> int:
    """``serve_router`` on an event loop of its own: what a router process calls."""
    import uvloop

    return int(uvloop.run(serve_router(config, controller_address, state_file=state_file, started=started)))
