"""The composition root: builds each process from a configuration, and is the only place that chooses adapters.

A local cluster is remembered in its run directory (``cluster.json``), so that ``status``, ``stop`` and the next
``serve`` find it. Ray, the controller and the router are processes of their own: whoever started them may leave.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from cluster import router_process
from cluster.client.control import ControlClient, ControllerUnreachable
from cluster.client.local_cluster import LocalCluster, forget, load_local, remember
from cluster.config.listening import require_free
from cluster.config.process_identity import find_process, started_s
from cluster.config.run_dir import hold_run_dir
from cluster.config.schema import ClusterConfig, ControllerConfig, ModelConfig, RouterConfig
from cluster.controller import ray_start
from cluster.controller.early_checks import check_models, this_machine
from cluster.controller.node_options import NodeOptions
from cluster.controller.node_outlook import OutlookEntry
from cluster.controller.rank_marker import SweepOrder
from cluster.domain.clock import MonotonicClock
from cluster.domain.errors import ClusterError, ConfigError, ReplicaError

WORKER_PODS_ENTRY = "cluster.kube.worker_pods:watch_worker_pods"

Say = Callable[[str], None]


# ---- serve ----


def start_cluster(
    config: ClusterConfig, run_dir: Path, ray_address: str | None, say: Say, token_file: Path | None = None
) -> LocalCluster:
    """Ray (or the one at ``ray_address``), controller, models applied, router; returns while replicas still load.

    What was started is ended again when a later part refuses, and nothing else is. Hold the run directory.
    """
    require_unused(run_dir)
    require_free(config.router.host, config.router.port, "router port (--port)")
    machine = this_machine(cpu_slots(config), config.controller.host) if ray_address is None else None
    models = check_models(config.models, machine)
    with ExitStack() as undo:
        if ray_address is None:
            say("Starting Ray on this machine.")
            address = _own_ray(config, run_dir, cpu_slots(config), 0, undo).address
            control_address = _own_controller(config, run_dir, say)
        else:
            say(f"Joining Ray at {ray_address}.")
            address = ray_address
            undo.callback(ray_start.disconnect)
            ray_start.connect(ray_address, token_file=token_file)
            control_address = _controller_among_others(config, run_dir, address, undo, say)
        ray_start.disconnect()
        with ControlClient(control_address) as control:
            say(f"Planning {', '.join(model.name for model in models) or 'nothing'}.")
            control.apply(models)
        say("Starting the router.")
        cluster = start_router(config, run_dir, control_address, address, owns_ray=ray_address is None)
        undo.pop_all()
    return cluster


def start_router(
    config: ClusterConfig,
    run_dir: Path,
    control_address: str,
    ray_address: str,
    *,
    owns_ray: bool,
    wanted: Callable[[], bool] = lambda: True,
) -> LocalCluster:
    """A router process for the controller at ``control_address``; remembered with the cluster.

    ReplicaError when it is not ``wanted`` any more once it runs.
    """
    process, ports = router_process.spawn(config.router, run_dir, control_address)
    try:
        cluster = LocalCluster(
            cluster_name=config.cluster_name,
            rank_ports=config.controller.rank_ports,
            control_address=control_address,
            router_address=f"{config.router.host}:{ports['grpc']}",
            router_pid=process.pid,
            router_started_s=started_s(psutil.Process(process.pid)),
            ray_address=ray_address,
            owns_ray=owns_ray,
            router_drain_s=config.router.drain_deadline_s,
        )
        _remember_if(wanted, run_dir, cluster)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return cluster


def _remember_if(wanted: Callable[[], bool], run_dir: Path, cluster: LocalCluster) -> None:
    if not wanted():
        raise ReplicaError("The cluster is being stopped; its router is not started again.")
    remember(run_dir, cluster)


def restart_router(config: ClusterConfig, run_dir: Path, cluster: LocalCluster) -> LocalCluster:
    """Another router in place of one that died, where clients know it: on the same port.

    ReplicaError when the cluster is being stopped by the time it runs; then it has ended again.
    """
    port = int(cluster.router_address.rpartition(":")[2])
    same = config.model_copy(update={"router": config.router.model_copy(update={"port": port})})

    def wanted() -> bool:
        found = load_local(run_dir)
        return found is not None and not found.stopping

    return start_router(
        same, run_dir, cluster.control_address, cluster.ray_address, owns_ray=cluster.owns_ray, wanted=wanted
    )


def router_is_alive(cluster: LocalCluster) -> bool:
    return _router_process(cluster) is not None


def require_unused(run_dir: Path) -> None:
    """ConfigError while anything runs that was started under ``run_dir``; remains of what died are removed."""
    found, node = load_local(run_dir), ray_start.load_node(run_dir)
    node_lives = node is not None and ray_start.is_alive(node)
    if node_lives or (found is not None and (router_is_alive(found) or _answers(found.control_address))):
        raise ConfigError(
            f"A cluster runs under {run_dir} already; stop it with 'llm-cluster stop', or choose another --run-dir."
        )
    if found is not None:
        stop_cluster(run_dir, drain_s=0.0, say=lambda _: None)


def _answers(control_address: str) -> bool:
    with ControlClient(control_address) as control:
        try:
            control.status()
        except ControllerUnreachable:
            return False
    return True


def _own_ray(
    config: ClusterConfig, run_dir: Path, cpus: int, port: int, undo: ExitStack, token_file: Path | None = None
) -> ray_start.RayNode:
    """A Ray head of our own, joined."""
    node = ray_start.start_head(run_dir, num_cpus=cpus, host=config.controller.host, port=port, token_file=token_file)
    undo.callback(ray_start.stop_node, run_dir, _everything_of(config, run_dir))
    undo.callback(ray_start.disconnect)
    ray_start.connect(node.address, token_file=Path(node.token_file))
    return node


def _own_controller(config: ClusterConfig, run_dir: Path, say: Say, worker_pods: str = "") -> str:
    # Imports Ray, which reads how to treat loopback when it is imported: after ``ray_start.connect`` has said so.
    from cluster.controller.controller_actor import start_controller

    say("Starting the controller.")
    outlook = OutlookEntry(WORKER_PODS_ENTRY, worker_pods) if worker_pods else None
    return start_controller(config, run_dir, outlook=outlook)


def _controller_among_others(config: ClusterConfig, run_dir: Path, address: str, undo: ExitStack, say: Say) -> str:
    """The controller of our name in a Ray cluster that is not ours alone: an idle one, or a new one."""
    from cluster.controller.controller_actor import find_controller

    found = find_controller(config.cluster_name)
    if found is None:
        control_address = _own_controller(config, run_dir, say)
        undo.callback(_end_controller, config.cluster_name, control_address, address)
        return control_address
    with ControlClient(found) as control:
        served = ", ".join(model.name for model in control.status().models)
    if served:
        raise ConfigError(
            f"Cluster {config.cluster_name} on Ray at {address} serves {served} already; choose another "
            f"--cluster-name, or stop it with 'llm-cluster stop --controller {found}'."
        )
    return found


def _end_controller(cluster_name: str, control_address: str, ray_address: str) -> None:
    """Of a start that failed: it ends itself and what it began, or is killed."""
    from cluster.controller.controller_actor import end_controller

    try:
        with ControlClient(control_address) as control:
            control.shut_down(0.0)
    except ClusterError:
        ray_start.disconnect()
        ray_start.connect(ray_address)  # this process holds its token since it joined first
        end_controller(cluster_name)


def cpu_slots(config: ClusterConfig) -> int:
    """CPU ranks that this machine offers: as configured, or its cores, or as many more as the models ask for."""
    if config.controller.cpu_slots is not None:
        return config.controller.cpu_slots
    wanted = sum(
        model.replicas * (model.tensor_parallel_size or 1) * (model.pipeline_parallel_size or 1)
        for model in config.models
    )
    return max(os.cpu_count() or 1, wanted)


def _everything_of(config: ClusterConfig, run_dir: Path) -> SweepOrder:
    """What a raylet or controller that was killed from outside could not remove."""
    return SweepOrder(config.cluster_name, str(run_dir.resolve()), config.controller.rank_ports)


# ---- stop ----


def stop_cluster(run_dir: Path, drain_s: float | None, say: Say) -> None:
    """Drains, removes every replica, ends the router, the controller and the Ray that we started.

    ``drain_s``: what running streams get at most; None: what the router was configured to give them.
    """
    cluster = load_local(run_dir)
    if cluster is None:
        _stop_remains(run_dir, say)
        return
    remember(run_dir, replace(cluster, stopping=True))
    given_s = cluster.router_drain_s if drain_s is None else drain_s
    say("Draining the router.")
    if given_s > cluster.router_drain_s:
        say(f"It gives its streams {cluster.router_drain_s:.0f} s at most (router.drain_deadline_s).")
    router = _router_process(cluster)
    if router is not None:
        router_process.end(router, min(given_s, cluster.router_drain_s) + router_process.END_DEADLINE_S)
    say("Removing the replicas.")
    try:
        with ControlClient(cluster.control_address) as control:
            control.shut_down(given_s)
    except ControllerUnreachable:
        say("The controller is gone already.")
    except ClusterError as error:
        say(f"The controller could not end everything: {error}")
    if cluster.owns_ray:
        say("Stopping Ray.")
        first, last = cluster.rank_ports
        ray_start.stop_node(run_dir, SweepOrder(cluster.cluster_name, str(run_dir.resolve()), (first, last)))
    forget(run_dir)


def _stop_remains(run_dir: Path, say: Say) -> None:
    """A Ray node whose 'serve', 'controller' or 'worker' was killed before it could end it."""
    if ray_start.load_node(run_dir) is None:
        raise ConfigError(f"No cluster runs under {run_dir}; name another with --run-dir.")
    with hold_run_dir(run_dir):  # a process that lives ends its own node
        say("Stopping Ray.")
        ray_start.stop_node(run_dir, SweepOrder("", str(run_dir.resolve()), ControllerConfig().rank_ports))


def _router_process(cluster: LocalCluster) -> psutil.Process | None:
    """The router, unless its id belongs to another process by now."""
    return find_process(cluster.router_pid, cluster.router_started_s)


# ---- one process each: what the chart runs ----


@dataclass(frozen=True, slots=True)
class Head:
    """A Ray head with a controller on it. ``token_file``: what workers need to join; ``orphans``: whose remains."""

    control_address: str
    ray_address: str
    token_file: str
    orphans: SweepOrder


def start_head(
    config: ClusterConfig,
    run_dir: Path,
    ray_port: int,
    num_cpus: int | None,
    say: Say,
    token_file: Path | None = None,
    worker_pods: str = "",
) -> Head:
    """Ray's head and the controller on this machine; nothing is left after a refusal. Hold the run directory.

    The config's models are checked here and applied by ``apply_models``: the nodes they need may come later.
    ``token_file``: holds the token for Ray's nodes; None: one is made. ``worker_pods``: labels of the Kubernetes
    pods that will join, which are watched to say why they do not.
    """
    require_unused(run_dir)
    check_models(config.models, None)
    with ExitStack() as undo:
        say("Starting Ray's head.")
        cpus = (os.cpu_count() or 1) if num_cpus is None else num_cpus
        node = _own_ray(config, run_dir, cpus, ray_port, undo, token_file)
        control_address = _own_controller(config, run_dir, say, worker_pods)
        ray_start.disconnect()
        undo.pop_all()
    return Head(control_address, node.address, node.token_file, _everything_of(config, run_dir))


def apply_models(head: Head, models: tuple[ModelConfig, ...]) -> None:
    """Replaces the desired models; NoFeasiblePlan while the nodes they need have not joined."""
    checked = check_models(models, None)
    with ControlClient(head.control_address) as control:
        control.apply(checked)


def head_is_alive(run_dir: Path) -> bool:
    return ray_start.head_is_alive(run_dir)


def stop_head(head: Head, run_dir: Path, drain_s: float, say: Say) -> None:
    """Drains and removes every replica, then ends the controller and Ray, and sweeps what they left."""
    say("Removing the replicas.")
    try:
        with ControlClient(head.control_address) as control:
            control.shut_down(drain_s)
    except ClusterError as error:
        say(f"The controller could not end everything: {error}")
    ray_start.stop_node(run_dir, head.orphans)


def run_worker(
    options: NodeOptions,
    run_dir: Path,
    interrupted: threading.Event,
    say: Say,
    started: Callable[[dict[str, int]], None],
) -> None:
    """Makes this machine a node until ``interrupted``; see ``NodeProcess.run``. Hold the run directory."""
    from cluster.controller.node_process import NodeProcess

    require_unused(run_dir)
    NodeProcess(options, run_dir, MonotonicClock(), say).run(interrupted, started)


def run_router(config: RouterConfig, controller_address: str, run_dir: Path) -> int:
    """A router until SIGTERM or Ctrl-C; prints one line of JSON with its ports when it listens."""
    from cluster.router.process_group import RunningProcesses, run_processes
    from cluster.router.service import RunningRouter
    from cluster.router.service import run_router as run
    from cluster.telemetry.logs import configure_logs

    logs = run_dir / "logs"
    logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    log_file, state_file = logs / "router.log", run_dir / "endpoints.json"
    configure_logs("router", log_file)

    def started(router: RunningRouter | RunningProcesses) -> None:
        sys.stdout.write(json.dumps(router.ready_line) + "\n")
        sys.stdout.flush()

    if config.processes > 1:
        return run_processes(config, controller_address, state_file=state_file, log_file=log_file, started=started)
    return run(config, controller_address, state_file=state_file, started=started)
