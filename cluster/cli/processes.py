"""``llm-cluster controller``, ``router`` and ``worker``: one process of the cluster each, in the foreground."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.assembly import (
    Head,
    Say,
    apply_models,
    run_router,
    start_head,
    start_worker,
    stop_head,
    stop_worker,
    worker_is_alive,
)
from cluster.cli.serve import interruptions
from cluster.config.load import load_config
from cluster.config.run_dir import default_run_dir, hold_run_dir, open_run_dir
from cluster.config.schema import LOOPBACK, ClusterConfig
from cluster.domain.errors import ReplicaError

ConfigFile = Annotated[Path | None, typer.Option(help="YAML file with the same names in snake_case.")]
RunDir = Annotated[Path | None, typer.Option(help="State, logs, process ids.")]
ALIVE_POLL_S = 1.0
NODES_POLL_S = 2.0


def _folder(run_dir: Path | None) -> Path:
    return open_run_dir(run_dir or default_run_dir(os.environ))


def controller_command(
    config: ConfigFile = None,
    host: Annotated[str | None, typer.Option(help="Address to bind and to advertise.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the Control service.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="First port tried for /metrics.")] = None,
    ray_port: Annotated[int, typer.Option(help="Port that Ray nodes join at; 0 = any.")] = 6379,
    num_cpus: Annotated[int | None, typer.Option(min=0, help="CPU ranks on this machine; default: its cores.")] = None,
    run_dir: RunDir = None,
) -> None:
    """Run Ray's head and the controller; models come from the config or from Apply."""
    flags = {"controller.host": host, "controller.port": port, "controller.metrics_port": metrics_port}
    loaded, folder = load_config(config, os.environ, flags).config, _folder(run_dir)
    console = Console(stderr=True, highlight=False)
    with hold_run_dir(folder), interruptions() as interrupted:
        head = start_head(loaded, folder, ray_port, num_cpus, console.print)
        try:
            ready = {"kind": "controller", "control": head.control_address, "ray": head.ray_address}
            print(json.dumps({**ready, "token_file": head.token_file}), flush=True)
            _apply_when_they_fit(head, loaded, interrupted, console.print)
            interrupted.wait()
        finally:
            stop_head(head, folder, loaded.controller.drain_deadline_s, console.print)


def _apply_when_they_fit(head: Head, config: ClusterConfig, interrupted: threading.Event, say: Say) -> None:
    """Nodes join when they like: until the models fit, or somebody says stop."""
    said = ""
    while why := apply_models(head, config):
        if why != said:
            say(f"Waiting for nodes: {why}")
            said = why
        if interrupted.wait(NODES_POLL_S):
            return


def router_command(
    controller: Annotated[str, typer.Option(help="HOST:PORT of the controller.")],
    config: ConfigFile = None,
    host: Annotated[str | None, typer.Option(help="Address to bind.")] = None,
    port: Annotated[int | None, typer.Option(help="gRPC port.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="First port tried for /metrics.")] = None,
    run_dir: RunDir = None,
) -> None:
    """Run one router; it serves from the last endpoint table when the controller is away."""
    flags = {"router.host": host, "router.port": port, "router.metrics_port": metrics_port}
    loaded = load_config(config, os.environ, flags).config
    raise typer.Exit(run_router(loaded.router, controller, _folder(run_dir)))


def worker_command(
    address: Annotated[str, typer.Option(help="HOST:PORT of Ray's head.")],
    host: Annotated[str, typer.Option(help="Address of this machine that the others reach.")] = LOOPBACK,
    num_cpus: Annotated[int | None, typer.Option(min=0, help="CPU ranks on this machine; default: its cores.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="A copy of the head's token file.")] = None,
    run_dir: RunDir = None,
) -> None:
    """Run this machine as a node of the cluster: the controller places ranks on it."""
    folder = _folder(run_dir)
    with hold_run_dir(folder), interruptions() as interrupted:
        node = start_worker(address, folder, host, num_cpus, token_file)
        print(json.dumps({"kind": "worker", "ray": node.address}), flush=True)
        try:
            while not interrupted.wait(ALIVE_POLL_S):
                if not worker_is_alive(node):
                    raise ReplicaError("A process of this Ray node has ended; its logs are in Ray's folder.")
        finally:
            stop_worker(folder)
