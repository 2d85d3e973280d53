"""Which sequences compute what in the next step, and which of them are over. Pure: no clock, no I/O, no torch.

``submit`` and ``cancel`` at any time; otherwise ``schedule``, run the plan, ``commit``, and again. The rules:

1. One order for everything, the rank: higher priority first, then earlier arrival.
2. Decodes come first within the token budget, then chunks of prompts under way, then waiting sequences are
   admitted strictly in rank order. Nobody overtakes the first one that does not fit, so nobody starves.
3. A sequence gets the KV blocks of all its known tokens when it is admitted: a prompt under way never lacks blocks.
   Admission leaves a block for each running sequence, so that nobody has to make room for a while.
4. A decode that needs a block when none is free takes the blocks of the running sequence of lowest rank behind it:
   that one is preempted. It waits again, keeps its tokens and computes them anew later. With nobody behind it the
   decode pauses for the step.
5. A sequence preempted ``max_preemptions`` times is no longer chosen, unless the first running sequence of all has
   nobody else to take from. That one is never preempted while it is first, and alone it always fits (``submit``
   checks). Therefore a plan is never empty while there is work, and every sequence ends.
6. A block is free only when the last plan that names it has been committed.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from cluster.domain.endpoint import LoadSnapshot
from cluster.domain.request import SequenceEnd
from cluster.engine.block_pool import BlockPool
from cluster.engine.limits import SchedulerLimits
from cluster.engine.sequence import Sequence
from cluster.engine.step import SampledToken, SequenceKey, SequenceProgress, StepEntry, StepPlan, StepResult

__all__ = ["Scheduled", "Scheduler", "SchedulerLimits"]

_RANK = attrgetter("rank")
_DUE_S = attrgetter("due_s")


@dataclass(frozen=True, slots=True)
class Scheduled:
    """The next plan (None: there is nothing to do) and the sequences whose deadline has passed."""

    plan: StepPlan | None
    ended: tuple[SequenceProgress, ...]


class Scheduler:
    """Owns the sequences of one engine and the blocks they hold. One thread; ``load`` is its snapshot for others."""

    def __init__(self, limits: SchedulerLimits, pool: BlockPool) -> None:
        self._limits = limits
        self._pool = pool
        self._live: dict[SequenceKey, Sequence] = {}
        self._waiting: list[Sequence] = []  # by rank, like _running
        self._running: list[Sequence] = []
        self._retiring: list[Sequence] = []  # over, but named by the outstanding plan
        self._outstanding: StepPlan | None = None
        self._in_step: tuple[Sequence, ...] = ()  # of the outstanding plan's entries
        self._waiting_tokens = 0
        self._arrivals = 0
        self._steps = 0
        self._next_deadline_s = math.inf  # no live sequence's deadline is earlier
        self._draining = False
        self.preemptions = 0

    # ---- what others may look at

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def can_run(self) -> bool:
        """Whether ``schedule`` may be called and would plan something, deadlines aside."""
        return bool(self._live) and self._outstanding is None

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def sequence(self, key: SequenceKey) -> Sequence:
        """To read, not to write: a live sequence, or one of the outstanding plan. KeyError for any other."""
        found = self._live.get(key) or next((s for s in self._retiring if s.key == key), None)
        if found is None:
            raise KeyError(key)
        return found

    def load(self) -> LoadSnapshot:
        prefilling = sum(s.num_uncomputed for s in self._running if s.is_prefilling)
        return LoadSnapshot(
            running_sequences=len(self._running),
            waiting_sequences=len(self._waiting),
            queued_prompt_tokens=self._waiting_tokens + prefilling,
            kv_blocks_used=self._pool.num_used,
            kv_blocks_total=self._pool.num_blocks,
        )

    # ---- coming and going

    def submit(self, sequence: Sequence, now_s: float) -> SequenceProgress | None:
        """Takes a sequence in; or returns how it ended at once, and keeps nothing of it."""
        refusal = self._refusal(sequence, now_s)
        if refusal is not None:
            end, detail = refusal
            return sequence.progress(end=end, detail=detail)
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._live[sequence.key] = sequence
        self._enqueue(sequence)
        if sequence.deadline_s is not None:
            self._next_deadline_s = min(self._next_deadline_s, sequence.deadline_s)
        return None

    def cancel(self, key: SequenceKey) -> bool:
        """Ends a live sequence without a further word; False when there is none. Safe to repeat."""
        sequence = self._live.get(key)
        if sequence is None:
            return False
        self._remove(sequence)
        return True

    def cancel_session(self, session: int) -> int:
        """Cancels all that a session wanted; how many that were."""
        keys = [key for key in self._live if key.session == session]
        return sum(self.cancel(key) for key in keys)

    def drain(self) -> None:
        """From now on nothing new is taken; what is here runs to its end."""
        self._draining = True

    # ---- a step

    def schedule(self, now_s: float) -> Scheduled:
        """Plans the next step. Its result must be committed before the next call."""
        assert self._outstanding is None, "commit the outstanding plan first"
        ended = self._expire(now_s)
        shares = self._share_out()
        if not shares:
            assert not self._live, "work without a plan"
            return Scheduled(None, ended)
        self._steps += 1
        plan = StepPlan(self._steps, tuple(self._entry(sequence, count) for sequence, count in shares))
        self._outstanding, self._in_step = plan, tuple(sequence for sequence, _ in shares)
        return Scheduled(plan, ended)

    def commit(self, result: StepResult) -> tuple[SequenceProgress, ...]:
        """Books a plan's result; the news of every sequence that got a token, in plan order."""
        plan, sequences = self._outstanding, self._in_step
        self._outstanding, self._in_step = None, ()
        assert plan is not None, "no plan is outstanding"
        assert result.step == plan.step, f"step {plan.step} runs, {result.step} was committed"
        tokens = iter(result.tokens)
        progresses = []
        for entry, sequence in zip(plan.entries, sequences, strict=True):
            token = next(tokens) if entry.sample else None
            assert token is None or token.key == entry.key, f"{token} answers {entry.key}"
            if self._live.get(entry.key) is not sequence:
                continue  # cancelled meanwhile
            sequence.num_computed = entry.end
            if token is not None:
                progresses.append(self._accept(sequence, token))
        assert next(tokens, None) is None, "more tokens than entries that sample"
        for sequence in self._retiring:
            self._release(sequence)
        self._retiring.clear()
        return tuple(progresses)

    def check(self) -> None:
        """Every invariant. O(blocks and sequences): for tests and post-mortems."""
        pool, limits = self._pool, self._limits
        pool.check(s.block_ids for s in (*self._running, *self._retiring))
        placed = [s.key for s in (*self._waiting, *self._running)]
        assert len(placed) == len(set(placed)), "a sequence is in two places"
        assert set(placed) == set(self._live), "a live sequence is nowhere, or a dead one somewhere"
        assert not set(map(id, self._retiring)) & set(map(id, self._live.values())), "a retiring sequence lives"
        assert self._outstanding is not None or not self._retiring, "a sequence retires without a plan"
        for queue in (self._waiting, self._running):
            assert queue == sorted(queue, key=_RANK), "a queue is out of order"
        for s in self._waiting:
            assert not s.block_ids, f"{s.key} waits and holds blocks"
            assert s.num_computed == 0, f"{s.key} waits and has computed tokens"
        for s in self._running:
            held = len(s.block_ids)
            assert s.num_computed < s.num_tokens, f"{s.key} runs with nothing to compute"
            assert pool.blocks_for(s.num_computed) <= held <= pool.blocks_for(s.num_tokens), f"{s.key} holds {held}"
        assert len(self._running) <= limits.max_num_seqs, "too many run"
        assert sum(not s.started for s in self._waiting) <= limits.max_num_waiting, "too many wait"
        assert self._waiting_tokens == sum(s.num_tokens for s in self._waiting), "waiting tokens are miscounted"
        assert self._next_deadline_s <= min(map(_DUE_S, self._live.values()), default=math.inf), "a deadline is lost"

    # ---- admission

    def _refusal(self, sequence: Sequence, now_s: float) -> tuple[SequenceEnd, str] | None:
        if self._draining:
            return SequenceEnd.REJECTED_DRAINING, "This replica is draining; submit to another one."
        if sequence.key in self._live:
            detail = f"Sequence {sequence.key.sequence_id} of this session runs already; never use an id twice."
            return SequenceEnd.REJECTED_INVALID, detail
        fault = self._limits.fault(sequence, self._pool)
        if fault:
            return SequenceEnd.REJECTED_INVALID, fault
        if self._limits.is_complete(sequence):
            return SequenceEnd.LENGTH, ""
        if sequence.due_s <= now_s:
            return sequence.late_end, ""
        if sequence.started or len(self._waiting) < self._limits.max_num_waiting:
            return None
        if sum(not s.started for s in self._waiting) < self._limits.max_num_waiting:
            return None
        return SequenceEnd.REJECTED_CAPACITY, f"{self._limits.max_num_waiting} sequences wait already; try again later."

    def _expire(self, now_s: float) -> tuple[SequenceProgress, ...]:
        """Ends what is too late. Looks at the sequences only when some deadline may have passed."""
        if now_s < self._next_deadline_s:
            return ()
        late = [s for s in self._live.values() if s.due_s <= now_s]
        for sequence in late:
            self._remove(sequence)
        self._next_deadline_s = min(map(_DUE_S, self._live.values()), default=math.inf)
        return tuple(s.progress(end=s.late_end) for s in late)

    # ---- sharing out a step

    def _share_out(self) -> list[tuple[Sequence, int]]:
        """Who computes how many tokens: decodes, chunks under way, newcomers."""
        budget = self._limits.max_num_batched_tokens
        shares = [(sequence, 1) for sequence in self._decodes(budget)]
        budget -= len(shares)
        for sequence in self._running:
            if budget and sequence.is_prefilling:
                shares.append((sequence, min(budget, sequence.num_uncomputed)))
                budget -= shares[-1][1]
        while budget and (newcomer := self._admit_next()) is not None:
            shares.append((newcomer, min(budget, newcomer.num_uncomputed)))
            budget -= shares[-1][1]
        return shares

    def _admit_next(self) -> Sequence | None:
        """Moves the first waiting sequence to the running ones, with blocks for all its known tokens."""
        if not self._waiting or len(self._running) >= self._limits.max_num_seqs:
            return None
        sequence = self._waiting[0]
        blocks = self._pool.blocks_for(sequence.num_tokens)
        if self._pool.num_free < blocks + len(self._running):
            return None
        self._dequeue(sequence)
        sequence.block_ids = self._pool.allocate(blocks)
        sequence.started = True
        insort(self._running, sequence, key=_RANK)
        return sequence

    def _decodes(self, budget: int) -> Iterator[Sequence]:
        """Running sequences that add one token now, in rank order, each with a block for it."""
        for sequence in tuple(self._running):
            if not budget:
                return
            # A victim ranks behind the one it makes room for, so it has not been handed out yet.
            if sequence.block_ids and not sequence.is_prefilling and self._grow(sequence):
                budget -= 1
                yield sequence

    def _grow(self, sequence: Sequence) -> bool:
        """Makes sure of a slot for the newest token; False when nobody may be preempted for it."""
        if sequence.num_tokens <= len(sequence.block_ids) * self._pool.block_size:
            return True
        if not self._pool.num_free:
            victim = self._victim(sequence)
            if victim is None:
                return False
            self._preempt(victim)
        sequence.block_ids += self._pool.allocate(1)
        return True

    def _victim(self, wanting: Sequence) -> Sequence | None:
        behind = self._running[self._running.index(wanting) + 1 :]
        for candidate in reversed(behind):
            if candidate.preemptions < self._limits.max_preemptions:
                return candidate
        return behind[-1] if behind and wanting is self._running[0] else None

    def _preempt(self, victim: Sequence) -> None:
        self._running.remove(victim)
        self._release(victim)
        victim.num_computed = 0
        victim.preemptions += 1
        self.preemptions += 1
        self._enqueue(victim)

    def _entry(self, sequence: Sequence, count: int) -> StepEntry:
        start = sequence.num_computed
        end = start + count
        sample = end == sequence.num_tokens
        blocks = sequence.block_ids if sample else sequence.block_ids[: self._pool.blocks_for(end)]
        return StepEntry(sequence.key, sequence.tokens(start, end), start, blocks, sample)

    # ---- bookkeeping

    def _accept(self, sequence: Sequence, token: SampledToken) -> SequenceProgress:
        """Appends a token or ends at it. The sampler masks stop tokens before min_tokens; one that came is a token."""
        params = sequence.params
        if token.token_id in params.stop_token_ids and len(sequence.generated_token_ids) >= params.min_tokens:
            self._remove(sequence)
            return sequence.progress(end=SequenceEnd.STOP)
        sequence.generated_token_ids.append(token.token_id)
        end = SequenceEnd.LENGTH if self._limits.is_complete(sequence) else None
        if end is not None:
            self._remove(sequence)
        return sequence.progress(token, end=end)

    def _enqueue(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=_RANK)
        self._waiting_tokens += sequence.num_tokens

    def _dequeue(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        self._waiting_tokens -= sequence.num_tokens

    def _remove(self, sequence: Sequence) -> None:
        """Forgets a live sequence; its blocks are free now, or when the plan that names it is committed."""
        del self._live[sequence.key]
        if not sequence.block_ids:
            self._dequeue(sequence)
            return
        self._running.remove(sequence)
        if sequence in self._in_step:
            self._retiring.append(sequence)
        else:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._pool.free(sequence.block_ids)
        sequence.block_ids = ()
