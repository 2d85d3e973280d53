"""Is this replica well? A pure reading of rank reports: dead, silent, hung, failed or stalled ranks by name."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.config.schema import ControllerConfig
from cluster.controller.observed import RankView, ReplicaView
from cluster.domain.quantities import format_bytes, format_seconds
from cluster.domain.replica import RankPhase, ReplicaPhase


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Why a replica must be failed. ``kind`` is a metric label: dead silent hung failed stalled late."""

    kind: str
    text: str


def diagnose(replica: ReplicaView, settings: ControllerConfig, now_s: float) -> Diagnosis | None:
    """None while every rank is well enough. A rank in trouble is named before those that wait for it."""
    waiting: Diagnosis | None = None
    for rank, view in enumerate(replica.ranks):
        found = _absent(replica, rank, settings, now_s) if view is None else _ill(view, settings, now_s)
        blames_another = view is not None and view.connected and view.report.waits_for_peer
        if found is not None and blames_another:
            waiting = waiting or found
        elif found is not None:
            return found
    return waiting


def _absent(replica: ReplicaView, rank: int, settings: ControllerConfig, now_s: float) -> Diagnosis | None:
    deadline_s = settings.rank_silence_s if replica.adopted else settings.start_deadline_s
    waited_s = now_s - replica.born_s
    if waited_s <= deadline_s:
        return None
    where = f" ({replica.blocked})" if replica.blocked else ""
    if replica.phase is ReplicaPhase.PENDING:
        return Diagnosis("late", f"could not be placed within {format_seconds(deadline_s)}{where}")
    return Diagnosis("late", f"rank {rank} has not reported within {format_seconds(deadline_s)}{where}")


def _ill(view: RankView, settings: ControllerConfig, now_s: float) -> Diagnosis | None:
    report, silent_s = view.report, now_s - view.reported_at_s
    if report.phase is RankPhase.FAILED:
        return Diagnosis("failed", f"{view.where()} failed: {report.failure or 'it did not say why'}")
    if not view.connected:
        return Diagnosis("dead", f"{view.where()} is gone: its report stream broke")
    if silent_s > settings.rank_silence_s:
        return Diagnosis("silent", f"{view.where()} has been silent for {format_seconds(silent_s)}")
    if report.step_age_s > settings.step_deadline_s:
        age = format_seconds(report.step_age_s)
        return Diagnosis("hung", f"{view.where()} hangs: step {report.step} has been running for {age}")
    return _stalled(view, settings, now_s)


def _stalled(view: RankView, settings: ControllerConfig, now_s: float) -> Diagnosis | None:
    report, idle_s = view.report, now_s - view.progress_at_s
    if report.phase is RankPhase.STARTING and idle_s > settings.start_deadline_s:
        return Diagnosis("late", f"{view.where()} has not begun to load within {format_seconds(idle_s)}")
    if report.phase in (RankPhase.LOADING, RankPhase.WARMING_UP) and idle_s > settings.load_stall_s:
        done = f"{format_bytes(report.bytes_loaded)} of {format_bytes(report.bytes_total)}"
        return Diagnosis("stalled", f"{view.where()} stands still at {done} for {format_seconds(idle_s)}")
    return None


def is_loading(replica: ReplicaView) -> bool:
    """Whether some rank has begun to read weights."""
    begun = (RankPhase.LOADING, RankPhase.WARMING_UP, RankPhase.READY)
    return any(view is not None and view.report.phase in begun for view in replica.ranks)


def is_ready(replica: ReplicaView) -> bool:
    """Every rank has warmed up, and the leader has told where it listens."""
    ready = all(view is not None and view.report.phase is RankPhase.READY for view in replica.ranks)
    return ready and bool(replica.engine_address)
