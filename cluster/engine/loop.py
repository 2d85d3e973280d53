"""The leader's compute thread: receive -> schedule -> dispatch -> publish -> collect -> commit, again and again.

News of a step are published when the next plan is on its way to the other ranks: they compute while the messages are
made. As many plans are outstanding as the runner is deep.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.domain.clock import Clock
from cluster.domain.endpoint import LoadSnapshot
from cluster.domain.request import SequenceEnd
from cluster.engine.block_events import BlockChanges, RecentBlocks
from cluster.engine.prefill_pace import LEAST_CHUNK_TOKENS, PrefillPace, PromptWork
from cluster.engine.progress import RankProgress
from cluster.engine.scheduler import Scheduled, Scheduler
from cluster.engine.sequence import Sequence as EngineSequence
from cluster.engine.step import SequenceKey, SequenceProgress, StepPlan, StepResult, step_kind
from cluster.engine.step_series import StepSeries

MAX_INBOX = 8192


class StepRunner(Protocol):
    """Runs plans on every rank of the replica, in order, and samples. EngineFailed: the replica is lost."""

    @property
    def depth(self) -> int:
        """Plans that may be dispatched and not collected: one for each pipeline stage."""
        ...

    def dispatch(self, plan: StepPlan) -> None:
        """Lets the other ranks begin with it; does not wait for anybody."""
        ...

    def collect(self) -> StepResult:
        """The result of the oldest plan dispatched."""
        ...


@dataclass(frozen=True, slots=True)
class Submit:
    """A sequence has come."""

    sequence: EngineSequence


@dataclass(frozen=True, slots=True)
class Cancel:
    """A sequence is no longer wanted."""

    key: SequenceKey


@dataclass(frozen=True, slots=True)
class CancelSession:
    """A router is gone, and all that it wanted with it."""

    session: int


Command = Submit | Cancel | CancelSession


@dataclass(frozen=True, slots=True)
class Published:
    """What a step brought, for all sessions together; ``blocks``: what it changed in the prefix cache, if anything."""

    step: int
    progresses: tuple[SequenceProgress, ...]
    load: LoadSnapshot
    blocks: BlockChanges | None = None


class EngineLoop:
    """Owns the scheduler. Other threads speak to it through ``post`` and hear from it through ``publish``."""

    def __init__(
        self, scheduler: Scheduler, runner: StepRunner, progress: RankProgress, series: StepSeries,
        publish: Callable[[Published], None], clock: Clock, pace: PrefillPace | None = None,
        blocks: RecentBlocks | None = None,
    ) -> None:  # fmt: skip
        self._scheduler, self._runner, self._progress, self._series = scheduler, runner, progress, series
        self._publish, self._clock, self._pace, self._blocks = publish, clock, pace, blocks
        self._inbox: deque[Command] = deque()
        # Sequences that are not in the progress's load yet and their tokens; and those of them in the turn's commands.
        self._arriving, self._received = (0, 0), (0, 0)
        self._wake = threading.Condition()
        self._stopped = False
        self._outstanding: deque[tuple[StepPlan, float]] = deque()  # with the time of its dispatch
        self._news: list[SequenceProgress] = []  # not published yet
        self._collected_s = 0.0

    def post(self, command: Command) -> bool:
        """From any thread. False when a Submit finds the inbox full; the rest is always taken."""
        with self._wake:
            if isinstance(command, Submit) and len(self._inbox) >= MAX_INBOX:
                return False
            self._inbox.append(command)
            if isinstance(command, Submit):
                self._arriving = self._arriving[0] + 1, self._arriving[1] + command.sequence.num_tokens
            self._wake.notify()
            return True

    @property
    def load(self) -> LoadSnapshot:
        """Of this moment, from any thread: what has come while a step runs counts as waiting."""
        with self._wake:  # of one moment: each arrival is in one of the two
            load, (sequences, tokens) = self._progress.load, self._arriving
        if not sequences:
            return load
        return load._replace(
            waiting_sequences=load.waiting_sequences + sequences,
            queued_prompt_tokens=load.queued_prompt_tokens + tokens,
        )

    def stop(self) -> None:
        with self._wake:
            self._stopped = True
            self._wake.notify()

    def run(self) -> None:
        """Until ``stop``; raises what the runner raises: then the replica is lost."""
        while True:
            commands = self._receive()
            if commands is None:
                return
            self.turn(commands)

    def turn(self, commands: Sequence[Command]) -> None:
        """One round: takes the commands, fills the pipeline, publishes, and waits for the oldest step if there is one.

        What that step brings is published in the next round.
        """
        for command in commands:
            self._take(command)
        self._fill()
        load = self._scheduler.load()
        with self._wake:
            arriving, (sequences, tokens) = self._arriving, self._received
            self._arriving, self._received = (arriving[0] - sequences, arriving[1] - tokens), (0, 0)
            self._progress.load = load
        blocks = self._blocks.take() if self._blocks is not None else None
        if self._news or blocks:
            news, self._news = tuple(self._news), []
            self._publish(Published(self._progress.step, news, load, blocks))
        if self._outstanding:
            self._collect()

    @property
    def _idle(self) -> bool:
        return not (self._inbox or self._outstanding or self._news or self._scheduler.has_work)

    def _receive(self) -> list[Command] | None:
        with self._wake:
            while self._idle and not self._stopped:
                self._wake.wait()
            if self._stopped:
                return None
            commands = list(self._inbox)
            self._inbox.clear()
            self._received = self._arriving
            return commands

    def _take(self, command: Command) -> None:
        if isinstance(command, Submit):
            refused = self._scheduler.submit(command.sequence, self._clock.now())
            if refused is not None:
                self._news.append(refused)
        elif isinstance(command, Cancel):
            self._scheduler.cancel(command.key)
        else:
            self._scheduler.cancel_session(command.session)

    def _fill(self) -> None:
        """Dispatches for as long as the scheduler has a plan; it bounds how many are outstanding."""
        while self._scheduler.can_schedule:
            now_s = self._clock.now()
            scheduled = self._schedule(now_s)
            self._news += scheduled.ended
            if scheduled.plan is None:
                return
            if self._outstanding:
                self._series.overlapped()
            else:
                self._progress.begin_step()
            self._runner.dispatch(scheduled.plan)
            self._outstanding.append((scheduled.plan, now_s))

    def _schedule(self, now_s: float) -> Scheduled:
        scheduler, pace, depth = self._scheduler, self._pace, self._runner.depth
        if pace is None:
            return scheduler.schedule(now_s)
        if not scheduler.num_waiting and scheduler.num_decoding == scheduler.num_running:
            # Nobody has a prompt, as in most steps; but one who makes room for another may find some again at once.
            return scheduler.schedule(now_s, LEAST_CHUNK_TOKENS)
        without_token = scheduler.num_waiting + scheduler.num_running - scheduler.num_decoding
        # One plan's part of them.
        decodes, without_token = -(-scheduler.num_decoding // depth), -(-without_token // depth)
        first = scheduler.prompt_under_way
        start, anew = (0, False) if first is None else (first.num_planned, first.resumes)
        tokens = pace.budget(decodes, without_token, start, anew=anew)
        return scheduler.schedule(now_s, tokens, short_prompt=pace.short_prompt(decodes))

    def _collect(self) -> None:
        cpu_started = time.thread_time()
        result = self._runner.collect()
        plan, dispatched_s = self._outstanding.popleft()
        news = self._scheduler.commit(result)
        self._news += news
        now_s = self._clock.now()
        # With several outstanding, a step's own time begins where the one before it ended.
        seconds = now_s - max(dispatched_s, self._collected_s)
        self._collected_s = now_s
        self._progress.end_step(plan.step, time.thread_time() - cpu_started)
        if self._outstanding:
            self._progress.begin_step()
        decodes = plan.num_decodes
        prompt_tokens = plan.num_tokens - decodes if decodes < len(plan.entries) else 0
        if self._pace is not None:
            self._pace.observe(decodes, _prompt_work(plan) if prompt_tokens else PromptWork(), seconds)
        kind = step_kind(decodes, len(plan.entries))
        self._series.observe(kind, prompt_tokens, sum([len(progress.token_ids) for progress in news]), seconds)


def _prompt_work(plan: StepPlan) -> PromptWork:
    chunks = [PromptWork.chunk(entry.start, len(entry.token_ids)) for entry in plan.entries if not entry.is_decode]
    return sum(chunks, PromptWork())


def refused_for_capacity(key: SequenceKey, attempt: int) -> SequenceProgress:
    """The answer to a Submit that the inbox could not take."""
    return SequenceProgress(key, attempt, (), (), SequenceEnd.REJECTED_CAPACITY, "The engine's inbox is full.", 0)
