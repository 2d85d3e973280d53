"""Values that the controller's tests share."""

from __future__ import annotations

from dataclasses import replace

from cluster.config.schema import ControllerConfig, ModelConfig
from cluster.controller.desired import DesiredModel
from cluster.controller.fleet import Fleet
from cluster.controller.observed import RankActivity, Report
from cluster.controller.replica_lifecycle import ReplicaEvent
from cluster.domain.hardware import DeviceKind, Inventory, Node, cpu_device
from cluster.domain.ids import Incarnation, RankId, ReplicaId
from cluster.domain.model_spec import Dtype
from cluster.domain.parallel_layout import ParallelLayout
from cluster.domain.replica import RankPhase

SETTINGS = ControllerConfig(
    rank_silence_s=5, step_deadline_s=60, start_deadline_s=600, load_stall_s=300, restart_backoff_s=0.5,
    restart_backoff_max_s=60, drain_deadline_s=30,
)  # fmt: skip


def model(name: str = "m", replicas: int = 1, tp: int = 2, **changes) -> DesiredModel:
    wanted = DesiredModel(
        config=ModelConfig(model=f"/models/{name}", replicas=replicas),
        replicas=replicas,
        layout=ParallelLayout(tp),
        checkpoint_path=f"/models/{name}",
        revision=None,
        checkpoint_digest="d" * 64,
        dtype=Dtype.FLOAT32,
        device=DeviceKind.CPU,
        max_model_len=128,
        kv_blocks=32,
        weight_bytes_per_rank=(1000,) * tp,
        max_concurrent_tokens=512,
    )
    return replace(wanted, **changes)


def incarnation(slot: int = 0, generation: int = 1, name: str = "m") -> Incarnation:
    return Incarnation(ReplicaId(name, slot), generation)


def report(who: Incarnation, rank: int, phase: RankPhase = RankPhase.READY, **changes) -> Report:
    ports = {"metrics": 9100 + rank, "engine": 50060} if rank == 0 else {"metrics": 9100 + rank}
    values = {
        "rank_id": RankId(who, rank), "pid": 100 + rank, "node_id": "n0", "host": "10.0.0.1", "device": f"cpu:{rank}",
        "phase": phase, "bytes_loaded": 1000, "bytes_total": 1000, "ports": ports, "activity": RankActivity(),
        "checkpoint_digest": "d" * 64, "block_size": 16,
    }  # fmt: skip
    return Report(**{**values, **changes})


def fleet(now_s: float = 0.0, **options) -> Fleet:
    return Fleet(SETTINGS, options.pop("slots", {}), now_s, **options)


def ready_fleet(slots: int = 1, now_s: float = 0.0, **options) -> Fleet:
    """``slots`` replicas of TP 2, born at ``now_s`` + slot and READY at once."""
    made = fleet(now_s, **options)
    for slot in range(slots):
        who = incarnation(slot)
        made.start(who, model().fingerprint, 2, "wanted", now_s + slot)
        made.advance(who, ReplicaEvent.PLACED, "placed", now_s + slot)
        for rank in range(2):
            made.report(report(who, rank), (slot, rank), now_s + slot)
        made.advance(who, ReplicaEvent.READY, "ready", now_s + slot)
    return made


def node(node_id: str = "n0", devices: int = 4, free: int | None = None) -> Node:
    return Node(node_id, f"host-{node_id}", cpu_device(2**32), devices, devices if free is None else free, devices)


def inventory(*nodes: Node) -> Inventory:
    return Inventory(nodes or (node(),))
