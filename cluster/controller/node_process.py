"""One machine as a node of the cluster: joins the head, tells how it is, ends when it is no node any more."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from cluster.client.presence import Presence
from cluster.controller import ray_start
from cluster.controller.node_health import NodeHealth
from cluster.controller.node_options import NodeOptions
from cluster.controller.ray_head import cluster_id, must_end
from cluster.controller.ray_token import take_token
from cluster.domain.clock import Clock
from cluster.domain.errors import ReplicaError
from cluster.telemetry.exposition import MetricsServer, new_registry
from cluster.telemetry.metrics import NodeMetrics
from cluster.v1 import control_pb2

LOOK_S = 1.0
# A head may still be starting when its nodes are; theirs is the shorter way.
HEAD_WAIT_S = 300.0


class NodeProcess:
    """A node under ``run_dir``, which the caller holds. ``say`` hears what it waits for."""

    def __init__(self, options: NodeOptions, run_dir: Path, clock: Clock, say: Callable[[str], None]) -> None:
        self._options, self._run_dir, self._clock, self._say = options, run_dir, clock, say
        self._node: ray_start.RayNode | None = None
        self._registry = new_registry()
        metrics = NodeMetrics(self._registry)
        self._health = NodeHealth(run_dir, clock, options.idle_after_s, metrics, self._is_joined)

    def run(self, interrupted: threading.Event, started: Callable[[dict[str, int]], None]) -> None:
        """Until ``interrupted``; ``started`` hears the ports once the node has joined.

        ConfigError when it cannot join, ReplicaError when the node ends by itself or its head is another one.
        """
        ray_start.require_reachable(self._options.address)
        with ExitStack() as stack:
            port = stack.enter_context(self._listening())
            token = take_token(self._options.token_file, self._run_dir, self._options.address)
            head = self._wait_for_head(token, interrupted)
            if head is None:
                return
            options = self._options
            self._node = ray_start.start_worker(
                options.address,
                self._run_dir,
                host=options.host,
                num_cpus=options.num_cpus,
                num_gpus=options.num_gpus,
            )
            try:
                stack.enter_context(self._announced(port))
                started({"metrics": port})
                while not interrupted.wait(LOOK_S):
                    self._health.look()
                    self._require_well(head, token)
            finally:
                self._node = None
                ray_start.stop_node(self._run_dir)

    @contextmanager
    def _listening(self) -> Iterator[int]:
        """Before it joins: its probes are asked from the first second on."""
        options, health = self._options, self._health
        server = MetricsServer(self._registry, options.host, options.metrics_port, health.ready, health.routes())
        try:
            yield server.port
        finally:
            server.close()

    @contextmanager
    def _announced(self, port: int) -> Iterator[None]:
        """In the controller's status and targets, where its address was given."""
        options = self._options
        if not options.controller:
            yield
            return
        facts = control_pb2.ProcessStatus(kind="worker", pid=os.getpid(), node=options.host, ports={"metrics": port})
        with closing(Presence(options.controller, facts)):
            yield

    def _is_joined(self) -> bool:
        node = self._node
        return node is not None and ray_start.is_alive(node)

    def _wait_for_head(self, token: str, interrupted: threading.Event) -> str | None:
        """The id of the cluster behind the address; None when interrupted first."""
        address, give_up_s, told = self._options.address, self._clock.now() + HEAD_WAIT_S, False
        while (found := cluster_id(address, token)) is None:
            if self._clock.now() > give_up_s:
                raise ReplicaError(
                    f"No Ray head has answered at {address} for {HEAD_WAIT_S:.0f} s; give the HOST:PORT of the "
                    "running controller's Ray."
                )
            if not told:
                self._say(f"Waiting for the head at {address}.")
                told = True
            if interrupted.wait(LOOK_S):
                return None
        return found

    def _require_well(self, head: str, token: str) -> None:
        if not self._is_joined():
            raise ReplicaError("A process of this Ray node has ended; its logs are in Ray's folder.")
        if must_end(head, cluster_id(self._options.address, token)):
            raise ReplicaError(
                f"The head at {self._options.address} was started again and does not know this node; "
                "start the worker again to join it."
            )
