"""A rank without a model: it reports as a real one does, and misbehaves when a file beside its log says so."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc

from cluster.engine.rank_spec import RankSpec
from cluster.v1 import control_pb2, control_pb2_grpc

PERIOD_S = 0.1
PHASES = (
    control_pb2.RANK_PHASE_STARTING,
    control_pb2.RANK_PHASE_LOADING,
    control_pb2.RANK_PHASE_LOADING,
    control_pb2.RANK_PHASE_WARMING_UP,
    control_pb2.RANK_PHASE_READY,
)


def start_rank(spec: RankSpec) -> None:
    Path(spec.log_file).parent.mkdir(parents=True, exist_ok=True)
    Path(spec.log_file).write_text(repr(spec))
    threading.Thread(target=FakeRank(spec).run, daemon=True).start()


class FakeRank:
    def __init__(self, spec: RankSpec) -> None:
        self.spec = spec
        self.ticks = 0
        self.silent = threading.Event()

    def run(self) -> None:
        pause = threading.Event()
        while True:
            with grpc.insecure_channel(self.spec.control_address, options=(("grpc.enable_http_proxy", 0),)) as channel:
                try:
                    control_pb2_grpc.ControlStub(channel).ReportRank(self.reports())
                except grpc.RpcError:
                    pause.wait(PERIOD_S)

    def reports(self) -> Iterator[control_pb2.RankReport]:
        pause = threading.Event()
        while True:
            fault = self.fault()
            if fault != "silent":
                yield self.report(fault)
            self.ticks += 1
            pause.wait(PERIOD_S)

    def fault(self) -> str:
        incarnation = self.spec.rank_id.incarnation
        name = f"fault-{incarnation.replica.slot}-{incarnation.generation}-{self.spec.rank_id.rank}"
        try:
            return (Path(self.spec.log_file).parent / name).read_text()
        except FileNotFoundError:
            return ""

    def report(self, fault: str) -> control_pb2.RankReport:
        spec, incarnation = self.spec, self.spec.rank_id.incarnation
        phase = PHASES[min(self.ticks, len(PHASES) - 1)]
        if fault == "fail":
            phase = control_pb2.RANK_PHASE_FAILED
        return control_pb2.RankReport(
            model=incarnation.replica.model,
            slot=incarnation.replica.slot,
            generation=incarnation.generation,
            rank=spec.rank_id.rank,
            pid=os.getpid(),
            node=spec.node_id,
            host=spec.host,
            device=f"cpu:{spec.rank_id.rank}",
            phase=phase,
            step=7,
            step_age_s=1000.0 if fault == "hang" else 0.0,
            bytes_loaded=spec.weight_bytes if self.ticks >= 3 else 0,
            bytes_total=spec.weight_bytes,
            ports={"metrics": 1, "engine": spec.plan_port} if spec.is_leader else {"metrics": 1},
            failure="the fake was told to fail" if fault == "fail" else "",
            log_file=spec.log_file,
            activity=control_pb2.Activity(
                running_sequences=1 if fault == "busy" else 0, kv_blocks_total=spec.kv_blocks
            ),
            checkpoint_digest=spec.served_digest,
            block_size=spec.block_size,
        )
