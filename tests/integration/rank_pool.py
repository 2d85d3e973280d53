"""Four rank processes that live for many models: a model is built over some of them, and a continuous batch runs.

What is real: ShardedCausalLM, the tensor-parallel group over gloo, the scheduler and its plans. What is not: sockets,
Ray, sampling (the best token is taken). Plans and hidden states travel through pipes, greedy tokens come back.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

RANKS = 4
DEADLINE_S = 120.0


@dataclass(frozen=True)
class Batch:
    """Prompts that run together, and an engine narrow enough to chunk, preempt and share blocks."""

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    end_token_ids: frozenset[int] = frozenset()
    num_blocks: int = 20
    block_size: int = 4
    max_num_seqs: int = 4
    token_budget: int = 13
    max_model_len: int = 256
    rope_by_length: object = None


@dataclass(frozen=True)
class Outcome:
    """Every prompt's new tokens, and what happened on the way."""

    tokens: tuple[tuple[int, ...], ...]
    preemptions: int
    prefix_hits: int
    chunked_prompts: int


class Refused(Exception):  # noqa: N818 - an answer, not a failure
    """The ranks' own typed refusal of a model or a layout: its sentence."""


class RankPool:
    """Owns the processes. ``run`` starts and builds what is not there yet; ``close`` ends everything.

    ``replaced``: for each rank of the last run how many layers and MLPs it computes in its own faster way, and whether
    its last layer leaves out what is not sampled from.
    """

    replaced: list[tuple[int, int, bool]]

    def __init__(self) -> None:
        self._requests: list[Connection] = []
        self._processes: list = []
        self._world = 1

    def run(
        self, folder: Path, tensor_parallel_size: int, stages: tuple[tuple[int, int], ...], batch: Batch,
        doubt: tuple[str, object] | None = None,
    ) -> Outcome:  # fmt: skip
        """The batch on the model at ``folder``.

        ``doubt``: a function of ``engine/model`` that says something else on rank 1. Refused when the ranks refuse it,
        AssertionError with a rank's traceback when one fails.
        """
        if not self._processes:
            self._start()
        used = range(tensor_parallel_size * len(stages))
        if tensor_parallel_size > 1 and tensor_parallel_size != self._world:
            # Stages, and ranks that are idle now, are worlds of their own.
            ports = {first: _free_port() for first in range(0, RANKS, tensor_parallel_size)}
            joins = {rank: ports[rank - rank % tensor_parallel_size] for rank in range(RANKS)}
            self._all(range(RANKS), lambda rank: ("join", tensor_parallel_size, joins[rank]))
            self._world = tensor_parallel_size
        self.replaced = self._all(
            used, lambda rank: ("build", folder, tensor_parallel_size, stages, doubt if rank == 1 else None)
        )
        return self._all(used, lambda _: ("run", batch, len(used), len(stages)))[0]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for requests in self._requests:
            requests.close()
        self._requests, self._processes, self._world = [], [], 1

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rank_preload"])
        # The process that ranks are forked from finds modules by the environment alone.
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*sys.path, os.environ.get("PYTHONPATH", "")]))
        pairs = {(a, b): context.Pipe() for a in range(RANKS) for b in range(a + 1, RANKS)}
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            peers = {a: ends[1] for (a, b), ends in pairs.items() if b == rank}
            peers |= {b: ends[0] for (a, b), ends in pairs.items() if a == rank}
            process = context.Process(target=_serve, args=(rank, theirs, peers), daemon=True)
            process.start()
            theirs.close()
            self._requests.append(ours)
            self._processes.append(process)
        for ends in pairs.values():
            ends[0].close()
            ends[1].close()

    def _all(self, ranks: range, request: Callable[[int], tuple]) -> list:
        """Everyone's answers; a rank that fails or is silent ends all, since the others wait for it."""
        for rank in ranks:
            self._requests[rank].send(request(rank))
        waiting = {self._requests[rank]: rank for rank in ranks}
        answers: dict[int, tuple[str, object]] = {}
        while waiting:
            ready = wait(list(waiting), DEADLINE_S)
            for requests in ready:
                answers[waiting.pop(requests)] = requests.recv()
            failed = [value for kind, value in answers.values() if kind == "failed"]
            if failed or not ready:
                missing = sorted(waiting.values())
                self.close()
                raise AssertionError(failed[0] if failed else f"ranks {missing} said nothing for {DEADLINE_S} s")
        for kind, value in answers.values():
            if kind == "refused":
                raise Refused(value)
        return [answers[rank][1] for rank in ranks]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(rank: int, requests: Connection, peers: dict[int, Connection]) -> None:
    """One rank's life: answers each request with its result, a refusal, or a traceback."""
    import torch

    from cluster.domain.errors import CheckpointError, UnsupportedModelError

    torch.set_num_threads(1)
    worker = _Worker(rank, peers)
    while True:
        kind, *arguments = requests.recv()
        try:
            requests.send(("done", getattr(worker, kind)(*arguments)))
        except (UnsupportedModelError, CheckpointError) as error:
            requests.send(("refused", str(error)))
        except BaseException:
            requests.send(("failed", f"rank {rank}: {traceback.format_exc()}"))


