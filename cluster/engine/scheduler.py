"""Which sequences compute what in the next step, and which of them are over. Pure: no clock, no I/O, no torch.

``submit`` and ``cancel`` at any time. ``schedule`` while ``can_schedule``; then ``commit`` the results, in the order of
the plans. Up to ``depth`` plans may be outstanding, so that the stages of a pipeline overlap. The rules:

1. One order for everything, the rank: higher priority first, then earlier arrival.
2. Decodes come first within the token budget, then chunks of prompts under way, then waiting sequences are
   admitted strictly in rank order. Nobody overtakes the first one that does not fit, so nobody starves.
3. A sequence gets a slot and the KV blocks of all its known tokens when it is admitted: a prompt under way never lacks
   blocks. Admission leaves a block for each running sequence, so that nobody has to make room for a while. Blocks that
   hold its first tokens already are shared, not computed (``prefix_cache``).
4. A decode that needs a block when none is free takes the blocks of the running sequence of lowest rank behind it:
   that one is preempted. It waits again, keeps its tokens and computes them anew later. With nobody behind it the
   decode pauses for the step.
5. A sequence preempted ``max_preemptions`` times is no longer chosen, unless the first running sequence of all has
   nobody else to take from. That one is never preempted while it is first, and alone it always fits (``submit``
   checks). Therefore a plan is never empty while there is work and none is outstanding, and every sequence ends.
6. Plans in flight. Who samples in an outstanding plan is planned again after its commit; chunks of one prompt may
   follow each other at once. A block or slot is free only when the last plan that names it has been committed: who
   ends earlier gives them back then, and who shall be preempted is only left out of new plans until then.
7. With a depth above one a plan takes at most its part of all decodes, ``1 / depth`` rounded up. One plan with all of
   them would leave every stage but one idle; parts follow each other through the stages and take no longer, since a
   step's time does not shrink when its batch grows.
8. Where a rotary embedding switches at a length, the sequence that passes it waits and is computed anew, like a
   preempted one.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter, deque
from dataclasses import dataclass
from operator import attrgetter

from cluster.domain.endpoint import LoadSnapshot
from cluster.domain.request import SequenceEnd
from cluster.engine.block_pool import BlockPool
from cluster.engine.limits import SchedulerLimits
from cluster.engine.prefix_cache import PrefixCache
from cluster.engine.sequence import NO_SLOT, Sequence
from cluster.engine.step import SampledToken, SequenceKey, SequenceProgress, StepPlan, StepResult
from cluster.engine.step_room import StepRoom
from cluster.engine.waiting_queue import RANK, WaitingQueue

__all__ = ["Scheduled", "Scheduler", "SchedulerLimits"]

_DUE_S = attrgetter("due_s")


@dataclass(frozen=True, slots=True)
class Scheduled:
    """The next plan (None: there is nothing to do now) and the sequences whose deadline has passed."""

    plan: StepPlan | None
    ended: tuple[SequenceProgress, ...]


class Scheduler:
    """Owns the sequences of one engine and the blocks they hold. One thread; ``load`` is its snapshot for others."""

    def __init__(
        self, limits: SchedulerLimits, pool: BlockPool, *, depth: int = 1, prefix_caching: bool = True
    ) -> None:  # fmt: skip
        assert depth >= 1, depth
        self._limits = limits
        self._pool = pool
        self._depth = depth
        self._cache = PrefixCache(pool, limits.rope_by_length, enabled=prefix_caching)
        self._switch_length = limits.switch_length
        self._live: dict[SequenceKey, Sequence] = {}
        self._waiting = WaitingQueue(limits)
        self._running: list[Sequence] = []  # by rank
        self._retiring: list[Sequence] = []  # over, but named by an outstanding plan
        self._outstanding: deque[tuple[StepPlan, list[Sequence]]] = deque()  # with the sequences of the entries
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._arrivals = 0
        self._steps = 0
        self._next_deadline_s = math.inf  # no live sequence's deadline is earlier
        self._stalled = False  # nothing can be planned before something happens
        self.num_decoding = 0  # running sequences with nothing but their newest token, or no token, left to plan
        self.preemptions = 0

    # ---- what others may look at

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def can_schedule(self) -> bool:
        """Whether ``schedule`` may plan something now; always true while there is work and no plan is outstanding."""
        return bool(self._live) and not self._stalled and len(self._outstanding) < self._depth

    @property
    def num_outstanding(self) -> int:
        return len(self._outstanding)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def prompt_under_way(self) -> Sequence | None:
        """To read, not to write: the first running sequence that prefills."""
        running = self._running if self.num_decoding < len(self._running) else ()  # most often, nobody prefills
        return next((s for s in running if s.is_prefilling), None)

    @property
    def prefix_queries(self) -> int:
        """Known tokens of all sequences that were admitted, each time they were."""
        return self._cache.queries

    @property
    def prefix_hits(self) -> int:
        """Those of ``prefix_queries`` whose keys and values were found in the cache."""
        return self._cache.hits

    def sequence(self, key: SequenceKey) -> Sequence:
        """To read, not to write: a live sequence. KeyError for any other."""
        return self._live[key]

    def load(self) -> LoadSnapshot:
        running = self._running if self.num_decoding < len(self._running) else ()  # most often, nobody prefills
        prefilling = sum(s.num_tokens - s.num_planned for s in running if s.is_prefilling)
        return LoadSnapshot(
            running_sequences=len(self._running),
            waiting_sequences=len(self._waiting),
            queued_prompt_tokens=self._waiting.num_tokens + prefilling,
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
        sequence.max_length = self._limits.max_length(sequence)
        sequence.live = True
        self._arrivals += 1
        self._live[sequence.key] = sequence
        self._waiting.add(sequence)
        self._stalled = False
        self._next_deadline_s = min(self._next_deadline_s, sequence.due_s)
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
        return sum([self.cancel(key) for key in keys])

    # ---- a step

    def schedule(self, now_s: float, prefill_tokens: int | None = None, *, short_prompt: int = 0) -> Scheduled:
        """Plans the next step, while ``depth`` allows one more.

        ``prefill_tokens``: while sequences decode, a plan takes at most so many tokens of sequences with more than
        ``short_prompt`` known tokens, so that these do not slow the decodes down; None: what the budget leaves. 0 means
        1 where no decode is in the plan; ask for it now and then only, since prompts must come to their end.
        """
        assert len(self._outstanding) < self._depth, "commit the oldest outstanding plan first"
        ended = self._expire(now_s)
        shares = self._share_out(prefill_tokens, short_prompt)
        if not shares:
            assert self._outstanding or not self._live, "work without a plan"
            self._stalled = True
            return Scheduled(None, ended)
        self._steps += 1
        starts = tuple(sequence.begin() for sequence, _ in shares if not sequence.num_told)
        plan = StepPlan(self._steps, tuple(sequence.plan(count) for sequence, count in shares), starts)
        self._outstanding.append((plan, [sequence for sequence, _ in shares]))
        return Scheduled(plan, ended)

    def commit(self, result: StepResult) -> tuple[SequenceProgress, ...]:
        """Books the result of the oldest outstanding plan; news of each sequence that got a token, in plan order."""
        assert self._outstanding, "no plan is outstanding"
        plan, sequences = self._outstanding[0]
        assert result.step == plan.step, f"step {plan.step} runs, {result.step} was committed"
        assert len(result.tokens) == sum([e.sample for e in plan.entries]), "not one token for each entry that samples"
        self._outstanding.popleft()
        self._stalled = False
        block_size = self._pool.block_size
        tokens = iter(result.tokens)
        progresses = []
        for entry, sequence in zip(plan.entries, sequences, strict=True):
            sequence.num_plans -= 1
            token = next(tokens) if entry.sample else None
            assert token is None or token.key == entry.key, f"{token} answers {entry.key}"
            if not sequence.live:
                if not sequence.num_plans:
                    self._retiring.remove(sequence)
                    self._release(sequence)
                continue
            sequence.num_computed = entry.start + len(entry.token_ids)
            if sequence.num_computed >= (sequence.num_recorded + 1) * block_size:
                self._cache.record(sequence)
            if token is not None:
                progresses.append(self._accept(sequence, token))
        return tuple(progresses)

    def check(self) -> None:
        """Every invariant. O(blocks and sequences): for tests and post-mortems."""
        holders = (*self._running, *self._retiring)
        self._pool.check(s.block_ids for s in holders)
        self._waiting.check()
        placed = [s.key for s in (*self._waiting, *self._running)]
        assert len(placed) == len(set(placed)), "a sequence is in two places"
        assert set(placed) == set(self._live), "a live sequence is nowhere, or a dead one somewhere"
        assert self._running == sorted(self._running, key=RANK), "the running sequences are out of order"
        slots = [*self._free_slots, *(s.slot for s in holders)]
        assert sorted(slots) == list(range(self._limits.max_num_seqs)), "a slot is lost, or in use twice"
        named = Counter(id(s) for _, sequences in self._outstanding for s in sequences)
        assert not named.keys() - set(map(id, holders)), "a plan names a sequence that holds nothing"
        for s in self._retiring:
            assert not s.live, f"{s.key} lives and retires"
            assert s.num_plans == named[id(s)] > 0, f"{s.key} retires without a plan"
        for s in self._waiting:
            assert s.live, f"{s.key} waits and is dead"
            assert (s.slot, s.block_ids, s.num_told, s.num_recorded) == (NO_SLOT, [], 0, 0), f"{s.key} waits and holds"
            assert s.num_planned == s.num_computed == s.num_plans == 0, f"{s.key} waits and is planned"
        for s in self._running:
            assert s.num_plans == named[id(s)], f"{s.key} miscounts its plans"
            s.check(self._pool)
        assert self.num_decoding == sum(not s.is_prefilling for s in self._running), "decodes are miscounted"
        assert len(self._outstanding) <= self._depth, "too many plans are outstanding"
        assert self._next_deadline_s <= min(map(_DUE_S, self._live.values()), default=math.inf), "a deadline is lost"

    # ---- admission

    def _refusal(self, sequence: Sequence, now_s: float) -> tuple[SequenceEnd, str] | None:
        if sequence.key in self._live:
            detail = f"Sequence {sequence.key.sequence_id} of this session runs already; never use an id twice."
            return SequenceEnd.REJECTED_INVALID, detail
        fault = self._limits.fault(sequence, self._pool)
        if fault:
            return SequenceEnd.REJECTED_INVALID, fault
        if sequence.num_tokens >= self._limits.max_length(sequence):
            return SequenceEnd.LENGTH, ""
        if sequence.due_s <= now_s:
            return sequence.late_end, "The deadline had passed when the request came; allow it more time."
        overflow = self._waiting.overflow(sequence)
        return (SequenceEnd.REJECTED_CAPACITY, overflow) if overflow else None

    def _expire(self, now_s: float) -> tuple[SequenceProgress, ...]:
        """Ends what is too late. Looks at the sequences only when some deadline may have passed."""
        if now_s < self._next_deadline_s:
            return ()
        late = [s for s in self._live.values() if s.due_s <= now_s]
        waiting = len(self._waiting)
        for sequence in late:
            self._remove(sequence)
        self._next_deadline_s = min(map(_DUE_S, self._live.values()), default=math.inf)
        return tuple(s.progress(end=s.late_end, detail=s.late_detail(waiting)) for s in late)

    # ---- sharing out a step

    def _share_out(self, prefill_tokens: int | None, short_prompt: int) -> list[tuple[Sequence, int]]:
        """Who computes how many tokens: decodes, chunks under way, newcomers."""
        assert prefill_tokens is None or prefill_tokens >= 0, prefill_tokens
        decoding = self.num_decoding
        held_back: list[Sequence] = []
        budget = self._limits.max_num_batched_tokens
        shares = [(s, 1) for s in self._decodes(min(budget, -(-decoding // self._depth)), held_back)]
        prefill_tokens = 1 if prefill_tokens == 0 and not shares else prefill_tokens
        room = StepRoom(budget - len(shares), prefill_tokens if decoding else None, short_prompt)
        chunks = []
        for sequence in self._running if self.num_decoding < len(self._running) else ():  # most often, nobody prefills
            left = sequence.num_tokens - sequence.num_planned
            if left > 1 and sequence not in held_back and (count := room.take(sequence.num_tokens, left)):
                chunks.append((sequence, count))
                self.num_decoding += left - count < 2
        while (waiting := self._waiting.next_for(room)) is not None and (newcomer := self._admit(waiting)) is not None:
            left = newcomer.num_tokens - newcomer.num_planned
            # One that was found in the cache but for its last token is a decode to all who compute.
            kind = shares if left == 1 and newcomer.num_planned else chunks
            count = room.take(newcomer.num_tokens, left)
            kind.append((newcomer, count))
            self.num_decoding += left - count < 2
        return shares + chunks

    def _admit(self, sequence: Sequence) -> Sequence | None:
        """Moves a waiting sequence to the running ones, with blocks for all its known tokens."""
        pool = self._pool
        spare = pool.num_free - len(self._running)
        if not self._free_slots or spare <= 0:
            return None
        cached = self._cache.lookup(sequence)
        blocks = pool.blocks_for(sequence.num_tokens)
        if blocks - pool.num_held(cached) > spare:
            return None
        self._waiting.remove(sequence)
        pool.share(cached)
        sequence.admit(self._free_slots.pop(), cached, pool.allocate(blocks - len(cached)), pool.block_size)
        if self._switch_length is not None and sequence.num_tokens >= self._switch_length:
            sequence.rope_prompt = sequence.num_tokens
        self._cache.count(sequence, sequence.num_computed)
        insort(self._running, sequence, key=RANK)
        return sequence

    def _decodes(self, most: int, held_back: list[Sequence]) -> list[Sequence]:
        """Running sequences that add one token now, in rank order, each with a block for it."""
        taken: list[Sequence] = []
        block_size = self._pool.block_size
        for s in tuple(self._running):
            if len(taken) == most:
                break
            # A victim ranks behind the one it makes room for, so it has not been handed out yet.
            if s.num_tokens - s.num_planned != 1 or not s.num_planned:
                continue
            if s.num_tokens <= len(s.block_ids) * block_size or self._grow(s, held_back):
                taken.append(s)
        return taken

    def _grow(self, sequence: Sequence, held_back: list[Sequence]) -> bool:
        """One more block for the newest token; False when there is none yet, or nobody may be preempted for it."""
        while not self._pool.num_free:  # a victim gives nothing where all its blocks are shared
            if self._retiring:
                return False  # blocks are on their way
            victim = self._victim(sequence)
            if victim is None:
                return False
            if victim.num_plans:
                held_back.append(victim)
                return False
            self.preemptions += 1
            victim.preemptions += 1
            self._requeue(victim)
        sequence.block_ids += self._pool.allocate(1)
        return True

    def _victim(self, wanting: Sequence) -> Sequence | None:
        behind = self._running[self._running.index(wanting) + 1 :]
        for candidate in reversed(behind):
            if candidate.preemptions < self._limits.max_preemptions:
                return candidate
        return behind[-1] if behind and wanting is self._running[0] else None

    # ---- bookkeeping

    def _accept(self, sequence: Sequence, token: SampledToken) -> SequenceProgress:
        """Appends a token or ends at it. The sampler masks stop tokens before min_tokens; one that came is a token."""
        params = sequence.params
        if token.token_id in params.stop_token_ids and len(sequence.generated_token_ids) >= params.min_tokens:
            self._remove(sequence)
            return sequence.progress(end=SequenceEnd.STOP)
        sequence.append(token.token_id)
        if sequence.num_tokens >= sequence.max_length:
            self._remove(sequence)
            return sequence.progress(token, end=SequenceEnd.LENGTH)
        if sequence.num_tokens == self._switch_length:
            self._requeue(sequence)
        return sequence.progress(token)

    def _requeue(self, sequence: Sequence) -> None:
        """Lets a sequence that no plan names wait, to be computed from the beginning."""
        self._stop_running(sequence)
        self._release(sequence)
        self._waiting.add(sequence)

    def _remove(self, sequence: Sequence) -> None:
        """Forgets a live sequence; its blocks are free now, or when the last plan that names it is committed."""
        del self._live[sequence.key]
        sequence.live = False
        self._stalled = False
        if sequence.slot == NO_SLOT:
            self._waiting.remove(sequence)
            return
        self._stop_running(sequence)
        if sequence.num_plans:
            self._retiring.append(sequence)
        else:
            self._release(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self.num_decoding -= not sequence.is_prefilling

    def _release(self, sequence: Sequence) -> None:
        self._free_slots.append(sequence.slot)
        self._pool.free(sequence.give_back())
