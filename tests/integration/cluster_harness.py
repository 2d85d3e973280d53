"""A whole cluster as `serve` builds it, on ports of its own, and a client that knows nothing but reflection."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
from controller_site import still_runs
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from cluster.assembly import start_cluster, stop_cluster
from cluster.client.control import ControlClient
from cluster.client.local_cluster import LocalCluster
from cluster.config.schema import ClusterConfig, ControllerConfig, ModelConfig, RouterConfig
from cluster.controller import ray_start
from cluster.controller.rank_marker import RANK_VARIABLE, RUN_VARIABLE

READY_DEADLINE_S = 240


class ReflectedClient:
    """What a stranger with grpcio and reflection can do."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address)
        self._pool = DescriptorPool(ProtoReflectionDescriptorDatabase(self.channel))

    def message(self, name: str):
        return GetMessageClass(self._pool.FindMessageTypeByName(f"cluster.v1.{name}"))

    def request(self, token_ids=None, text=None, max_tokens=16, model="", **fields):
        request = self.message("GenerateRequest")(model=model, return_token_ids=True, **fields)
        request.sampling.max_tokens = max_tokens
        if text is not None:
            request.text = text
        else:
            request.token_ids.ids.extend(token_ids)
        return request

    def stream(self, request, timeout=120):
        call = self.channel.unary_stream(
            "/cluster.v1.Inference/Generate",
            request_serializer=lambda m: m.SerializeToString(),
            response_deserializer=self.message("GenerateResponse").FromString,
        )
        return call(request, timeout=timeout)

    def tokens(self, request, timeout=120):
        """(token ids, End message)."""
        tokens, end = [], None
        for response in self.stream(request, timeout):
            tokens.extend(response.chunk.token_ids)
            if response.HasField("end"):
                end = response.end
        return tokens, end

    def close(self) -> None:
        self.channel.close()


@dataclass
class RunningCluster:
    local: LocalCluster
    run_dir: Path
    control: ControlClient
    client: ReflectedClient

    def replicas(self) -> dict[str, tuple[int, str]]:
        return {r.replica: (r.generation, r.phase) for r in self.control.status().replicas}

    def ranks(self, replica: str) -> dict[int, int]:
        """rank -> pid of the replica's newest generation."""
        processes = [p for p in self.control.status().processes if p.kind == "rank" and p.rank.replica == replica]
        newest = max(p.rank.generation for p in processes)
        return {p.rank.rank: p.pid for p in processes if p.rank.generation == newest}

    def until(self, what: Callable[[], bool], deadline_s: float = READY_DEADLINE_S) -> None:
        end, pause = time.monotonic() + deadline_s, threading.Event()
        while not what():
            assert time.monotonic() < end, self.control.status()
            pause.wait(0.1)

    def until_ready(self, deadline_s: float = READY_DEADLINE_S) -> None:
        """Everything that is desired is READY, nothing else is there, and the router knows."""

        def settled() -> bool:
            status = self.control.status()
            wanted = sum(m.desired_replicas for m in status.models)
            return [r.phase for r in status.replicas] == ["READY"] * wanted and wanted > 0

        self.until(settled, deadline_s)
        names = {m.name: m.desired_replicas for m in self.control.status().models}
        self.until(lambda: self.ready_by_router() == names, 30)

    def ready_by_router(self) -> dict[str, int]:
        call = self.client.channel.unary_unary(
            "/cluster.v1.Inference/ListModels",
            request_serializer=lambda m: m.SerializeToString(),
            response_deserializer=self.client.message("ListModelsResponse").FromString,
        )
        models = call(self.client.message("ListModelsRequest")(), timeout=10).models
        return {m.name: m.ready_replicas for m in models}

    def apply(self, *models: ModelConfig) -> None:
        self.control.apply(models)
        self.until_ready()

    def idle(self) -> bool:
        activities = [r.activity for r in self.control.status().replicas]
        return all(a.running_sequences == a.waiting_sequences == a.kv_blocks_used == 0 for a in activities)

    def metrics_of(self, kind: str) -> str:
        process = next(p for p in self.control.status().processes if p.kind == kind)
        with urllib.request.urlopen(f"http://127.0.0.1:{process.ports['metrics']}/metrics", timeout=10) as answer:
            return answer.read().decode()

    def marked_processes(self) -> list[int]:
        """Rank processes of this run directory, by their environment: what a stop must leave none of."""
        return marked_processes(self.run_dir)


def marked_processes(run_dir: Path) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except psutil.Error:
            continue
        if RANK_VARIABLE in environment and environment.get(RUN_VARIABLE) == str(run_dir):
            found.append(process.pid)
    return found


def assert_nothing_is_left(run_dir: Path, node: ray_start.RayNode, local: LocalCluster) -> None:
    """No rank, no process of Ray or router, no segment of shared memory."""
    assert marked_processes(run_dir) == []
    assert [pid for pid, started in node.processes if still_runs(pid, started)] == []
    assert not still_runs(local.router_pid, local.router_started_s)
    assert orphaned_segments(local.rank_ports) == []


def orphaned_segments(ports: tuple[int, int]) -> list[str]:
    """Of the ranks' all-reduce, under our ports, mapped by nobody: a cluster beside this one may have some that are."""
    segments = Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*")
    found = [s.name for s in segments if ports[0] <= int(s.name.rsplit("_", 2)[1]) <= ports[1]]
    mapped = "".join(maps_of(pid) for pid in psutil.pids()) if found else ""
    return [name for name in found if name not in mapped]


def maps_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:
        return ""


@contextmanager
def running_cluster(*models: ModelConfig, cpu_slots: int, **router) -> Iterator[RunningCluster]:
    run_dir = Path(tempfile.mkdtemp(prefix="llmc-"))
    config = ClusterConfig(
        models=models,
        router=RouterConfig(port=0, metrics_port=0, **router),
        controller=ControllerConfig(
            port=0, metrics_port=0, engine_port=0, cpu_slots=cpu_slots, restart_backoff_s=0.1, drain_deadline_s=5
        ),
    )
    try:
        local = start_cluster(config, run_dir, None, lambda _: None)
        node = ray_start.load_node(run_dir)
        try:
            with ControlClient(local.control_address) as control:
                client = ReflectedClient(local.router_address)
                running = RunningCluster(local, run_dir, control, client)
                running.until_ready()
                yield running
                client.close()
        finally:
            stop_cluster(run_dir, 2.0, lambda _: None)
            assert_nothing_is_left(run_dir, node, local)
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)