class _Worker:
    def __init__(self, rank: int, peers: dict[int, Connection]) -> None:
        self.rank, self.peers = rank, peers
        self.group = None

    def join(self, size: int, port: int) -> None:
        import torch

        from cluster.engine.model.tensor_parallel import TensorParallelGroup

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            sys.modules["deepspeed.comm.comm"].cdb = None
        self.group = TensorParallelGroup(self.rank % size, size, "gloo")
        self.group.join("127.0.0.1", port, 60.0)

    def build(
        self, folder: Path, size: int, stages: tuple[tuple[int, int], ...], doubt: tuple[str, object] | None
    ) -> tuple[int, int, bool]:
        from unittest import mock

        import torch

        from cluster.checkpoint.layout import read_checkpoint
        from cluster.domain.parallel_layout import Stage, StageLayers
        from cluster.engine.model import cpu_layers, last_layer
        from cluster.engine.model.causal_lm import ShardedCausalLM
        from cluster.engine.model.tensor_parallel import TensorParallelGroup

        index = self.rank // size
        group = self.group if size > 1 else TensorParallelGroup(0, 1, "gloo")
        self.size, self.stage = size, Stage(index, len(stages), StageLayers(*stages[index]))
        self.model = None
        last_layer.pays = lambda tokens, sampled: sampled < tokens  # these steps are too small for it to pay
        model = ShardedCausalLM(read_checkpoint(folder), torch.float32, torch.device("cpu"), group, self.stage)
        with mock.patch(doubt[0], return_value=doubt[1]) if doubt else nullcontext():
            model.load(lambda _: None, lambda _: None)
        self.model = model
        layers = [child for child in model._base.modules() if "forward" in vars(child) and hasattr(child, "self_attn")]
        mlps = sum(isinstance(child, cpu_layers.FusedMLP) for child in model._base.modules())
        return len(layers), mlps, any(layer.forward.__self__.only_sampled for layer in layers)

    def run(self, batch: Batch, world: int, depth: int) -> Outcome | None:
        self.model.make_cache(batch.num_blocks, batch.block_size, batch.max_num_seqs, batch.max_model_len)
        if self.rank > 0:
            while (plan := self.peers[0].recv()) is not None:
                tokens = self.step(plan)
                if tokens is not None:
                    self.peers[0].send(tokens)
            return None
        followers = [self.peers[rank] for rank in range(1, world)]
        sampler = self.peers[world - self.size] if depth > 1 else None
        try:
            return _schedule(self, batch, followers, sampler, depth)
        finally:
            for follower in followers:
                follower.send(None)

    def step(self, plan) -> list[int] | None:
        """This rank's part of a plan; the tokens, on the first rank of the last stage."""
        import torch

        hidden = None
        if not self.stage.is_first:
            hidden = torch.from_numpy(self.peers[self.rank - self.size].recv())
        output = self.model.forward(plan, hidden)
        if not self.stage.is_last:
            self.peers[self.rank + self.size].send(output.numpy())
            return None
        if self.rank % self.size:
            assert output is None
            return None
        return output.argmax(-1).tolist() if output is not None else []


def _schedule(
    leader: _Worker, batch: Batch, followers: list[Connection], sampler: Connection | None, depth: int
) -> Outcome:
    from cluster.domain.request import SamplingParams
    from cluster.engine.block_pool import BlockPool
    from cluster.engine.scheduler import Scheduler, SchedulerLimits
    from cluster.engine.sequence import Sequence
    from cluster.engine.step import SampledToken, SequenceKey, StepResult

    limits = SchedulerLimits(
        max_num_seqs=batch.max_num_seqs, max_num_batched_tokens=batch.token_budget, max_num_waiting=64,
        max_model_len=batch.max_model_len, rope_by_length=batch.rope_by_length,
    )  # fmt: skip
    scheduler = Scheduler(limits, BlockPool(batch.num_blocks, batch.block_size), depth=depth)
    keys = [SequenceKey(1, i) for i in range(len(batch.prompts))]
    made: dict[SequenceKey, list[int]] = {key: [] for key in keys}
    for key, prompt in zip(keys, batch.prompts, strict=True):
        params = SamplingParams(temperature=0.0, max_tokens=batch.max_tokens, stop_token_ids=batch.end_token_ids)
        assert scheduler.submit(Sequence(key, prompt, params), 0.0) is None
    outstanding, chunked, now = deque(), set(), 0.0
    while scheduler.has_work:
        while scheduler.can_schedule:
            plan, now = scheduler.schedule(now).plan, now + 1.0
            if plan is None:
                break
            for follower in followers:
                follower.send(plan)
            outstanding.append((plan, leader.step(plan)))
            chunked |= {entry.key for entry in plan.entries if entry.start == 0 and not entry.sample}
        plan, tokens = outstanding.popleft()
        if sampler is not None:
            assert sampler.poll(DEADLINE_S), "the last stage said nothing"
            tokens = sampler.recv()
        sampled = [entry.key for entry in plan.entries if entry.sample]
        result = StepResult(plan.step, tuple(SampledToken(k, t) for k, t in zip(sampled, tokens, strict=True)))
        for progress in scheduler.commit(result):
            made[progress.key] += progress.token_ids
        scheduler.check()
    return Outcome(tuple(tuple(made[key]) for key in keys), scheduler.preemptions, scheduler.prefix_hits, len(chunked))
