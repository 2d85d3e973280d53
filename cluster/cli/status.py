"""``llm-cluster status``: every replica, rank and process, for people and for machines."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.message import Message
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from cluster.cli.addresses import control_address
from cluster.client.control import ControlClient
from cluster.domain.quantities import format_bytes, format_seconds
from cluster.v1 import control_pb2

REFRESH_S = 1.0
_PIPE_WIDTH = 140
_STYLES = {"READY": "green", "FAILED": "red", "DRAINING": "yellow", "LOADING": "cyan"}


def status_command(
    controller: Annotated[str | None, typer.Option(help="HOST:PORT of a controller elsewhere.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Run directory of a local cluster.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print GetStatus as JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
) -> None:
    """Show models, replicas, ranks and every process of the cluster."""
    address = control_address(controller, run_dir)
    with ControlClient(address) as control:
        if as_json:
            print(json.dumps(plain(control.status()), indent=2))
        elif watch:
            _watch(control)
        else:
            wide_console().print(render_status(control.status()))


def plain(message: Message) -> dict[str, Any]:
    """A message as JSON values, every field there. Protobuf's own mapping would write 64-bit numbers as strings."""
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is None:
            values[field.name] = list(value) if field.is_repeated else value
        elif field.message_type.GetOptions().map_entry:
            values[field.name] = dict(value)
        elif field.is_repeated:
            values[field.name] = [plain(item) for item in value]
        elif message.HasField(field.name):
            values[field.name] = plain(value)
    return values


def _watch(control: ControlClient) -> None:
    pause = threading.Event()
    with Live(render_status(control.status()), auto_refresh=False) as live:
        while not pause.wait(REFRESH_S):
            live.update(render_status(control.status()), refresh=True)


def wide_console(*, stderr: bool = False) -> Console:
    """The terminal; where there is none, wide enough for the tables."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=_PIPE_WIDTH)


def render_status(status: control_pb2.ClusterStatus) -> RenderableType:
    """Three tables: models, replicas, processes."""
    return Group(_models(status), _replicas(status), _processes(status))


def _models(status: control_pb2.ClusterStatus) -> Table:
    table = _table("model", "ready", "layout", "max length", "checkpoint", "blocked by")
    for model in status.models:
        table.add_row(
            model.name,
            f"{model.ready_replicas}/{model.desired_replicas}",
            f"TP{model.tensor_parallel_size} x PP{model.pipeline_parallel_size}",
            str(model.max_model_len),
            model.checkpoint_digest[:12],
            model.blocked_reason,
        )
    return table


def _replicas(status: control_pb2.ClusterStatus) -> Table:
    table = _table("replica", "phase", "for", "loaded", "run/wait", "KV blocks", "engine", "last change")
    for replica in status.replicas:
        activity = replica.activity
        table.add_row(
            f"{replica.replica}#{replica.generation}",
            f"[{_STYLES.get(replica.phase, 'default')}]{replica.phase}[/]",
            format_seconds(replica.phase_age_s),
            f"{format_bytes(replica.bytes_loaded)}/{format_bytes(replica.bytes_total)}",
            f"{activity.running_sequences}/{activity.waiting_sequences}",
            f"{activity.kv_blocks_used}/{activity.kv_blocks_total}",
            replica.engine_address,
            replica.reason,
        )
    return table


def _processes(status: control_pb2.ClusterStatus) -> Table:
    table = _table("process", "pid", "node", "ports", "state", "step", "heard")
    for process in status.processes:
        ports = " ".join(f"{name}:{port}" for name, port in sorted(process.ports.items()))
        if process.HasField("rank"):
            rank = process.rank
            name = f"rank {rank.replica}#{rank.generation}.{rank.rank}"
            cells = (f"{rank.phase} on {rank.device}", str(rank.step), f"{format_seconds(rank.report_age_s)} ago")
        else:
            name, cells = process.kind, ("", "", "")
        table.add_row(name, str(process.pid), process.node[:12], ports, *cells)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column not in ("last change", "blocked by"), overflow="fold")
    return table
