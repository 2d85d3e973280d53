"""One rank's process, from a RankSpec to READY and through its life.

The compute thread goes STARTING (imports, rendezvous) -> LOADING (its shard) -> WARMING_UP -> READY; the heartbeat
tells the controller, from outside it. Whatever breaks is reported and ends the process: nobody unwinds a broken
collective, the replica is rebuilt as a whole.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cluster.checkpoint.config_json import model_spec
from cluster.checkpoint.dummy import dummy_checkpoint
from cluster.checkpoint.hub import HubError
from cluster.checkpoint.layout import Checkpoint, read_checkpoint
from cluster.checkpoint.resolve import ResolvedModel, fetch, fetch_config
from cluster.checkpoint.rope_scaling import stretched
from cluster.domain.clock import MonotonicClock
from cluster.domain.errors import CheckpointError, ConfigError, EngineFailed, PortTakenError
from cluster.domain.model_spec import ModelSpec
from cluster.domain.parallel_layout import Stage
from cluster.domain.replica import RankPhase
from cluster.engine import host_memory, model_card, rank_record
from cluster.engine.block_events import RecentBlocks
from cluster.engine.block_pool import BlockPool
from cluster.engine.heartbeat import Heartbeat
from cluster.engine.leader import EngineServicer, LeaderServer
from cluster.engine.loop import EngineLoop
from cluster.engine.prefill_pace import PrefillPace
from cluster.engine.progress import RankProgress
from cluster.engine.rank_spec import RankSpec
from cluster.engine.scheduler import Scheduler, SchedulerLimits
from cluster.engine.step_series import StepSeries
from cluster.telemetry.exposition import MetricsServer, new_registry
from cluster.telemetry.logs import configure_logs, get_logger
from cluster.telemetry.metrics import EngineMetrics, RankMetrics

if TYPE_CHECKING:  # both import torch, which a rank does when its heartbeat runs
    from cluster.engine.rank_channels import RankChannels
    from cluster.engine.runner import RankShare

RENDEZVOUS_DEADLINE_S = 180.0
# Stages come from different nodes, and one may download first; the controller's own deadlines come before this one.
MEETING_DEADLINE_S = 3600.0
_EXIT_FAILED = 1


def start_rank(spec: RankSpec) -> None:
    """Starts the rank's threads in this process and returns; the process ends when the rank does."""
    host_memory.prefer_huge_pages()  # torch is not imported yet
    Path(spec.log_file).parent.mkdir(parents=True, exist_ok=True)
    stream = configure_logs(f"rank {spec.rank_id}", Path(spec.log_file))
    rank = RankProcess(spec, stream)
    threading.Thread(target=rank.run, name="compute", daemon=True).start()


def _needs_change(error: BaseException) -> bool:
    """Whether the same start would fail again: over the model's files, or the model itself."""
    return isinstance(error, ConfigError) and not isinstance(error, (PortTakenError, HubError))


