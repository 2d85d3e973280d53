"""One rank's process, from a RankSpec to READY and through its life.

The compute thread goes STARTING (imports, rendezvous) -> LOADING (its shard) -> WARMING_UP -> READY; the heartbeat
tells the controller, from outside it. Whatever breaks is reported and ends the process: nobody unwinds a broken
collective, the replica is rebuilt as a whole.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from cluster.checkpoint.config_json import model_spec
from cluster.checkpoint.layout import Checkpoint, read_checkpoint
from cluster.checkpoint.resolve import ResolvedModel, fetch
from cluster.domain.clock import MonotonicClock
from cluster.domain.errors import CheckpointError
from cluster.domain.replica import RankPhase
from cluster.engine import host_memory, model_card, rank_record
from cluster.engine.block_pool import BlockPool
from cluster.engine.heartbeat import Heartbeat
from cluster.engine.leader import EngineServicer, LeaderServer
from cluster.engine.loop import EngineLoop
from cluster.engine.plan_channel import PlanReceiver, PlanSender
from cluster.engine.progress import RankProgress
from cluster.engine.rank_spec import RankSpec
from cluster.engine.scheduler import Scheduler, SchedulerLimits
from cluster.telemetry.exposition import MetricsServer, new_registry
from cluster.telemetry.logs import configure_logs, get_logger
from cluster.telemetry.metrics import EngineMetrics, RankMetrics

RENDEZVOUS_DEADLINE_S = 180.0
_EXIT_FAILED = 1


def start_rank(spec: RankSpec) -> None:
    """Starts the rank's threads in this process and returns; the process ends when the rank does."""
    Path(spec.log_file).parent.mkdir(parents=True, exist_ok=True)
    stream = configure_logs(f"rank {spec.rank_id}", Path(spec.log_file))
    rank = RankProcess(spec, stream)
    threading.Thread(target=rank.run, name="compute", daemon=True).start()


