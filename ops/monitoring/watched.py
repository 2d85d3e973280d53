"""The cluster that is watched: one that runs already, or the demo, started and stopped as a user would."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.client.control import ControlClient
from cluster.client.local_cluster import load_local
from cluster.v1 import control_pb2
from ops.monitoring.prometheus import MonitorError
from ops.monitoring.rules import ROOT

START_DEADLINE_S = 150.0
STOP_DEADLINE_S = 90.0
LLM_CLUSTER = (sys.executable, "-m", "cluster")


@dataclass(frozen=True, slots=True)
class Watched:
    """Where it is. ``ours``: started by us, so that we may break it."""

    control_address: str
    router_address: str
    ours: bool

    def status(self) -> control_pb2.ClusterStatus:
        with ControlClient(self.control_address) as control:
            return control.status()

    def targets_url(self) -> str:
        for process in self.status().processes:
            if process.kind == "controller" and "metrics" in process.ports:
                return f"http://{process.node}:{process.ports['metrics']}/targets"
        raise MonitorError("The controller tells no metrics port.")

    def all_ready(self) -> bool:
        models = self.status().models
        return bool(models) and all(model.ready_replicas >= model.desired_replicas for model in models)

    def kill_a_rank(self) -> str:
        """A follower of the last replica dies as if its machine had failed; says which."""
        assert self.ours, "nobody breaks what somebody else runs"
        ranks = [p for p in self.status().processes if p.kind == "rank" and p.rank.phase == "READY"]
        victim = max(ranks, key=lambda process: (process.rank.replica, process.rank.rank))
        os.kill(victim.pid, signal.SIGKILL)
        return f"rank {victim.rank.rank} of {victim.rank.replica}"


def running_under(run_dir: Path) -> Watched:
    local = load_local(run_dir)
    if local is None:
        raise MonitorError(f"No cluster runs under {run_dir}.")
    return Watched(local.control_address, local.router_address, ours=False)


@contextmanager
def demo(*, keep: bool) -> Iterator[tuple[Watched, Path]]:
    """The demo model, 2 replicas x TP 2, in a run directory of its own and on free ports; ``keep``: not stopped."""
    run_dir = Path(tempfile.mkdtemp(prefix="llm-monitor.", dir="/tmp"))  # short: unix sockets lie below it
    environment = {**os.environ, "LLM_CLUSTER_CONTROLLER__PORT": "0", "LLM_CLUSTER_CONTROLLER__ENGINE_PORT": "0"}
    serve = (*LLM_CLUSTER, "serve", "demo", "--replicas", "2", "-tp", "2", "--detach", "--port", "0")
    finished = False
    try:
        _run((*serve, "--run-dir", str(run_dir)), environment, START_DEADLINE_S)
        local = load_local(run_dir)
        assert local is not None, "it said that it is ready"
        yield Watched(local.control_address, local.router_address, ours=True), run_dir
        finished = True
    finally:
        if not (keep and finished):
            if load_local(run_dir) is not None:
                stop = (*LLM_CLUSTER, "stop", "--drain-deadline-s", "2", "--run-dir", str(run_dir))
                _run(stop, environment, STOP_DEADLINE_S)
            shutil.rmtree(run_dir, ignore_errors=True)


def _run(command: tuple[str, ...], environment: dict[str, str], deadline_s: float) -> None:
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=deadline_s, check=False
    )
    if done.returncode:
        words = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise MonitorError(f"llm-cluster {command[3]} failed with exit code {done.returncode}:\n{words}")
