"""The controller on two Ray nodes, which are two addresses of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from controller_site import Site, running_site

from cluster.controller import ray_start
from cluster.v1 import control_pb2

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with running_site(num_cpus=4, host="127.0.0.2") as running:
        yield running


def test_a_node_that_is_lost_takes_its_replica_elsewhere(site: Site, tmp_path: Path):
    site.apply()
    site.until_replicas({"demo/0": (1, "READY")})
    head = ray_start.load_node(site.run_dir)
    kept = site.replicas()["demo/0"]
    worker = ray_start.start_worker(
        head.address,
        tmp_path,
        host="127.0.0.3",
        num_cpus=4,
        token_file=Path(head.token_file),
        object_store_bytes=80_000_000,
    )
    try:
        site.control.Scale(control_pb2.ScaleRequest(model="demo", replicas=2), timeout=30)
        site.until(lambda: site.replicas().get("demo/1", (0, ""))[1] == "READY")
        nodes = {p.rank.replica: p.node for p in site.status().processes if p.kind == "rank"}
        assert nodes["demo/0"] != nodes["demo/1"]  # replicas of one model keep apart
        generation = site.replicas()["demo/1"][0]
        raylet = next(p for pid, _ in worker.processes if (p := psutil.Process(pid)).name() == "raylet")
        raylet.kill()
        site.until_replicas({"demo/0": kept, "demo/1": (generation + 1, "READY")})
        assert site.marked_processes() == site.rank_pids()
        site.control.Shutdown(control_pb2.ShutdownRequest(drain_deadline_s=0), timeout=90)
        assert site.marked_processes() == []
    finally:
        ray_start.stop_node(tmp_path)
