"""``llm-cluster serve``: the main job, and ``stop``, its end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cluster.assembly import restart_router, router_is_alive, start_cluster, stop_cluster
from cluster.cli import options
from cluster.cli.status import render_status, wide_console
from cluster.client import Client
from cluster.client.control import ControlClient, ControllerUnreachable
from cluster.client.local_cluster import LocalCluster, load_local
from cluster.config.load import load_config
from cluster.config.run_dir import default_run_dir, hold_run_dir, open_run_dir
from cluster.config.schema import ClusterConfig
from cluster.domain.clock import Clock, MonotonicClock
from cluster.domain.errors import ConfigError, ReplicaError
from cluster.v1 import control_pb2

POLL_S = 0.3
FAILURES_TOLERATED = 3
ROUTER_READY_DEADLINE_S = 30.0
CONTROLLER_AWAY_S = 60.0
SUPERVISE_POLL_S = 1.0
ROUTER_STABLE_S = 60.0
ROUTER_PAUSE_MAX_S = 30.0
ROUTER_DEATHS_TOLERATED = 10
DRAIN_S = 30.0  # of a cluster elsewhere, whose settings are not here
_PROCESS = "Processes"


def serve_command(
    models: Annotated[list[str] | None, typer.Argument(help="Directories, hub ids, or demo.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with the same names in snake_case.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join (HOST:PORT or auto); default: start one here.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="A copy of that Ray cluster's token file.")] = None,
    cluster_name: Annotated[str | None, typer.Option(help="Tells clusters on one Ray apart.")] = None,
    replicas: options.Replicas = None,
    tensor_parallel_size: options.TensorParallelSize = None,
    pipeline_parallel_size: options.PipelineParallelSize = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    max_num_waiting: options.MaxNumWaiting = None,
    max_waiting_prompt_tokens: options.MaxWaitingPromptTokens = None,
    enable_prefix_caching: options.EnablePrefixCaching = None,
    rope_scaling: options.RopeScaling = None,
    load_format: options.LoadFormat = None,
    seed: options.Seed = None,
    block_size: options.BlockSize = None,
    kv_cache_bytes: options.KvCacheBytes = None,
    device_memory_utilization: options.DeviceMemoryUtilization = None,
    served_model_name: options.ServedModelName = None,
    revision: options.Revision = None,
    host: Annotated[str | None, typer.Option(help="Bind the router to it.", rich_help_panel=_PROCESS)] = None,
    port: Annotated[int | None, typer.Option(help="The router's gRPC port.", rich_help_panel=_PROCESS)] = None,
    router_processes: Annotated[
        int | None, typer.Option(min=1, help="Router processes that share the port.", rich_help_panel=_PROCESS)
    ] = None,
    control_port: Annotated[int | None, typer.Option(help="The controller's port.", rich_help_panel=_PROCESS)] = None,
    control_host: Annotated[
        str | None, typer.Option(help="Bind controller, ranks and Ray to it.", rich_help_panel=_PROCESS)
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="First port tried for /metrics.", rich_help_panel=_PROCESS)
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="State, logs, process ids.", rich_help_panel=_PROCESS)] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Leave it running and return.")] = False,
) -> None:
    """Plan, place, load and serve models; Ctrl-C drains and stops."""
    shared = {
        "replicas": replicas, "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size, "dtype": dtype, "device": device,
        "max_model_len": max_model_len, "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens, "max_num_waiting": max_num_waiting,
        "max_waiting_prompt_tokens": max_waiting_prompt_tokens, "enable_prefix_caching": enable_prefix_caching,
        "rope_scaling": rope_scaling, "load_format": load_format, "seed": seed, "block_size": block_size,
        "kv_cache_bytes": kv_cache_bytes,
        "device_memory_utilization": device_memory_utilization, "served_model_name": served_model_name,
        "revision": revision,
    }  # fmt: skip
    processes = {
        "router.host": host, "router.port": port, "router.metrics_port": metrics_port,
        "router.processes": router_processes,
        "cluster_name": cluster_name,
        "controller.host": control_host, "controller.port": control_port, "controller.metrics_port": metrics_port,
    }  # fmt: skip
    _load_and_serve(config, {**_model_flags(models or [], shared), **processes}, run_dir, address, token_file, detach)


def _load_and_serve(
    file: Path | None, flags: dict[str, Any], run_dir: Path | None, address: str | None, token_file: Path | None,
    detach: bool,
) -> None:  # fmt: skip
    loaded = load_config(file, os.environ, flags).config
    if not loaded.models:
        raise ConfigError("Nothing to serve; name a model, for example 'llm-cluster serve demo'.")
    folder = open_run_dir(
        Path(loaded.run_dir) if loaded.run_dir and not run_dir else run_dir or default_run_dir(os.environ)
    )
    with hold_run_dir(folder):
        _serve(loaded, folder, address, token_file, detach=detach)


def _model_flags(models: list[str], shared: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in shared.items() if value is not None}
    if len(models) > 1 and "served_model_name" in given:
        raise ConfigError("--served-model-name names one model; put several into a --config file.")
    flags: dict[str, Any] = {}
    for index, model in enumerate(models):
        flags[f"models.{index}.model"] = model
        flags.update({f"models.{index}.{name}": value for name, value in given.items()})
    return flags


def _serve(config: ClusterConfig, run_dir: Path, address: str | None, token_file: Path | None, *, detach: bool) -> None:
    console = wide_console(stderr=True)
    with interruptions() as interrupted:
        cluster = start_cluster(config, run_dir, address, console.print, token_file)
        try:
            with ControlClient(cluster.control_address) as control:
                wait_until_ready(control, console, interrupted, MonotonicClock())
                _wait_for_router(cluster)
                console.print(render_status(control.status()))
            _say_how_to_talk(console, cluster, run_dir)
            if detach:
                return
            _supervise(config, run_dir, interrupted, console, MonotonicClock())
        except BaseException:
            _stop_ours(run_dir, 0.0, console)
            raise
        _stop_ours(run_dir, None, console)


def _stop_ours(run_dir: Path, drain_s: float | None, console: Console) -> None:
    if load_local(run_dir) is not None:  # else somebody said 'stop' already
        stop_cluster(run_dir, drain_s, console.print)


@contextmanager
def interruptions() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; a second Ctrl-C interrupts at once."""
    event = threading.Event()

    def on_signal(number: int, _frame: object) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def wait_until_ready(control: ControlClient, console: Console, interrupted: threading.Event, clock: Clock) -> None:
    """Shows every replica's load until all that are desired are READY; ReplicaError when one keeps failing.

    A controller that is away for a while is waited for: Ray starts it again.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bars: dict[str, TaskID] = {}
        phases: dict[str, str] = {}
        heard_s = clock.now()
        while True:
            try:
                status = control.status()
            except ControllerUnreachable:
                if clock.now() - heard_s > CONTROLLER_AWAY_S:
                    raise
            else:
                heard_s = clock.now()
                for replica in status.replicas:
                    _show(progress, bars, replica)
                    if not console.is_terminal and phases.get(replica.replica) != replica.phase:
                        phases[replica.replica] = replica.phase
                        console.print(f"{replica.replica}: {replica.phase} {replica.reason}".rstrip())
                raise_if_hopeless(status)
                if status.models and all(m.ready_replicas >= m.desired_replicas for m in status.models):
                    return
            if interrupted.wait(POLL_S):
                raise KeyboardInterrupt


def _show(progress: Progress, bars: dict[str, TaskID], replica: control_pb2.ReplicaStatus) -> None:
    if replica.replica not in bars:
        bars[replica.replica] = progress.add_task(replica.replica)
    progress.update(
        bars[replica.replica],
        description=f"{replica.replica} {replica.phase}",
        total=replica.bytes_total or None,
        completed=replica.bytes_loaded,
    )


def raise_if_hopeless(status: control_pb2.ClusterStatus) -> None:
    """ReplicaError once a replica of a model that serves nobody has failed too often in a row."""
    ready = {model.name for model in status.models if model.ready_replicas}
    for replica in status.replicas:
        failures = replica.failures_in_a_row
        if replica.phase == "FAILED" and failures >= FAILURES_TOLERATED and replica.model not in ready:
            raise ReplicaError(
                f"{replica.replica} failed {failures} times in a row: {replica.reason}; "
                "its ranks' logs are in the run directory."
            )


def _wait_for_router(cluster: LocalCluster) -> None:
    with Client(cluster.router_address) as client:
        client.wait_ready(ROUTER_READY_DEADLINE_S)


def _say_how_to_talk(console: Console, cluster: LocalCluster, run_dir: Path) -> None:
    console.print(f"Ready: gRPC on {cluster.router_address}, control on {cluster.control_address}.")
    console.print(f"Talk to it:  llm-cluster generate 'Return the ' --address {cluster.router_address}")
    console.print(f"Look at it:  llm-cluster status --run-dir {run_dir}")
    console.print(f"Stop it:     llm-cluster stop --run-dir {run_dir}")


def router_pause_s(deaths: int) -> float:
    """Before the next start of a router that died so many times in a row: none at first, doubling, bounded."""
    return 0.0 if deaths <= 1 else min(2.0 ** min(deaths - 2, 10), ROUTER_PAUSE_MAX_S)


def _supervise(
    config: ClusterConfig, run_dir: Path, interrupted: threading.Event, console: Console, clock: Clock
) -> None:
    """Until Ctrl-C; a router that died is started again on its port. ReplicaError when it dies again and again."""
    deaths, born_s = 0, clock.now()
    while not interrupted.wait(SUPERVISE_POLL_S):
        cluster = load_local(run_dir)
        if cluster is None:
            return  # somebody else said 'stop'
        if cluster.stopping or router_is_alive(cluster):
            continue
        deaths = 1 if clock.now() - born_s > ROUTER_STABLE_S else deaths + 1
        if deaths > ROUTER_DEATHS_TOLERATED:
            raise ReplicaError(f"The router died {deaths} times in a row; its words are in {run_dir / 'logs'}.")
        console.print("The router died; starting another.")
        if interrupted.wait(router_pause_s(deaths)):
            break
        try:
            restart_router(config, run_dir, cluster)
        except ReplicaError as error:
            console.print(str(error))
        born_s = clock.now()
    console.print("Draining; Ctrl-C again to stop at once.")


def stop_command(
    run_dir: Annotated[Path | None, typer.Option(help="Run directory of the cluster to stop.")] = None,
    controller: Annotated[str | None, typer.Option(help="HOST:PORT of a controller elsewhere.")] = None,
    drain_deadline_s: Annotated[
        float | None, typer.Option(min=0, help="Seconds that running streams get; default: the router's own setting.")
    ] = None,
) -> None:
    """Drain, then end every process of the cluster."""
    console = Console(stderr=True, highlight=False)
    if controller:
        with ControlClient(controller) as control:
            control.shut_down(DRAIN_S if drain_deadline_s is None else drain_deadline_s)
        console.print("Every replica is gone, and so is the controller; routers end by themselves or with SIGTERM.")
        return
    stop_cluster(run_dir or default_run_dir(os.environ), drain_deadline_s, console.print)
    console.print("Stopped.")