@contextmanager
def _no_collections() -> Iterator[None]:
    """No looking for garbage among what stays for the life of the process, then or later.

    Imports and a model on meta are very many objects, and a start would search them again and again.
    """
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


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
        self._ending = threading.Lock()

    def run(self) -> None:
        """The compute thread's life; never returns."""
        try:
            self._start()
        except BaseException as error:  # boundary: the failure is reported, then the process ends
            self._log.exception("rank_failed")
            waits = isinstance(error, EngineFailed) and error.retryable
            self._fail(f"{type(error).__name__}: {error}", waits_for_peer=waits, needs_change=_needs_change(error))
        os._exit(0)

    def _fail(self, why: str, *, waits_for_peer: bool, needs_change: bool = False) -> None:
        """Tells why and ends the process; from any thread, and the first reason is the one that is told."""
        self._ending.acquire()  # nobody comes after the first
        self._progress.waits_for_peer, self._progress.needs_change = waits_for_peer, needs_change
        self._progress.failure = why
        self._enter(RankPhase.FAILED, failure=why)
        self._heartbeat.tell_last_words()
        os._exit(_EXIT_FAILED)  # threads of gloo and gRPC may hang after a failure; nothing is left to save

    def _lose(self, who_is_gone: str) -> None:
        """A peer's socket has broken, maybe while the compute thread waits for that peer without an end."""
        self._fail(f"EngineFailed: {who_is_gone}", waits_for_peer=True)

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
        shape = model_spec(checkpoint.config, checkpoint.generation_config, tensors=checkpoint.tensors)
        with _no_collections():
            model = self._build(checkpoint, spec.stage(shape.num_layers))
        channels = self._meet(model.hidden_size)
        self._load(model)
        model.make_cache(spec.kv_blocks, spec.block_size, spec.max_num_seqs, spec.max_model_len)
        self._enter(RankPhase.WARMING_UP)
        if spec.is_leader:
            self._lead(checkpoint, shape, model, channels)
        else:
            self._follow(model, channels)

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
        checkpoint = self._read_checkpoint()
        if checkpoint.digest != spec.checkpoint_digest:
            raise CheckpointError(
                f"{checkpoint.path} on {spec.host} is not the checkpoint that was planned with "
                f"({checkpoint.digest[:12]} instead of {spec.checkpoint_digest[:12]}); "
                "copy the same files to every node."
            )
        return stretched(checkpoint, spec.rope_scaling)

    def _read_checkpoint(self) -> Checkpoint:
        spec = self._spec
        local = Path(spec.checkpoint_path)
        resolved = ResolvedModel(spec.model_name, repo_id=spec.checkpoint_path, commit=spec.revision)
        if spec.load_format == "dummy":
            return dummy_checkpoint(local if local.is_dir() else fetch_config(resolved), spec.seed)
        return read_checkpoint(local if local.is_dir() else fetch(resolved))

    def _build(self, checkpoint: Checkpoint, stage: Stage) -> Any:
        """Meets the other ranks of its stage and builds this rank's model on meta."""
        import torch

        from cluster.engine.model.causal_lm import ShardedCausalLM
        from cluster.engine.model.tensor_parallel import TensorParallelGroup

        spec = self._spec
        torch.set_num_threads(spec.threads)
        torch.set_grad_enabled(False)
        group = TensorParallelGroup(spec.tensor_rank, spec.layout.tensor_parallel_size, spec.collective)
        group.join(spec.master_host, spec.master_port, RENDEZVOUS_DEADLINE_S)
        device = torch.device(spec.device.value)
        model = ShardedCausalLM(checkpoint, getattr(torch, spec.dtype.value), device, group, stage)
        self._log.info("built", tensor_parallel_size=group.size, stage=stage.index, layers=len(stage.layers))
        return model

    def _meet(self, hidden_size: int) -> RankChannels:
        """Opens the channels to the other ranks of the replica."""
        from cluster.engine.rank_channels import RankChannels

        channels = RankChannels(self._spec, hidden_size, self._lose)
        channels.open(MEETING_DEADLINE_S, self._clock)
        return channels

    def _share(self, model: Any, channels: RankChannels) -> RankShare:
        """What this rank does of every plan."""
        import torch

        from cluster.engine.model.sampler import Sampler
        from cluster.engine.runner import RankShare

        spec = self._spec
        sampler = None
        if spec.rank == spec.sampling_rank:
            sampler = Sampler(model.vocab_size, spec.max_num_seqs, torch.device(spec.device.value))
        return RankShare(model, sampler, channels.incoming, channels.outgoing)

    def _load(self, model: Any) -> None:
        progress = self._progress

        def started(total: int) -> None:
            progress.bytes_total = total
            self._enter(RankPhase.LOADING, bytes_total=total)

        def delivered(count: int) -> None:
            progress.bytes_loaded += count
            progress.peak_host_bytes = peak.bytes

        with host_memory.AnonymousPeak() as peak:
            model.load(started, delivered)
        progress.peak_host_bytes = peak.bytes
        self._log.info("loaded", bytes=progress.bytes_loaded, peak_host_bytes=progress.peak_host_bytes)

    def _lead(self, checkpoint: Checkpoint, shape: ModelSpec, model: Any, channels: RankChannels) -> None:
        """Rank 0: warms everybody up, opens the Engine service, and steps for as long as the process lives."""
        from cluster.engine.runner import LeaderRunner

        spec, progress = self._spec, self._progress
        if channels.sender is not None:
            channels.sender.await_loaded(MEETING_DEADLINE_S)
        depth = spec.layout.pipeline_parallel_size
        runner = LeaderRunner(self._share(model, channels), channels.sender, progress, depth)
        # Its prompt is a step of its own, and stages have room for the rows of the largest step only.
        longest = min(spec.max_model_len, spec.max_num_batched_tokens + 1)
        runner.warm_up(longest, spec.kv_blocks, spec.block_size)
        blocks = RecentBlocks() if spec.enable_prefix_caching else None
        scheduler = self._scheduler(shape, blocks)
        progress.load = scheduler.load()
        server = LeaderServer(spec.bind_host, spec.engine_port, block_events=spec.enable_prefix_caching)
        metrics = EngineMetrics(self._registry)
        replica = spec.rank_id.incarnation.replica
        metrics.info.labels(replica.model, str(replica)).set(1)
        metrics.kv_blocks.set(spec.kv_blocks)
        series = StepSeries(metrics, scheduler, progress)
        pace = PrefillPace(spec.prefill_slowdown, spec.max_num_batched_tokens)
        loop = EngineLoop(scheduler, runner, progress, series, server.publish, self._clock, pace, blocks)
        progress.ports["engine"] = server.start(self._servicer(checkpoint, shape, loop, server))
        self._enter(RankPhase.READY, ports=progress.ports)
        loop.run()

    def _scheduler(self, shape: ModelSpec, blocks: RecentBlocks | None) -> Scheduler:
        spec = self._spec
        limits = SchedulerLimits(
            spec.max_num_seqs,
            spec.max_num_batched_tokens,
            spec.max_num_waiting,
            spec.max_model_len,
            vocab_size=shape.vocab_size,
            max_waiting_prompt_tokens=spec.max_waiting_prompt_tokens,
            rope_by_length=shape.rope_by_length,
        )
        pool, depth = BlockPool(spec.kv_blocks, spec.block_size, blocks), spec.layout.pipeline_parallel_size
        return Scheduler(limits, pool, depth=depth, prefix_caching=spec.enable_prefix_caching)

    def _servicer(
        self, checkpoint: Checkpoint, shape: ModelSpec, loop: EngineLoop, server: LeaderServer
    ) -> EngineServicer:
        spec = self._spec
        files = model_card.tokenizer_files(checkpoint.path)
        generation_config = checkpoint.generation_config or {}
        card = model_card.model_card(spec, shape.vocab_size, shape.end_token_ids, generation_config, files)
        identity = model_card.identity(spec)
        return EngineServicer(identity, card, files, loop, server.sessions, self._progress, self._clock)

    def _follow(self, model: Any, channels: RankChannels) -> None:
        from cluster.engine.runner import follow

        assert channels.receiver is not None, "every rank but the leader follows"
        share = self._share(model, channels)
        channels.receiver.tell_loaded()
        become_ready: Callable[[], None] = lambda: self._enter(RankPhase.READY)  # noqa: E731
        follow(share, channels.receiver, self._progress, become_ready)
