"""``python -m ops.monitoring``: what ops/monitor runs."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.domain.errors import ClusterError
from ops.monitoring import picture, watched
from ops.monitoring.load import Load
from ops.monitoring.prometheus import MonitorError, Prometheus, binary, configuration
from ops.monitoring.rules import ALERTS, RECORDING
from ops.monitoring.verdicts import Verdict, Watch, as_json, verdicts

SCRAPE_INTERVAL_S = 1
STEP_S = 2
KILL_AT = 0.3  # of the load's time: early enough to see the replica come back
FIRST_SCRAPE_DEADLINE_S = 30.0
REBUILT_DEADLINE_S = 60.0
SETTLE_S = 3.0


def main() -> None:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    said = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
    try:
        found = _monitor(arguments, said)
    except (MonitorError, ClusterError) as error:
        said.print(f"monitor: error: {error}", markup=False)
        sys.exit(1)
    faults = [verdict for verdict in found if verdict.fault]
    if arguments.json:
        print(json.dumps(as_json(found), indent=1))
    else:
        _show(found)
    if faults:
        said.print(f"monitor: {len(faults)} of {len(found)} have no data:")
        for verdict in faults:
            said.print(f"  {verdict.kind} {verdict.what}: {verdict.fault}: {verdict.expr}", markup=False)
        sys.exit(1)
    said.print(f"monitor: all {len(found)} have data")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ops/monitor")
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--controller")
    parser.add_argument("--router")
    parser.add_argument("--load-s", type=float, default=50.0)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    if bool(arguments.controller) != bool(arguments.router):
        parser.error("--controller and --router go together")
    return arguments


def _monitor(arguments: argparse.Namespace, said: Console) -> list[Verdict]:
    began_s = time.monotonic()

    def say(words: str) -> None:
        said.print(f"[{time.monotonic() - began_s:5.1f} s] {words}", markup=False)

    program = binary()  # before anything is started
    with ExitStack() as exits:
        cluster = _cluster(arguments, exits, say)
        undo = exits.enter_context(ExitStack())
        folder = Path(tempfile.mkdtemp(prefix="llm-prometheus.", dir="/tmp"))
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        config = configuration(cluster.targets_url(), SCRAPE_INTERVAL_S, (RECORDING, ALERTS))
        prometheus = Prometheus(program, folder, config)
        undo.callback(prometheus.end)
        prometheus.wait_ready()
        say(f"Prometheus is at {prometheus.url}")
        _until("every target answers", lambda: _all_up(prometheus), FIRST_SCRAPE_DEADLINE_S)
        watch, marks = _under_load(cluster, prometheus, arguments.load_s, say)
        found = verdicts(watch)
        say(f"asked {len(found)} queries")
        if arguments.picture:
            picture.draw(watch, marks, arguments.picture)
            say(f"drew {arguments.picture}")
        if arguments.keep:
            undo.pop_all()
            say(f"Prometheus stays up at {prometheus.url}; end it with: kill {prometheus.process.pid}; rm -r {folder}")
    say("ended")
    return found


def _cluster(arguments: argparse.Namespace, exits: ExitStack, say: Any) -> watched.Watched:
    if arguments.controller:
        return watched.Watched(arguments.controller, arguments.router, ours=False)
    if arguments.run_dir:
        return watched.running_under(arguments.run_dir)
    say("starting the demo cluster: 2 replicas x TP 2")
    cluster, run_dir = exits.enter_context(watched.demo(keep=arguments.keep))
    say(f"it serves at {cluster.router_address}")
    if arguments.keep:
        say(f"stop it with: .venv/bin/llm-cluster stop --run-dir {run_dir}")
    return cluster


def _under_load(
    cluster: watched.Watched, prometheus: Prometheus, seconds: float, say: Any
) -> tuple[Watch, dict[float, str]]:
    """The load, and where the cluster is ours a rank's death in it; marks say when what happened."""
    start_s, marks = time.time(), {}

    def kill() -> None:
        marks[time.time()] = killed = f"{cluster.kill_a_rank()} killed"
        say(killed)

    happenings = ((seconds * KILL_AT, kill),) if cluster.ours else ()
    ended: Counter[str] = Load(cluster.router_address, seconds, happenings=happenings).run()
    say(f"requests as their clients saw them: {', '.join(f'{n} {what}' for what, n in sorted(ended.items()))}")
    if cluster.ours:
        _until("the replica is back", cluster.all_ready, REBUILT_DEADLINE_S)
        _until("its targets answer", lambda: _all_up(prometheus), FIRST_SCRAPE_DEADLINE_S)
    threading.Event().wait(SETTLE_S)  # the last scrapes and evaluations
    return Watch(prometheus, start_s, time.time(), STEP_S, SCRAPE_INTERVAL_S), marks


def _all_up(prometheus: Prometheus) -> bool:
    targets = prometheus.ask("targets", state="active")["activeTargets"]
    return bool(targets) and all(target["health"] == "up" for target in targets)


def _until(what: str, holds: Any, deadline_s: float) -> None:
    pause, until_s = threading.Event(), time.monotonic() + deadline_s
    while not holds():
        if time.monotonic() > until_s:
            raise MonitorError(f"It did not come about within {deadline_s:.0f} s that {what}.")
        pause.wait(0.3)


def _show(found: list[Verdict]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("kind", "what", "series", "samples", "last", "fault"):
        table.add_column(column, justify="right" if column in ("series", "samples", "last") else "left")
    for verdict in found:
        last = "" if verdict.last is None else f"{verdict.last:.4g}"
        style = "red" if verdict.fault else ""
        table.add_row(
            verdict.kind,
            verdict.what,
            str(verdict.series),
            str(verdict.samples),
            last,
            escape(verdict.fault),
            style=style,
        )
    Console(highlight=False, width=None if sys.stdout.isatty() else 140, emoji=False).print(table)


if __name__ == "__main__":
    main()
