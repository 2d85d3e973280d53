"""cluster.v1 Control messages <-> the controller's own types."""

from __future__ import annotations

from cluster.controller.desired import DesiredModel
from cluster.controller.observed import RankActivity, Report
from cluster.domain.ids import Incarnation, RankId, ReplicaId
from cluster.domain.replica import RankPhase
from cluster.v1 import control_pb2

_PHASES = {
    control_pb2.RANK_PHASE_STARTING: RankPhase.STARTING,
    control_pb2.RANK_PHASE_LOADING: RankPhase.LOADING,
    control_pb2.RANK_PHASE_WARMING_UP: RankPhase.WARMING_UP,
    control_pb2.RANK_PHASE_READY: RankPhase.READY,
    control_pb2.RANK_PHASE_FAILED: RankPhase.FAILED,
}


def report_from_message(message: control_pb2.RankReport) -> Report:
    incarnation = Incarnation(ReplicaId(message.model, message.slot), message.generation)
    return Report(
        rank_id=RankId(incarnation, message.rank),
        pid=message.pid,
        node_id=message.node,
        host=message.host,
        device=message.device,
        phase=_PHASES.get(message.phase, RankPhase.STARTING),
        step=message.step,
        step_age_s=message.step_age_s,
        compute_s=message.compute_s,
        bytes_loaded=message.bytes_loaded,
        bytes_total=message.bytes_total,
        ports=dict(message.ports),
        failure=message.failure,
        log_file=message.log_file,
        peak_host_bytes=message.peak_host_bytes,
        activity=RankActivity(
            running_sequences=message.activity.running_sequences,
            waiting_sequences=message.activity.waiting_sequences,
            kv_blocks_used=message.activity.kv_blocks_used,
            kv_blocks_total=message.activity.kv_blocks_total,
        ),
        checkpoint_digest=message.checkpoint_digest,
        block_size=message.block_size,
        waits_for_peer=message.waits_for_peer,
        needs_change=message.needs_change,
    )


def activity_to_message(activity: RankActivity) -> control_pb2.Activity:
    return control_pb2.Activity(
        running_sequences=activity.running_sequences,
        waiting_sequences=activity.waiting_sequences,
        kv_blocks_used=activity.kv_blocks_used,
        kv_blocks_total=activity.kv_blocks_total,
    )


def plan_summary(model: DesiredModel) -> control_pb2.PlanSummary:
    return control_pb2.PlanSummary(
        model=model.name,
        tensor_parallel_size=model.layout.tensor_parallel_size,
        pipeline_parallel_size=model.layout.pipeline_parallel_size,
        weight_bytes_per_rank=model.weight_bytes_per_rank,
        max_concurrent_tokens=model.max_concurrent_tokens,
    )
