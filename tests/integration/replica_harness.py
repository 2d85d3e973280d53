"""One replica without Ray: real rank processes, a Control service that listens, a plain Engine client."""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys
import threading
from concurrent import futures
from pathlib import Path

import grpc

from cluster.checkpoint.config_json import model_spec
from cluster.checkpoint.dummy import dummy_checkpoint
from cluster.checkpoint.layout import read_checkpoint
from cluster.domain.hardware import DeviceKind
from cluster.domain.ids import Incarnation, RankId, ReplicaId
from cluster.domain.model_spec import Dtype
from cluster.domain.parallel_layout import ParallelLayout, StageLayers
from cluster.engine.rank_spec import RankSpec
from cluster.v1 import control_pb2, control_pb2_grpc, engine_pb2, engine_pb2_grpc, inference_pb2
from cluster.wire.channel import open_sync_channel

DEADLINE_S = 120
_ENTRY = "import pickle,sys,threading; from cluster.engine.rank import start_rank; start_rank(pickle.load(sys.stdin.buffer)); threading.Event().wait(600)"


def free_ports(count: int) -> list[int]:
    """All different: none is let go before the last one is found."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def split_evenly(num_layers: int, stages: int) -> tuple[StageLayers, ...]:
    ends = [num_layers * (i + 1) // stages for i in range(stages)]
    return tuple(StageLayers(start, stop) for start, stop in zip([0, *ends], ends, strict=False))


class ListeningControl(control_pb2_grpc.ControlServicer):
    def __init__(self) -> None:
        self.latest: dict[int, control_pb2.RankReport] = {}
        self.phases: dict[int, list[int]] = {}
        self.changed = threading.Condition()

    def ReportRank(self, request_iterator, context):
        for report in request_iterator:
            with self.changed:
                self.latest[report.rank] = report
                phases = self.phases.setdefault(report.rank, [])
                if not phases or phases[-1] != report.phase:
                    phases.append(report.phase)
                self.changed.notify_all()
        return control_pb2.ReportRankResponse()

    def wait_for(self, condition, deadline_s: float = DEADLINE_S) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: condition(self.latest), deadline_s), self.latest


class Replica:
    """``with Replica(folder, tp=2, pp=2) as replica: replica.generate([...])``"""

    def __init__(
        self, folder: Path, log_dir: Path, tp: int = 1, collective: str = "gloo", pp: int = 1,
        incarnation: Incarnation | None = None, **limits,
    ) -> None:  # fmt: skip
        dummy = limits.get("load_format") == "dummy"
        self.checkpoint = dummy_checkpoint(folder, limits["seed"]) if dummy else read_checkpoint(folder)
        self.log_dir = log_dir
        self._server = grpc.server(futures.ThreadPoolExecutor(16))
        self.control = ListeningControl()
        control_pb2_grpc.add_ControlServicer_to_server(self.control, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.incarnation = incarnation or Incarnation(ReplicaId("tiny", 0), 1)
        world, num_layers = tp * pp, model_spec(self.checkpoint.config, {}).num_layers
        plan_port, *ports = free_ports(1 + pp + world)
        masters, links = ports[:pp], ports[pp:]
        common = {
            "cluster_name": "test", "layout": ParallelLayout(tp, pp), "model_name": "tiny", "checkpoint_path": str(folder),
            "revision": None, "checkpoint_digest": self.checkpoint.digest, "served_digest": self.checkpoint.digest,
            "dtype": Dtype.FLOAT32, "device": DeviceKind.CPU, "collective": collective, "master_host": "127.0.0.1", "plan_host": "127.0.0.1",
            "plan_port": plan_port, "max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64,
            "max_num_waiting": 64, "block_size": 4, "kv_blocks": 128, "control_address": f"127.0.0.1:{port}",
            "bind_host": "127.0.0.1", "engine_port": 0, "metrics_port": 0, "node_id": "node", "host": "127.0.0.1",
            "threads": 1, "weight_bytes": 0, "stages": split_evenly(num_layers, pp), "next_host": "127.0.0.1",
        }  # fmt: skip
        common.update(limits)
        self.specs = [
            RankSpec(
                rank_id=RankId(self.incarnation, rank), log_file=str(log_dir / f"rank-{rank}.log"),
                master_port=masters[rank // tp], link_port=links[rank] if rank >= tp else 0,
                next_port=links[rank + tp] if rank + tp < world else 0, **common,
            )
            for rank in range(world)
        ]  # fmt: skip
        self.processes: list[subprocess.Popen] = []

    def __enter__(self):
        self._server.start()
        for spec in self.specs:
            log = (self.log_dir / f"rank-{spec.rank}.out").open("wb")
            process = subprocess.Popen([sys.executable, "-c", _ENTRY], stdin=subprocess.PIPE, stdout=log, stderr=log)
            log.close()
            process.stdin.write(pickle.dumps(spec))
            process.stdin.close()
            self.processes.append(process)
        return self

    def wait_ready(self, deadline_s: float = DEADLINE_S) -> None:
        def settled(latest):
            failed = [r.failure for r in latest.values() if r.phase == control_pb2.RANK_PHASE_FAILED]
            assert not failed, failed
            ready = [r for r in latest.values() if r.phase == control_pb2.RANK_PHASE_READY]
            return len(ready) == len(self.specs)

        self.control.wait_for(settled, deadline_s)

    def stub(self, channel) -> engine_pb2_grpc.EngineStub:
        return engine_pb2_grpc.EngineStub(channel)

    def channel(self):
        return open_sync_channel(f"127.0.0.1:{self.control.latest[0].ports['engine']}")

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait(10)
        self._server.stop(None).wait(10)
        for master_port in {spec.master_port for spec in self.specs}:
            for segment in Path("/dev/shm").glob(f"*_{master_port}_*"):
                segment.unlink()


class Session:
    """A router's session, reduced to what a test needs."""

    def __init__(self, stub: engine_pb2_grpc.EngineStub, identity=None, block_events: bool = False) -> None:
        self.identity = identity or stub.Describe(engine_pb2.DescribeRequest(), timeout=10).identity
        self._requests: list = []
        self._filled = threading.Semaphore(0)
        hello = engine_pb2.Hello(router_id="test", expected=self.identity, block_events=block_events)
        self.push(engine_pb2.SessionRequest(hello=hello))
        self.call = stub.Session(self._outgoing(), timeout=DEADLINE_S)
        self.beats = 0

    def push(self, request) -> None:
        self._requests.append(request)
        self._filled.release()

    def _outgoing(self):
        while True:
            self._filled.acquire()
            request = self._requests.pop(0)
            if request is None:
                return
            yield request

    def submit(self, *submits) -> None:
        self.push(engine_pb2.SessionRequest(commands=engine_pb2.Commands(submits=submits)))

    def cancel(self, *ids: int) -> None:
        cancels = [engine_pb2.Cancel(sequence_id=i) for i in ids]
        self.push(engine_pb2.SessionRequest(commands=engine_pb2.Commands(cancels=cancels)))

    def collect(self, ids, on_update=None):
        """Tokens and end of every sequence in ``ids``."""
        tokens = {i: [] for i in ids}
        ends = {}
        for response in self.call:
            self.beats += response.HasField("beat")
            for update in response.step.sequences:
                tokens[update.sequence_id].extend(update.token_ids)
                if update.end:
                    ends[update.sequence_id] = update.end
            if on_update:
                on_update(tokens)
            if len(ends) == len(tokens):
                return tokens, ends
        raise AssertionError("the session ended early")

    def close(self) -> None:
        self.push(None)
        self.call.cancel()


def submit(sequence_id: int, prompt, max_tokens: int = 16, generated=(), stop=(), **sampling) -> engine_pb2.Submit:
    return engine_pb2.Submit(
        sequence_id=sequence_id, attempt=1, prompt_token_ids=prompt, generated_token_ids=generated,
        sampling=inference_pb2.Sampling(max_tokens=max_tokens, seed=7, stop_token_ids=stop, **sampling),
    )  # fmt: skip
