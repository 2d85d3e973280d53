"""Desired + observed -> the answer to GetStatus. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cluster.controller.desired import Desired, DesiredModel
from cluster.controller.messages import activity_to_message
from cluster.controller.observed import Observed, RankView, ReplicaView, SlotHistory
from cluster.domain.replica import ReplicaPhase
from cluster.v1 import control_pb2


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """A process that is no rank. ``ports``: name -> port."""

    kind: str
    pid: int
    node: str
    ports: Mapping[str, int] = field(default_factory=dict)


def cluster_status(
    name: str, epoch: int, desired: Desired, observed: Observed, processes: Iterable[ProcessFacts], now_s: float
) -> control_pb2.ClusterStatus:
    return control_pb2.ClusterStatus(
        cluster_name=name,
        epoch=epoch,
        models=[_model(model, observed, now_s) for model in desired],
        replicas=[_replica(view, observed.slots.get(view.replica, SlotHistory()), now_s) for view in observed.replicas],
        processes=[
            *(control_pb2.ProcessStatus(kind=p.kind, pid=p.pid, node=p.node, ports=p.ports) for p in processes),
            *(
                _rank(view, rank, now_s)
                for view in observed.replicas
                if not view.life.ended
                for rank in view.ranks
                if rank is not None
            ),
        ],
    )


def blocked_reason(model: DesiredModel, observed: Observed, now_s: float) -> str:
    """Why fewer replicas than desired are ready; empty when all are."""
    views = observed.of_model(model.name)
    if sum(view.phase is ReplicaPhase.READY for view in views) >= model.replicas:
        return ""
    for view in views:
        if view.blocked:
            return f"{view.replica}: {view.blocked}"
    for view in views:
        if view.phase is ReplicaPhase.FAILED:
            return f"{view.replica}: {view.life.reason}"
    for replica, history in observed.slots.items():
        if replica.model == model.name and history.failures and history.pauses(model.fingerprint, now_s):
            last = f"; the last time: {history.cause}" if history.cause else ""
            pause_s = history.start_after_s - now_s
            return f"{replica} failed {history.failures} time(s), starts again in {pause_s:.1f} s{last}"
    return "replicas are starting"


def _model(model: DesiredModel, observed: Observed, now_s: float) -> control_pb2.ModelStatus:
    ready = sum(view.phase is ReplicaPhase.READY for view in observed.of_model(model.name))
    return control_pb2.ModelStatus(
        name=model.name,
        source=model.config.model,
        desired_replicas=model.replicas,
        ready_replicas=ready,
        tensor_parallel_size=model.layout.tensor_parallel_size,
        pipeline_parallel_size=model.layout.pipeline_parallel_size,
        max_model_len=model.max_model_len,
        checkpoint_digest=model.checkpoint_digest,
        blocked_reason=blocked_reason(model, observed, now_s),
    )


def _replica(view: ReplicaView, history: SlotHistory, now_s: float) -> control_pb2.ReplicaStatus:
    ranks = [rank.report for rank in view.ranks if rank is not None]
    status = control_pb2.ReplicaStatus(
        replica=str(view.replica),
        model=view.replica.model,
        slot=view.replica.slot,
        generation=view.incarnation.generation,
        phase=view.phase.value,
        phase_age_s=max(0.0, now_s - view.life.since_s),
        reason=f"{view.life.reason} ({view.blocked})" if view.blocked else view.life.reason,
        engine_address=view.engine_address,
        bytes_loaded=sum(report.bytes_loaded for report in ranks),
        bytes_total=sum(report.bytes_total for report in ranks),
        failures_in_a_row=history.failures,
    )
    if view.leader is not None:
        status.activity.CopyFrom(activity_to_message(view.leader.report.activity))
    return status


def _rank(view: ReplicaView, rank: RankView, now_s: float) -> control_pb2.ProcessStatus:
    report = rank.report
    return control_pb2.ProcessStatus(
        kind="rank",
        pid=report.pid,
        node=report.host,
        ports=report.ports,
        rank=control_pb2.RankStatus(
            replica=str(view.replica),
            rank=report.rank_id.rank,
            generation=view.incarnation.generation,
            device=report.device,
            phase=report.phase.value,
            step=report.step,
            step_age_s=report.step_age_s,
            bytes_loaded=report.bytes_loaded,
            bytes_total=report.bytes_total,
            report_age_s=max(0.0, now_s - rank.reported_at_s),
            log_file=report.log_file,
            peak_host_bytes=report.peak_host_bytes,
        ),
    )
