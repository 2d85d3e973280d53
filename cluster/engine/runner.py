"""Runs step plans: on the leader with sampling, on the other ranks in lock-step with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from cluster.domain.errors import EngineFailed
from cluster.domain.request import SamplingParams
from cluster.engine.loop import History
from cluster.engine.model.causal_lm import ShardedCausalLM
from cluster.engine.model.sampler import SampleRow, sample
from cluster.engine.plan_channel import PlanReceiver, PlanSender, encode_plan, entries_of, ready_signal
from cluster.engine.progress import RankProgress
from cluster.engine.step import SampledToken, SequenceKey, StepEntry, StepPlan, StepResult

_WARM_UP_TOKENS = 8


class LeaderRunner:
    """The StepRunner of rank 0: tells the others, computes its part, samples."""

    def __init__(self, model: ShardedCausalLM, plans: PlanSender | None) -> None:
        self._model, self._plans = model, plans

    def run(self, plan: StepPlan, histories: Sequence[History]) -> StepResult:
        if self._plans is not None:
            self._plans.send(encode_plan(plan))
        logits = self._model.forward(plan.entries)
        sampled = [entry.key for entry in plan.entries if entry.sample]
        if logits is None:
            return StepResult(plan.step, ())
        rows = [SampleRow(h.params, h.prompt_token_ids, h.generated_token_ids) for h in histories]
        samples = sample(logits, rows)
        tokens = (SampledToken(key, s.token_id, s.logprob) for key, s in zip(sampled, samples, strict=True))
        return StepResult(plan.step, tuple(tokens))

    def warm_up(self, max_model_len: int, num_blocks: int, block_size: int) -> None:
        """A prefill and a decode on all ranks, into blocks that nobody owns yet; then everybody is READY.

        EngineFailed when the logits are not finite: then the weights are damaged.
        """
        count = max(1, min(_WARM_UP_TOKENS, max_model_len - 1, num_blocks * block_size - 1))
        key, blocks = SequenceKey(0, 0), tuple(range((count + block_size) // block_size))
        prefill = StepEntry(key, (0,) * count, 0, blocks[: -(-count // block_size)], sample=True)
        decode = StepEntry(key, (0,), count, blocks[: count // block_size + 1], sample=True)
        for entry in (prefill, decode):
            if self._plans is not None:
                self._plans.send(encode_plan(StepPlan(1, (entry,))))
            logits = self._model.forward((entry,))
            assert logits is not None
            if not bool(torch.isfinite(logits).all()):
                raise EngineFailed(
                    "The model's logits are not finite; its weights are damaged: copy them again.", retryable=False
                )
            sample(logits, [SampleRow(SamplingParams(max_tokens=1, temperature=1.0), (0,) * entry.start, ())])
        if self._plans is not None:
            self._plans.send(ready_signal())


def follow(model: ShardedCausalLM, plans: PlanReceiver, progress: RankProgress, on_ready: Callable[[], None]) -> None:
    """A rank's life after loading: runs what it is told until EngineFailed says that the leader is gone."""
    while True:
        message = plans.receive()
        if message.ready:
            progress.step = 0  # the warm-up does not count, here as on the leader
            on_ready()
            continue
        progress.begin_step()
        cpu_started = time.thread_time()
        model.forward(entries_of(message))
        progress.end_step(message.step, time.thread_time() - cpu_started)
