from __future__ import annotations

import pytest

from cluster.config.schema import ModelConfig
from cluster.controller.cluster_status import ProcessFacts, blocked_reason, cluster_status
from cluster.controller.desired import asks_the_same, model_from_json, model_to_json
from cluster.controller.messages import plan_summary, report_from_message
from cluster.controller.ray_observer import gpu_type, node_of, plannable
from cluster.controller.replica_lifecycle import ReplicaEvent
from cluster.domain.errors import ConfigError
from cluster.domain.hardware import DeviceKind
from cluster.domain.replica import RankPhase
from cluster.v1 import control_pb2
from cluster.wire.deployment import deployment_from_message, deployment_to_message
from tests.unit.controller.builders import fleet, incarnation, model, ready_fleet


def test_a_report_keeps_every_field():
    message = control_pb2.RankReport(
        model="m", slot=1, generation=2, rank=3, pid=4, node="n", host="h", device="cpu:3",
        phase=control_pb2.RANK_PHASE_WARMING_UP, step=5, step_age_s=0.5, compute_s=0.25, bytes_loaded=6, bytes_total=7,
        ports={"metrics": 8}, failure="f", log_file="l", peak_host_bytes=9, checkpoint_digest="d", block_size=16,
        waits_for_peer=True,
        needs_change=True,
        activity=control_pb2.Activity(running_sequences=1, waiting_sequences=2, kv_blocks_used=3, kv_blocks_total=4),
    )  # fmt: skip
    report = report_from_message(message)
    assert str(report.rank_id) == "m/1#2.3"
    assert report.phase is RankPhase.WARMING_UP
    assert report.ports == {"metrics": 8}
    assert report.activity.kv_blocks_total == 4
    scalars = ("pid", "host", "device", "step", "step_age_s", "compute_s", "bytes_loaded", "bytes_total", "failure",
               "log_file", "peak_host_bytes", "checkpoint_digest", "block_size", "waits_for_peer",
               "needs_change")  # fmt: skip
    assert all(getattr(report, name) == getattr(message, name) for name in scalars)


def test_every_phase_of_the_wire_is_known():
    for name, value in control_pb2.RankPhase.items():
        phase = report_from_message(control_pb2.RankReport(phase=value)).phase
        assert phase.value == (name.removeprefix("RANK_PHASE_") if value else "STARTING")


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(model="demo"),
        ModelConfig(
            model="org/m", served_model_name="m", revision="r", replicas=3, tensor_parallel_size=2, dtype="float16",
            device="cuda", max_model_len=9, max_num_seqs=8, block_size=32, kv_cache_bytes=7, pipeline_parallel_size=2,
            device_memory_utilization=0.5, max_num_waiting=3, max_num_batched_tokens=11,
        ),
    ],
)  # fmt: skip
def test_a_deployment_travels_unchanged(config):
    assert deployment_from_message(deployment_to_message(config)) == config


@pytest.mark.parametrize(
    ("wrong", "field"),
    [({"device": "tpu"}, "device"), ({"block_size": 4096}, "block_size"), ({"model": ""}, "model"),
     ({"device_memory_utilization": 2.0}, "device_memory_utilization"), ({"served_model_name": "a b"}, "served_model_name")],
)  # fmt: skip
def test_a_wrong_deployment_names_its_field(wrong, field):
    with pytest.raises(ConfigError, match=field):
        deployment_from_message(control_pb2.ModelDeployment(**{"model": "demo", **wrong}))


def test_a_desired_model_survives_json():
    wanted = model(revision="abc", tp=4)
    assert model_from_json(model_to_json(wanted)) == wanted


def test_two_configs_that_differ_in_replicas_ask_the_same():
    assert asks_the_same(ModelConfig(model="a"), ModelConfig(model="a", replicas=5))
    assert not asks_the_same(ModelConfig(model="a"), ModelConfig(model="a", block_size=32))


def test_a_plan_in_figures():
    summary = plan_summary(model())
    assert (summary.tensor_parallel_size, list(summary.weight_bytes_per_rank)) == (2, [1000, 1000])


