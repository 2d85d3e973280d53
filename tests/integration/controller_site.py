"""A running cluster of ranks that only report, and what tests ask of it."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest

from cluster.config.process_identity import find_process
from cluster.config.schema import ClusterConfig, ControllerConfig
from cluster.controller import ray_start
from cluster.controller.rank_marker import RANK_VARIABLE, RUN_VARIABLE
from cluster.v1 import control_pb2, control_pb2_grpc
from cluster.wire.channel import open_sync_channel

FAKES = Path(__file__).parent / "fakes"
MODEL = "demo"


class Site:
    """A running cluster and what tests ask of it."""

    def __init__(self, run_dir: Path, address: str) -> None:
        self.run_dir = run_dir
        self.address = address
        self.channel = open_sync_channel(address)
        self.control = control_pb2_grpc.ControlStub(self.channel)

    def apply(self, **settings: object) -> control_pb2.ApplyResponse:
        deployment = control_pb2.ModelDeployment(model=MODEL, **{"tensor_parallel_size": 2, **settings})
        spec = control_pb2.ClusterSpec(models=[deployment])
        return self.control.Apply(control_pb2.ApplyRequest(spec=spec), timeout=60)

    def status(self) -> control_pb2.ClusterStatus:
        return self.control.GetStatus(control_pb2.GetStatusRequest(), timeout=30, wait_for_ready=True)

    def replicas(self) -> dict[str, tuple[int, str]]:
        return {r.replica: (r.generation, r.phase) for r in self.status().replicas}

    def rank_pids(self) -> list[int]:
        return sorted(p.pid for p in self.status().processes if p.kind == "rank")

    def controller(self) -> control_pb2.ProcessStatus:
        return next(p for p in self.status().processes if p.kind == "controller")

    def until(self, what: Callable[[], bool], deadline_s: float = 60.0) -> None:
        end, pause = time.monotonic() + deadline_s, threading.Event()
        while time.monotonic() < end:
            try:
                if what():
                    return
            except grpc.RpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise
            pause.wait(0.05)
        raise AssertionError(f"not within {deadline_s} s; {self.status()}\n{self.log()}")

    def until_replicas(self, wanted: dict[str, tuple[int, str]]) -> None:
        self.until(lambda: self.replicas() == wanted)

    def log(self) -> str:
        return (self.run_dir / "logs" / "controller.log").read_text()

    def spec_of(self, slot: int, generation: int, rank: int) -> str:
        return (self.run_dir / "logs" / f"rank-demo-{slot}-g{generation}-r{rank}.log").read_text()

    def fault(self, slot: int, generation: int, rank: int, kind: str) -> None:
        (self.run_dir / "logs" / f"fault-{slot}-{generation}-{rank}").write_text(kind)

    def ray_calls(self) -> float:
        port = self.controller().ports["metrics"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        lines = [line for line in text.splitlines() if line.startswith("cluster_controller_ray_calls_total")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def placement_groups(self) -> list[str]:
        from ray.util.placement_group import placement_group_table

        return sorted(g["name"] for g in placement_group_table().values() if g["state"] != "REMOVED")

    def marked_processes(self) -> list[int]:
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
            except (psutil.Error, OSError):
                continue
            if RANK_VARIABLE in environment and environment.get(RUN_VARIABLE) == str(self.run_dir):
                found.append(process.pid)
        return sorted(found)


@contextmanager
def running_site(num_cpus: int, host: str = "127.0.0.1") -> Iterator[Site]:
    """Ray on ``host`` and a controller; afterwards nothing of either is left."""
    run_dir = Path(tempfile.mkdtemp(prefix="llmc-")).resolve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(FAKES))
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
        node = ray_start.start_head(run_dir, num_cpus=num_cpus, host=host, object_store_bytes=80_000_000)
        try:
            patch.setenv("RAY_AUTH_TOKEN_PATH", node.token_file)
            ray_start.connect(node.address, token_file=Path(node.token_file))
            from cluster.controller.controller_actor import start_controller

            settings = ControllerConfig(port=0, metrics_port=0, rank_silence_s=3.0)
            address = start_controller(ClusterConfig(controller=settings), run_dir, "llm_cluster_fake_rank:start_rank")
            site = Site(run_dir, address)
            yield site
            site.channel.close()
        finally:
            ray_start.disconnect()
            ray_start.stop_node(run_dir)
    assert not [pid for pid, started in node.processes if still_runs(pid, started)]
    shutil.rmtree(run_dir)


def still_runs(pid: int, started: float) -> bool:
    return find_process(pid, started) is not None
