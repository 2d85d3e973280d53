"""``llm-cluster scale`` and ``drain``: what operators and the hooks of machines that go ask the controller for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.addresses import control_address
from cluster.client.control import ControlClient, ControllerUnreachable
from cluster.domain.clock import Clock, MonotonicClock
from cluster.domain.errors import ConfigError

# Ray starts a controller that died within seconds.
CONTROLLER_AWAY_S = 20.0
RETRY_S = 1.0
# Longer than connecting takes at most: a call that ran for so long had reached a controller.
CONNECT_S = 25.0

Controller = Annotated[str | None, typer.Option(help="HOST:PORT of a controller elsewhere.")]
RunDir = Annotated[Path | None, typer.Option(help="Run directory of a local cluster.")]


def scale_command(
    model: Annotated[str, typer.Argument(help="The name that clients use.")],
    replicas: Annotated[int, typer.Argument(min=0, help="How many are wanted from now on.")],
    controller: Controller = None,
    run_dir: RunDir = None,
) -> None:
    """Set how many replicas a model has; a changed config file says it anew."""
    with ControlClient(control_address(controller, run_dir)) as control:
        control.scale(model, replicas)
    print(f"{model}: {replicas} replica(s) wanted.")


def drain_command(
    replica: Annotated[str | None, typer.Argument(help="MODEL/SLOT, as 'llm-cluster status' shows it.")] = None,
    node: Annotated[str | None, typer.Option(help="A whole node instead, by the address others reach it at.")] = None,
    deadline_s: Annotated[float, typer.Option(min=0, help="Seconds that running streams get at most.")] = 30.0,
    controller: Controller = None,
    run_dir: RunDir = None,
) -> None:
    """Take a replica out of service, or empty a node; what is drained is replaced where there is room."""
    if (replica is None) == (node is None):
        raise ConfigError("Name either a replica (MODEL/SLOT) or a node (--node HOST) to drain.")
    with ControlClient(control_address(controller, run_dir)) as control:
        if node is not None:
            patiently(partial(control.drain_node, node), deadline_s, MonotonicClock(), threading.Event())
            print(f"Node {node} is empty; nothing new is placed there.")
        elif replica is not None:
            control.drain(replica, deadline_s)
            print(f"{replica} drains: its streams have up to {deadline_s:.0f} s.")


def patiently(call: Callable[[float], None], deadline_s: float, clock: Clock, pause: threading.Event) -> None:
    """Calls with what is left of ``deadline_s``, and again while no controller answers.

    ControllerUnreachable when one has been away for ``CONTROLLER_AWAY_S``, be it from the start or under a long call.
    """
    left_s, until_s = deadline_s, clock.now() + deadline_s
    away_since_s: float | None = None
    while True:
        began_s = clock.now()
        try:
            call(left_s)
        except ControllerUnreachable:
            now_s = clock.now()
            if away_since_s is None or now_s - began_s > CONNECT_S:
                away_since_s = now_s
            if now_s - away_since_s >= CONTROLLER_AWAY_S:
                raise
            pause.wait(RETRY_S)
            left_s = max(0.0, until_s - clock.now())
        else:
            return
