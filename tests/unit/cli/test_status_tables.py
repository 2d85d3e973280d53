"""What ``status`` shows."""

from __future__ import annotations

import io
import json

from rich.console import Console

from cluster.cli.status import plain, render_status, wide_console
from cluster.v1 import control_pb2

STATUS = control_pb2.ClusterStatus(
    models=[
        control_pb2.ModelStatus(
            name="demo", desired_replicas=2, ready_replicas=1, tensor_parallel_size=2, pipeline_parallel_size=1,
            max_model_len=512, checkpoint_digest="0123456789abcdef", blocked_reason="no node has room",
        )
    ],
    replicas=[
        control_pb2.ReplicaStatus(
            replica="demo/0", generation=3, phase="READY", phase_age_s=90, bytes_loaded=2**20, bytes_total=2**20,
            engine_address="127.0.0.1:50060", reason="every rank is ready",
            activity=control_pb2.Activity(running_sequences=4, waiting_sequences=1, kv_blocks_used=5, kv_blocks_total=9),
        )
    ],
    processes=[
        control_pb2.ProcessStatus(kind="router", pid=11, node="h", ports={"grpc": 50051, "metrics": 9100}),
        control_pb2.ProcessStatus(
            kind="rank", pid=12, node="n" * 40,
            rank=control_pb2.RankStatus(replica="demo/0", rank=1, generation=3, device="cpu:1", phase="READY", step=77),
        ),
    ],
)  # fmt: skip


def shown(status: control_pb2.ClusterStatus) -> list[str]:
    page = io.StringIO()
    Console(file=page, width=200).print(render_status(status))
    return [" ".join(line.split()) for line in page.getvalue().splitlines()]


def line_with(word: str) -> str:
    (found,) = [line for line in shown(STATUS) if word in line]
    return found


def test_a_model_with_what_blocks_it():
    assert line_with("TP2 x PP1") == "demo 1/2 TP2 x PP1 512 0123456789ab no node has room"


def test_a_replica_with_its_load():
    line = line_with("demo/0#3 ")
    for part in ("READY", "1.05 MB/1.05 MB", "4/1", "5/9", "127.0.0.1:50060", "every rank is ready"):
        assert part in line


def test_every_process_with_its_ports():
    assert "11 h grpc:50051 metrics:9100" in line_with("router")
    assert "READY on cpu:1 77" in line_with("rank demo/0#3.1 12 nnnnnnnnnnnn")


def test_an_empty_cluster_has_tables_too():
    assert any("model" in line for line in shown(control_pb2.ClusterStatus()))


def test_a_pipe_gets_wide_tables():
    assert wide_console().width >= 140


def test_json_keeps_numbers_numbers_and_names_every_field():
    process = control_pb2.ProcessStatus(
        kind="rank", pid=7, ports={"engine": 50060}, rank=control_pb2.RankStatus(generation=2**40, step=3)
    )
    status = control_pb2.ClusterStatus(cluster_name="c", epoch=2**33, processes=[process])
    values = json.loads(json.dumps(plain(status)))
    assert values["epoch"] == 2**33
    assert values["models"] == []
    assert values["processes"][0]["ports"] == {"engine": 50060}
    assert values["processes"][0]["rank"]["generation"] == 2**40
    assert values["processes"][0]["rank"]["bytes_loaded"] == 0
