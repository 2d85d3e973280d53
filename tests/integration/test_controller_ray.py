"""The controller on a real Ray cluster, with ranks that only report: one cluster for the whole module, in order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from controller_site import Site, running_site

import cluster
from cluster.controller import ray_start
from cluster.v1 import control_pb2

pytestmark = pytest.mark.integration
ASKS_A_WORKER = """
import importlib, sys
from pathlib import Path
from cluster.controller import ray_start
address, token_file, folder = sys.argv[1:]
sys.path.append(folder)
ray_start.connect(address, token_file=Path(token_file))
import ray
found = ray.remote(num_cpus=0)(lambda: importlib.import_module("cluster").__file__)
print(ray.get(found.remote(), timeout=30))
ray_start.disconnect()
"""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with running_site(num_cpus=8) as running:
        yield running


def test_ray_listens_on_loopback_only_and_its_token_is_private(site: Site):
    node = ray_start.load_node(site.run_dir)
    assert ray_start.is_alive(node)
    assert Path(node.token_file).stat().st_mode & 0o777 == 0o600
    for pid, _ in node.processes:
        for connection in psutil.Process(pid).net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip in ("127.0.0.1", "::ffff:127.0.0.1"), connection


def test_workers_run_this_package_whatever_the_folder_of_the_command_holds(site: Site, tmp_path: Path):
    (tmp_path / "cluster.py").write_text("raise RuntimeError('not this one')")
    node = ray_start.load_node(site.run_dir)
    done = subprocess.run(
        [sys.executable, "-P", "-c", ASKS_A_WORKER, node.address, node.token_file, str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [cluster.__file__]


def test_a_wrong_model_changes_nothing(site: Site):
    spec = control_pb2.ClusterSpec(models=[control_pb2.ModelDeployment(model="./no-such-directory")])
    with pytest.raises(grpc.RpcError) as refused:
        site.control.Apply(control_pb2.ApplyRequest(spec=spec), timeout=30)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "does not exist" in refused.value.details()
    assert not site.status().models


def test_a_layout_that_does_not_fit_is_a_failed_precondition(site: Site):
    with pytest.raises(grpc.RpcError) as refused:
        site.apply(replicas=5)  # ten ranks on eight slots
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert not site.status().models


def test_apply_brings_a_replica_to_ready(site: Site):
    answer = site.apply()
    assert len(answer.plans[0].weight_bytes_per_rank) == 2
    site.until_replicas({"demo/0": (1, "READY")})
    status = site.status()
    assert site.placement_groups() == ["llm-cluster/demo/0#1"]
    assert sorted(site.rank_pids()) == site.marked_processes()
    replica = status.replicas[0]
    assert replica.bytes_loaded == replica.bytes_total == sum(answer.plans[0].weight_bytes_per_rank)
    assert replica.engine_address.startswith("127.0.0.1:")
    assert status.models[0].ready_replicas == 1
    assert status.models[0].blocked_reason == ""
    assert site.controller().ports["grpc"] == int(site.address.rpartition(":")[2])


def test_the_same_apply_leaves_processes_alone(site: Site):
    before = site.rank_pids()
    site.apply()
    assert site.replicas() == {"demo/0": (1, "READY")}
    assert site.rank_pids() == before


def test_routers_get_the_table_and_are_listed(site: Site):
    request = control_pb2.WatchEndpointsRequest(router_id="r", pid=4711, node="here", ports={"grpc": 50051})
    tables = site.control.WatchEndpoints(request, timeout=60)
    table = next(tables)
    assert [e.address for e in table.endpoints] == [site.status().replicas[0].engine_address]
    assert list(table.models) == ["demo"]
    assert [p.pid for p in site.status().processes if p.kind == "router"] == [4711]
    tables.cancel()
    site.until(lambda: not [p for p in site.status().processes if p.kind == "router"])


def test_fault_free_steady_state_asks_ray_for_nothing(site: Site):
    before = site.ray_calls()
    end, polls, pause = time.monotonic() + 3.0, 0, threading.Event()
    while time.monotonic() < end:
        site.status()
        polls += 1
        pause.wait(0.02)
    assert polls > 20
    assert before > 0
    assert site.ray_calls() == before


def test_kill_9_of_a_rank_rebuilds_the_replica_under_the_next_generation(site: Site):
    old = site.rank_pids()
    os.kill(next(p.pid for p in site.status().processes if p.kind == "rank" and p.rank.rank == 1), signal.SIGKILL)
    site.until(lambda: site.replicas().get("demo/0") != (1, "READY"), deadline_s=2.0)
    site.until_replicas({"demo/0": (2, "READY")})
    assert not set(old) & set(site.marked_processes())
    assert site.placement_groups() == ["llm-cluster/demo/0#2"]
    ports = [int(site.spec_of(0, g, 0).split("master_port=")[1].split(",")[0]) for g in (1, 2)]
    assert ports[0] != ports[1]
    story = [json.loads(line) for line in site.log().splitlines()]
    failed = next(line for line in story if line.get("after") == "FAILED")
    assert "dead" in failed["caused_by"]
    assert failed["story"]


@pytest.mark.parametrize(("kind", "word"), [("fail", "told to fail"), ("hang", "hangs"), ("silent", "silent")])
def test_a_rank_that_misbehaves_fails_its_replica(site: Site, kind: str, word: str):
    generation = site.replicas()["demo/0"][0]
    site.fault(0, generation, 1, kind)
    site.until_replicas({"demo/0": (generation + 1, "READY")})
    causes = [json.loads(line)["caused_by"] for line in site.log().splitlines()]
    assert any(word in cause for cause in causes), causes


def test_scale_up_and_down(site: Site):
    kept = site.replicas()["demo/0"]
    site.control.Scale(control_pb2.ScaleRequest(model="demo", replicas=2), timeout=30)
    site.until_replicas({"demo/0": kept, "demo/1": (1, "READY")})
    assert len(site.placement_groups()) == 2
    site.control.Scale(control_pb2.ScaleRequest(model="demo", replicas=1), timeout=30)
    site.until_replicas({"demo/0": kept})
    assert len(site.placement_groups()) == 1
    assert site.marked_processes() == site.rank_pids()


def test_an_operators_drain_replaces_the_replica(site: Site):
    generation = site.replicas()["demo/0"][0]
    site.fault(0, generation, 0, "busy")
    site.until(lambda: site.status().replicas[0].activity.running_sequences == 1)
    site.control.Drain(control_pb2.DrainRequest(replica="demo/0", deadline_s=2.5), timeout=30)
    assert site.replicas()["demo/0"] == (generation, "DRAINING")
    site.until_replicas({"demo/0": (generation + 1, "READY")})
    assert "drain deadline reached" in site.log()


def test_kill_9_of_the_controller_keeps_the_replicas(site: Site):
    replicas, pids, status = site.replicas(), site.rank_pids(), site.status()
    killed = site.controller().pid
    os.kill(killed, signal.SIGKILL)
    site.until(lambda: site.controller().pid != killed)
    site.until_replicas(replicas)
    assert site.rank_pids() == pids
    assert site.status().epoch > status.epoch
    table = next(site.control.WatchEndpoints(control_pb2.WatchEndpointsRequest(router_id="r"), timeout=30))
    assert [e.generation for e in table.endpoints] == [generation for generation, _ in replicas.values()]
    assert table.epoch >= site.status().epoch


def test_a_rank_that_dies_while_the_controller_is_away_is_noticed(site: Site):
    (generation, _), pids = site.replicas()["demo/0"], site.rank_pids()
    os.kill(site.controller().pid, signal.SIGKILL)
    os.kill(pids[1], signal.SIGKILL)
    site.until_replicas({"demo/0": (generation + 1, "READY")})
    assert not set(pids) & set(site.marked_processes())


def test_shutdown_leaves_nothing(site: Site):
    segment = Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_23990_0")
    segment.write_bytes(b"left behind by a rank that is dead")
    os.utime(segment, (1.0, 1.0))
    controller = site.controller().pid
    site.control.Shutdown(control_pb2.ShutdownRequest(drain_deadline_s=5), timeout=90)
    assert site.marked_processes() == []
    assert site.placement_groups() == []
    assert not segment.exists()
    end, pause = time.monotonic() + 20, threading.Event()
    while psutil.pid_exists(controller) and time.monotonic() < end:
        pause.wait(0.1)
    assert not psutil.pid_exists(controller)


def test_a_rank_dies_with_its_raylet_even_when_it_cannot_act(site: Site):
    import ray

    from cluster.controller.rank_actor import RankActor

    actor = ray.remote(RankActor).options(num_cpus=1, max_concurrency=2).remote()
    pid = ray.get(actor.prepare.remote("127.0.0.1", ()), timeout=60).pid
    rank = psutil.Process(pid)
    raylet = rank.parent()
    assert raylet.name() == "raylet"
    rank.suspend()  # it cannot notice anything by itself now
    raylet.kill()
    gone, alive = psutil.wait_procs([rank], timeout=10)
    assert not alive or rank.status() == psutil.STATUS_ZOMBIE, (gone, alive)