def test_the_status_names_every_process():
    made = ready_fleet(2)
    processes = [ProcessFacts("controller", 1, "h", {"grpc": 50052}), ProcessFacts("router", 2, "h")]
    status = cluster_status("c", 9, (model(replicas=2),), made.observed(), processes, 3.0)
    assert [p.kind for p in status.processes] == ["controller", "router", "rank", "rank", "rank", "rank"]
    assert status.models[0].ready_replicas == 2
    assert status.models[0].blocked_reason == ""
    rank = status.processes[-1]
    assert (rank.rank.replica, rank.rank.rank, rank.rank.phase, rank.ports["metrics"]) == ("m/1", 1, "READY", 9101)
    assert status.replicas[0].engine_address == "10.0.0.1:50060"
    assert (status.replicas[0].bytes_loaded, status.replicas[0].bytes_total) == (2000, 2000)


def test_ranks_of_a_replica_that_ended_are_no_processes():
    made = ready_fleet()
    made.advance(incarnation(), ReplicaEvent.FAIL, "dead: rank 1 is gone", 1.0)
    status = cluster_status("c", 1, (model(),), made.observed(), [], 1.0)
    assert not status.processes
    assert "rank 1 is gone" in status.models[0].blocked_reason


def test_why_a_model_waits():
    made = fleet()
    assert blocked_reason(model(), made.observed(), 0.0) == "replicas are starting"
    made.start(incarnation(), model().fingerprint, 2, "x", 0.0)
    made.note_blocked(incarnation(), "no node has 2 devices")
    assert blocked_reason(model(), made.observed(), 0.0) == "m/0: no node has 2 devices"
    made.advance(incarnation(), ReplicaEvent.FAIL, "dead: rank 1 is gone", 1.0)
    made.removed(incarnation(), 1.0, gone=True)
    assert (
        blocked_reason(model(), made.observed(), 1.0)
        == "m/0 failed 1 time(s), starts again in 0.5 s; the last time: dead: rank 1 is gone"
    )


RAY_NODE = {
    "NodeID": "abc", "NodeManagerAddress": "10.0.0.1", "Alive": True,
    "Labels": {}, "Resources": {"CPU": 8.0, "memory": 16e9, "GPU": 4.0, "accelerator_type:A100-40G": 1.0},
}  # fmt: skip


def test_cpu_slots_share_the_nodes_memory():
    node = node_of(RAY_NODE, {"CPU": 6.0}, DeviceKind.CPU)
    assert (node.devices, node.free_devices, node.device.memory_bytes) == (8, 6, 2_000_000_000)


def test_gpus_are_known_by_rays_names():
    node = node_of(RAY_NODE, {"GPU": 4.0}, DeviceKind.CUDA)
    assert (node.device.name, node.devices) == ("a100-40", 4)
    assert gpu_type({**RAY_NODE, "Labels": {"ray.io/accelerator-type": "H100"}}).name == "h100"


def test_an_unknown_gpu_is_an_error_with_the_way_out():
    with pytest.raises(ConfigError, match="--labels"):
        gpu_type({**RAY_NODE, "Resources": {"GPU": 1.0}})


def test_a_node_without_devices_of_the_kind_is_left_out():
    assert node_of({**RAY_NODE, "Resources": {"CPU": 8.0}}, {}, DeviceKind.CUDA) is None


def test_a_gpu_that_nobody_knows_refuses_only_those_who_need_it():
    strange = {**RAY_NODE, "NodeID": "s", "Resources": {"GPU": 1.0, "CPU": 2.0, "memory": 2.0**32}, "Labels": {}}
    assert [n.device.kind for n in plannable([strange], "cpu")] == [DeviceKind.CPU]
    known = {*(n.node_id for n in plannable([strange, RAY_NODE], "cuda") if n.device.kind is DeviceKind.CUDA)}
    assert known == {RAY_NODE["NodeID"]}
    for wanted in ("cuda", "auto"):
        with pytest.raises(ConfigError, match="or choose device cpu"):
            plannable([strange], wanted)
