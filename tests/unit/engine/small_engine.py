"""A scheduler with short words around it, for tests that follow it step by step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cluster.domain.request import SamplingParams, SequenceEnd
from cluster.engine.block_pool import BlockPool
from cluster.engine.scheduler import Scheduled, Scheduler, SchedulerLimits
from cluster.engine.sequence import Sequence
from cluster.engine.step import SampledToken, SequenceKey, SequenceProgress, StepPlan, StepResult

LIMITS = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=16, max_num_waiting=3, max_model_len=64)
TOKEN = 7
STOP = 2


class Engine:
    """A scheduler with short words around it. Every sequence's name is its id; every sampled token is TOKEN."""

    def __init__(
        self, num_blocks: int = 32, block_size: int = 4, depth: int = 1, caching: bool = False, **limits: Any
    ) -> None:
        self.pool = BlockPool(num_blocks, block_size)
        self.scheduler = Scheduler(replace(LIMITS, **limits), self.pool, depth=depth, prefix_caching=caching)
        self.now_s = 100.0

    def submit(
        self, name: int, prompt: int = 3, max_tokens: int = 50, session: int = 1, resume: int = 0,
        priority: int = 0, deadline_s: float | None = None, min_tokens: int = 0, salt: bytes = b"", first: int = 10,
    ) -> SequenceProgress | None:  # fmt: skip
        """The prompt's tokens count upwards from ``first``."""
        params = SamplingParams(max_tokens=max_tokens, stop_token_ids=frozenset({STOP}), min_tokens=min_tokens)
        sequence = Sequence(
            SequenceKey(session, name), tuple(range(first, first + prompt)), params, [TOKEN] * resume,
            priority=priority, deadline_s=deadline_s, cache_salt=salt,
        )  # fmt: skip
        return self.scheduler.submit(sequence, self.now_s)

    def schedule(self) -> Scheduled:
        scheduled = self.scheduler.schedule(self.now_s)
        self.scheduler.check()
        return scheduled

    def plan(self) -> StepPlan:
        plan = self.schedule().plan
        assert plan is not None
        return plan

    def commit(self, plan: StepPlan, token: int = TOKEN) -> tuple[SequenceProgress, ...]:
        tokens = tuple(SampledToken(e.key, token) for e in plan.entries if e.sample)
        progresses = self.scheduler.commit(StepResult(plan.step, tokens))
        self.scheduler.check()
        return progresses

    def fill(self) -> list[StepPlan]:
        """As many plans as may be outstanding."""
        plans = []
        while self.scheduler.can_schedule:
            plan = self.schedule().plan
            if plan is not None:
                plans.append(plan)
        return plans

    def step(self, token: int = TOKEN) -> dict[int, tuple[int, int]]:
        """One step; {name: (start, number of tokens)}."""
        plan = self.plan()
        self.commit(plan, token)
        return {e.key.sequence_id: (e.start, len(e.token_ids)) for e in plan.entries}

    def names(self) -> list[int]:
        return list(self.step())


def refusal(progress: SequenceProgress | None) -> tuple[SequenceEnd | None, str]:
    assert progress is not None
    assert progress.token_ids == ()
    return progress.end, progress.detail


def names(plan: StepPlan) -> list[int]:
    return [entry.key.sequence_id for entry in plan.entries]
