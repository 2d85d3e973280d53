"""``llm-cluster controller``, ``router`` and ``worker``: one process of the cluster each, in the foreground."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.assembly import apply_models, head_is_alive, run_router, run_worker, start_head, stop_head
from cluster.cli.addresses import CONTROLLER_ADDRESS, parse_address
from cluster.cli.serve import interruptions
from cluster.config.load import load_config
from cluster.config.run_dir import default_run_dir, hold_run_dir, open_run_dir
from cluster.config.schema import LOOPBACK, ClusterConfig
from cluster.controller.config_follower import ConfigFollower
from cluster.controller.node_options import NodeOptions
from cluster.domain.errors import ReplicaError
from cluster.telemetry.log_copy import copied_logs

ConfigFile = Annotated[Path | None, typer.Option(help="YAML file with the same names in snake_case.")]
RunDir = Annotated[Path | None, typer.Option(help="State, logs, process ids.")]
CopyLogs = Annotated[
    bool, typer.Option("--copy-logs", help="Copy the JSON logs under the run directory to standard error too.")
]
CONFIG_POLL_S = 2.0


def _folder(run_dir: Path | None) -> Path:
    return open_run_dir(run_dir or default_run_dir(os.environ))


def _logs(folder: Path, wanted: bool) -> AbstractContextManager[None]:
    return copied_logs(folder / "logs", sys.stderr) if wanted else nullcontext()


def controller_command(
    config: ConfigFile = None,
    host: Annotated[str | None, typer.Option(help="Address to bind and to advertise.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the Control service.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="First port tried for /metrics.")] = None,
    ray_port: Annotated[int, typer.Option(help="Port that Ray nodes join at; 0 = any.")] = 6379,
    num_cpus: Annotated[int | None, typer.Option(min=0, help="CPU ranks on this machine; default: its cores.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="Holds the token that Ray's nodes must show; default: one is made.")
    ] = None,
    worker_pods: Annotated[
        str, typer.Option(help="Labels of this cluster's worker pods in Kubernetes: says why they do not run.")
    ] = "",
    run_dir: RunDir = None,
    copy_logs: CopyLogs = False,
) -> None:
    """Run Ray's head and the controller; models come from the config, now and when it changes, or from Apply."""
    flags = {"controller.host": host, "controller.port": port, "controller.metrics_port": metrics_port}

    def load() -> ClusterConfig:
        return load_config(config, os.environ, flags).config

    loaded, folder = load(), _folder(run_dir)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    held, logs, beside = hold_run_dir(folder), _logs(folder, copy_logs), ThreadPoolExecutor(1, "config")
    with held, interruptions() as interrupted, logs, beside:
        head = start_head(loaded, folder, ray_port, num_cpus, console.print, token_file, worker_pods)
        try:
            ready = {"kind": "controller", "control": head.control_address, "ray": head.ray_address}
            print(json.dumps({**ready, "token_file": head.token_file}), flush=True)
            follower = ConfigFollower(loaded, config, load, partial(apply_models, head), console.print)
            supervise(folder, follower.step, beside, interrupted)
        finally:
            stop_head(head, folder, loaded.controller.drain_deadline_s, console.print)


def supervise(folder: Path, step: Callable[[], None], beside: Executor, interrupted: threading.Event) -> None:
    """Steps again and again until interrupted; ReplicaError when the head under ``folder`` dies.

    A step may plan for minutes: who ends the cluster does not wait for it, the end of the controller ends it.
    """
    running = beside.submit(step)
    while not interrupted.wait(CONFIG_POLL_S):
        if not head_is_alive(folder):
            raise ReplicaError("A process of this Ray head has ended; its logs are in Ray's folder.")
        if running.done():
            running.result()
            running = beside.submit(step)


def router_command(
    controller: Annotated[str, typer.Option(help="HOST:PORT of the controller.")],
    config: ConfigFile = None,
    host: Annotated[str | None, typer.Option(help="Address to bind.")] = None,
    port: Annotated[int | None, typer.Option(help="gRPC port.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="First port tried for /metrics.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes that share the port.")] = None,
    policy: Annotated[str | None, typer.Option(help="Who gets a request: default, least_load, ...")] = None,
    run_dir: RunDir = None,
    copy_logs: CopyLogs = False,
) -> None:
    """Run a router, of one process or several; it serves from the last endpoint table when the controller is away."""
    flags = {
        "router.host": host, "router.port": port, "router.metrics_port": metrics_port, "router.processes": processes,
        "router.policy": policy,
    }  # fmt: skip
    address = parse_address(controller, CONTROLLER_ADDRESS)
    loaded = load_config(config, os.environ, flags).config
    folder = _folder(run_dir)
    with _logs(folder, copy_logs):
        code = run_router(loaded.router, address, folder)
    raise typer.Exit(code)


def worker_command(
    address: Annotated[str, typer.Option(help="HOST:PORT of Ray's head.")],
    host: Annotated[str, typer.Option(help="Address of this machine that the others reach.")] = LOOPBACK,
    num_cpus: Annotated[int | None, typer.Option(min=0, help="CPU ranks on this machine; default: its cores.")] = None,
    num_gpus: Annotated[int | None, typer.Option(min=0, help="GPU ranks on this machine; default: its GPUs.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="A copy of the head's token file.")] = None,
    metrics_port: Annotated[int, typer.Option(min=0, help="First port tried for /metrics and the probes.")] = 9100,
    idle_after_s: Annotated[
        float, typer.Option(min=0, help="/startedz: started without a rank after so many seconds.")
    ] = 60.0,
    controller: Annotated[
        str, typer.Option(help="HOST:PORT of the controller: shows this worker in its status and /targets.")
    ] = "",
    run_dir: RunDir = None,
    copy_logs: CopyLogs = False,
) -> None:
    """Run this machine as a node of the cluster: the controller places ranks on it."""
    if controller:
        parse_address(controller, CONTROLLER_ADDRESS)
    folder = _folder(run_dir)
    options = NodeOptions(address, host, num_cpus, num_gpus, token_file, metrics_port, idle_after_s, controller)
    console = Console(stderr=True, highlight=False, soft_wrap=True)

    def started(ports: dict[str, int]) -> None:
        print(json.dumps({"kind": "worker", "ray": address, "host": host, "ports": ports}), flush=True)

    with hold_run_dir(folder), interruptions() as interrupted, _logs(folder, copy_logs):
        run_worker(options, folder, interrupted, console.print, started)