class RankProcess:
    """Everything one rank owns."""

    def __init__(self, spec: RankSpec, log_stream: TextIO) -> None:
        faulthandler.enable(log_stream)
        self._spec = spec
        self._clock = MonotonicClock()
        self._progress = RankProgress(self._clock)
        self._registry = new_registry()
        self._heartbeat = Heartbeat(spec, self._progress, os.getpid(), RankMetrics(self._registry))
        self._log = get_logger(rank=str(spec.rank_id))

    def run(self) -> None:
        """The compute thread's life; never returns."""
        try:
            self._start()
            code = 0
        except BaseException as error:  # boundary: the failure is reported, then the process ends
            self._progress.failure = f"{type(error).__name__}: {error}"
            self._enter(RankPhase.FAILED, failure=self._progress.failure)
            self._log.exception("rank_failed")
            self._heartbeat.tell_last_words()
            code = _EXIT_FAILED
        os._exit(code)  # threads of gloo and gRPC may hang after a failure; nothing is left to save

    def _start(self) -> None:
        spec = self._spec
        progress = self._progress
        server = MetricsServer(
            self._registry, spec.bind_host, spec.metrics_port, ready=lambda: progress.phase is RankPhase.READY
        )
        progress.ports["metrics"] = server.port
        self._leave_record()
        self._heartbeat.start()
        self._log.info("starting", layout=str(spec.layout), collective=spec.collective, host=socket.gethostname())
        checkpoint = self._checkpoint()
        model = self._build(checkpoint)
        self._load(model)
        model.make_cache(spec.kv_blocks, spec.block_size)
        self._enter(RankPhase.WARMING_UP)
        if spec.rank_id.rank == 0:
            self._lead(checkpoint, model)
        else:
            self._follow(model)

    def _enter(self, phase: RankPhase, **facts: Any) -> None:
        self._progress.phase = phase
        self._log.info("phase", phase=phase.value, **facts)
        self._leave_record()
        self._heartbeat.poke()

    def _leave_record(self) -> None:
        """For the node's own probes; a rank goes on without it."""
        if not self._spec.node_dir:
            return
        try:
            rank_record.leave(Path(self._spec.node_dir), str(self._spec.rank_id), self._progress)
        except OSError as error:
            self._log.warning("record_not_left", caused_by=str(error))

    def _checkpoint(self) -> Checkpoint:
        """The files on this node; CheckpointError when they are not those that were planned with."""
        spec = self._spec
        local = Path(spec.checkpoint_path)
        path = (
            local
            if local.is_dir()
            else fetch(ResolvedModel(spec.model_name, repo_id=spec.checkpoint_path, commit=spec.revision))
        )
        checkpoint = read_checkpoint(path)
        if checkpoint.digest != spec.checkpoint_digest:
            raise CheckpointError(
                f"{path} on {spec.host} is not the checkpoint that was planned with ({checkpoint.digest[:12]} "
                f"instead of {spec.checkpoint_digest[:12]}); copy the same files to every node."
            )
        return checkpoint

    def _build(self, checkpoint: Checkpoint) -> Any:
        """Meets the other ranks and builds this rank's model on meta."""
        import torch

        from cluster.engine.model.causal_lm import ShardedCausalLM
        from cluster.engine.model.tensor_parallel import TensorParallelGroup

        spec = self._spec
        torch.set_num_threads(spec.threads)
        torch.set_grad_enabled(False)
        group = TensorParallelGroup(spec.rank_id.rank, spec.layout.tensor_parallel_size, spec.collective)
        group.join(spec.master_host, spec.master_port, RENDEZVOUS_DEADLINE_S)
        device = torch.device(spec.device.value)
        model = ShardedCausalLM(checkpoint, getattr(torch, spec.dtype.value), device, group)
        self._log.info("built", tensor_parallel_size=group.size)
        return model

    def _load(self, model: Any) -> None:
        progress = self._progress
        baseline = host_memory.resident_bytes()
        host_memory.reset_peak()

        def started(total: int) -> None:
            progress.bytes_total = total
            self._enter(RankPhase.LOADING, bytes_total=total)

        def delivered(count: int) -> None:
            progress.bytes_loaded += count
            progress.peak_host_bytes = host_memory.peak_resident_bytes() - baseline

        model.load(started, delivered)
        progress.peak_host_bytes = host_memory.peak_resident_bytes() - baseline
        self._log.info("loaded", bytes=progress.bytes_loaded, peak_host_bytes=progress.peak_host_bytes)

    def _lead(self, checkpoint: Checkpoint, model: Any) -> None:
        """Rank 0: warms everybody up, opens the Engine service, and steps for as long as the process lives."""
        from cluster.engine.runner import LeaderRunner

        spec = self._spec
        plans = self._open_plan_channel()
        runner = LeaderRunner(model, plans)
        runner.warm_up(spec.max_model_len, spec.kv_blocks, spec.block_size)
        limits = SchedulerLimits(
            spec.max_num_seqs,
            spec.max_num_batched_tokens,
            spec.max_num_waiting,
            spec.max_model_len,
            vocab_size=model.vocab_size,
        )
        scheduler = Scheduler(limits, BlockPool(spec.kv_blocks, spec.block_size))
        self._progress.load = scheduler.load()
        server = LeaderServer(spec.bind_host, spec.engine_port)
        metrics = EngineMetrics(self._registry)
        replica = spec.rank_id.incarnation.replica
        metrics.info.labels(replica.model, str(replica)).set(1)
        metrics.kv_blocks.set(spec.kv_blocks)
        loop = EngineLoop(scheduler, runner, self._progress, metrics, server.publish, self._clock)
        self._progress.ports["engine"] = server.start(self._servicer(checkpoint, loop, server))
        self._enter(RankPhase.READY, ports=self._progress.ports)
        loop.run()

    def _servicer(self, checkpoint: Checkpoint, loop: EngineLoop, server: LeaderServer) -> EngineServicer:
        spec = self._spec
        shape = model_spec(checkpoint.config, checkpoint.generation_config)
        files = model_card.tokenizer_files(checkpoint.path)
        generation_config = checkpoint.generation_config or {}
        card = model_card.model_card(spec, shape.vocab_size, shape.end_token_ids, generation_config, files)
        identity = model_card.identity(spec)
        return EngineServicer(identity, card, files, loop, server.sessions, self._progress, self._clock)

    def _open_plan_channel(self) -> PlanSender | None:
        spec = self._spec
        if spec.layout.world_size == 1:
            return None
        sender = PlanSender(spec.plan_host, spec.plan_port, spec.rank_id.incarnation.generation)
        sender.accept(spec.layout.world_size, RENDEZVOUS_DEADLINE_S, self._clock)
        return sender

    def _follow(self, model: Any) -> None:
        from cluster.engine.runner import follow

        spec = self._spec
        receiver = PlanReceiver(spec.plan_host, spec.plan_port, spec.rank_id.incarnation.generation, spec.rank_id.rank)
        receiver.connect(RENDEZVOUS_DEADLINE_S, self._clock)
        become_ready: Callable[[], None] = lambda: self._enter(RankPhase.READY)  # noqa: E731
        follow(model, receiver, self._progress, become_ready)
