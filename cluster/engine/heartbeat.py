"""A rank's reports to the controller: twice a second, from a thread of their own, over gRPC and never through Ray.

The stream itself is part of the message: when it breaks, the process is gone. When the controller is away the rank
goes on and keeps knocking.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import grpc

from cluster.domain.replica import RankPhase
from cluster.engine.progress import RankProgress
from cluster.engine.rank_spec import RankSpec
from cluster.telemetry.metrics import RankMetrics
from cluster.v1 import control_pb2, control_pb2_grpc
from cluster.wire.channel import open_sync_channel

INTERVAL_S = 0.5
_FAREWELL_S = 3.0

_PHASES = {
    RankPhase.STARTING: control_pb2.RANK_PHASE_STARTING,
    RankPhase.LOADING: control_pb2.RANK_PHASE_LOADING,
    RankPhase.WARMING_UP: control_pb2.RANK_PHASE_WARMING_UP,
    RankPhase.READY: control_pb2.RANK_PHASE_READY,
    RankPhase.FAILED: control_pb2.RANK_PHASE_FAILED,
}


class Heartbeat:
    """Reports ``progress`` of the rank ``spec`` until ``close``. ``pid``: of this process."""

    def __init__(self, spec: RankSpec, progress: RankProgress, pid: int, metrics: RankMetrics) -> None:
        self._spec, self._progress, self._pid = spec, progress, pid
        _export(spec, progress, metrics)
        self._wake, self._closed, self._told = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def poke(self) -> None:
        """Reports now instead of at the next beat: for changes of phase."""
        self._wake.set()

    def tell_last_words(self) -> None:
        """Reports the failure that stands in ``progress`` and waits, boundedly, until it has left."""
        self._told.clear()
        self._wake.set()
        self._told.wait(_FAREWELL_S)

    def close(self) -> None:
        self._closed.set()
        self._wake.set()
        self._thread.join(timeout=_FAREWELL_S)

    def _run(self) -> None:
        while not self._closed.is_set():
            with open_sync_channel(self._spec.control_address) as channel:
                stub = control_pb2_grpc.ControlStub(channel)
                try:
                    stub.ReportRank(self._reports())
                except grpc.RpcError:
                    # The controller is away or restarting: the next round knocks again.
                    self._closed.wait(INTERVAL_S)

    def _reports(self) -> Iterator[control_pb2.RankReport]:
        while not self._closed.is_set():
            report = self._report()
            yield report
            if report.phase == control_pb2.RANK_PHASE_FAILED:
                self._told.set()
            self._wake.wait(INTERVAL_S)
            self._wake.clear()

    def _report(self) -> control_pb2.RankReport:
        spec, progress = self._spec, self._progress
        incarnation = spec.rank_id.incarnation
        report = control_pb2.RankReport(
            model=incarnation.replica.model,
            slot=incarnation.replica.slot,
            generation=incarnation.generation,
            rank=spec.rank_id.rank,
            pid=self._pid,
            node=spec.node_id,
            host=spec.host,
            device=spec.device.value,
            phase=_PHASES[progress.phase],
            step=progress.step,
            step_age_s=progress.step_age_s(),
            compute_s=progress.compute_s,
            bytes_loaded=progress.bytes_loaded,
            bytes_total=progress.bytes_total,
            ports=progress.ports,
            failure=progress.failure,
            log_file=spec.log_file,
            peak_host_bytes=progress.peak_host_bytes,
            checkpoint_digest=spec.served_digest,
            block_size=spec.block_size,
            waits_for_peer=progress.waits_for_peer,
            needs_change=progress.needs_change,
        )
        if spec.rank_id.rank == 0:
            load = progress.load
            report.activity.running_sequences = load.running_sequences
            report.activity.waiting_sequences = load.waiting_sequences
            report.activity.kv_blocks_used = load.kv_blocks_used
            report.activity.kv_blocks_total = load.kv_blocks_total
        return report


def _export(spec: RankSpec, progress: RankProgress, metrics: RankMetrics) -> None:
    """Asked at each scrape: true even while no report leaves, or the compute thread hangs."""
    replica, rank = spec.rank_id.incarnation.replica, str(spec.rank_id.rank)
    who = (str(replica), rank)
    metrics.info.labels(replica.model, *who, spec.host, spec.device.value).set(1)
    metrics.step.labels(*who).set_function(lambda: progress.step)
    metrics.step_age.labels(*who).set_function(progress.step_age_s)
    metrics.bytes_loaded.labels(*who).set_function(lambda: progress.bytes_loaded)
    metrics.bytes_total.labels(*who).set_function(lambda: progress.bytes_total)
    metrics.peak_host_bytes.labels(*who).set_function(lambda: progress.peak_host_bytes)
    for phase in RankPhase:
        metrics.state.labels(*who, spec.host, phase.value).set_function(partial(_is_in, progress, phase))


def _is_in(progress: RankProgress, phase: RankPhase) -> bool:
    return progress.phase is phase
