"""The leader's compute thread: receive -> schedule -> run -> commit -> publish, one step after another."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.domain.clock import Clock
from cluster.domain.endpoint import LoadSnapshot
from cluster.domain.request import SamplingParams, SequenceEnd
from cluster.engine.progress import RankProgress
from cluster.engine.scheduler import Scheduler
from cluster.engine.sequence import Sequence as EngineSequence
from cluster.engine.step import SequenceKey, SequenceProgress, StepPlan, StepResult
from cluster.telemetry.metrics import EngineMetrics

MAX_INBOX = 8192


class History(Protocol):
    """What sampling needs to know of a sequence."""

    @property
    def params(self) -> SamplingParams: ...
    @property
    def prompt_token_ids(self) -> Sequence[int]: ...
    @property
    def generated_token_ids(self) -> Sequence[int]: ...


class StepRunner(Protocol):
    """Runs a plan on every rank of the replica and samples."""

    def run(self, plan: StepPlan, histories: Sequence[History]) -> StepResult:
        """``histories``: of the entries to sample, in the plan's order."""
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
    """What a step brought, for all sessions together."""

    step: int
    progresses: tuple[SequenceProgress, ...]
    load: LoadSnapshot


class EngineLoop:
    """Owns the scheduler. Other threads speak to it through ``post`` and hear from it through ``publish``."""

    def __init__(
        self, scheduler: Scheduler, runner: StepRunner, progress: RankProgress, metrics: EngineMetrics,
        publish: Callable[[Published], None], clock: Clock,
    ) -> None:  # fmt: skip
        self._scheduler, self._runner, self._progress, self._metrics = scheduler, runner, progress, metrics
        self._publish, self._clock = publish, clock
        self._inbox: deque[Command] = deque()
        self._wake = threading.Condition()
        self._stopped = False
        self._preemptions_seen = 0

    def post(self, command: Command) -> bool:
        """From any thread. False when a Submit finds the inbox full; the rest is always taken."""
        with self._wake:
            if isinstance(command, Submit) and len(self._inbox) >= MAX_INBOX:
                return False
            self._inbox.append(command)
            self._wake.notify()
            return True

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
        """One round: takes the commands, runs at most one step, publishes what came of both."""
        refused = [progress for command in commands if (progress := self._take(command)) is not None]
        scheduled = self._scheduler.schedule(self._clock.now())
        committed: tuple[SequenceProgress, ...] = ()
        if scheduled.plan is not None:
            committed = self._step(scheduled.plan)
        load = self._scheduler.load()
        self._progress.load = load
        self._export(load)
        progresses = (*refused, *scheduled.ended, *committed)
        if progresses:
            self._publish(Published(self._progress.step, progresses, load))

    def _receive(self) -> list[Command] | None:
        with self._wake:
            if not self._inbox and not self._stopped and not self._scheduler.has_work:
                self._wake.wait()
            if self._stopped:
                return None
            commands = list(self._inbox)
            self._inbox.clear()
            return commands

    def _take(self, command: Command) -> SequenceProgress | None:
        if isinstance(command, Submit):
            return self._scheduler.submit(command.sequence, self._clock.now())
        if isinstance(command, Cancel):
            self._scheduler.cancel(command.key)
        else:
            self._scheduler.cancel_session(command.session)
        return None

    def _step(self, plan: StepPlan) -> tuple[SequenceProgress, ...]:
        self._progress.begin_step()
        started, cpu_started = self._clock.now(), time.thread_time()
        histories = [self._scheduler.sequence(entry.key) for entry in plan.entries if entry.sample]
        result = self._runner.run(plan, histories)
        progresses = self._scheduler.commit(result)
        elapsed = self._clock.now() - started
        self._progress.end_step(plan.step, time.thread_time() - cpu_started)
        self._metrics.step_seconds.labels(plan.kind).observe(elapsed)
        self._metrics.generation_tokens.inc(sum(len(p.token_ids) for p in progresses))
        self._metrics.prompt_tokens.inc(plan.num_tokens - sum(entry.is_decode for entry in plan.entries))
        return progresses

    def _export(self, load: LoadSnapshot) -> None:
        metrics = self._metrics
        metrics.running.set(load.running_sequences)
        metrics.waiting.set(load.waiting_sequences)
        metrics.kv_cache_usage.set(load.kv_blocks_used / load.kv_blocks_total if load.kv_blocks_total else 0.0)
        preemptions = self._scheduler.preemptions
        metrics.preemptions.inc(preemptions - self._preemptions_seen)
        self._preemptions_seen = preemptions


def refused_for_capacity(key: SequenceKey, attempt: int) -> SequenceProgress:
    """The answer to a Submit that the inbox could not take."""
    return SequenceProgress(key, attempt, (), (), SequenceEnd.REJECTED_CAPACITY, "The engine's inbox is full.", 0)
