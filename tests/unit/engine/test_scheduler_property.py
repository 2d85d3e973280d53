"""Random lives of a whole engine over a fake model that reads its context from a paged KV cache, as a real one does."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.domain.request import SamplingParams, SequenceEnd
from cluster.engine.block_pool import BlockPool
from cluster.engine.scheduler import Scheduler, SchedulerLimits
from cluster.engine.sequence import Sequence
from cluster.engine.step import SampledToken, SequenceKey, SequenceProgress, StepPlan, StepResult

VOCABULARY = 40
MAX_MODEL_LEN = 40
REFUSALS = {
    SequenceEnd.REJECTED_CAPACITY, SequenceEnd.REJECTED_INVALID, SequenceEnd.REJECTED_DRAINING,
    SequenceEnd.EVICTED_DEADLINE,
}  # fmt: skip


def next_token(prefix: list[int], num_generated: int, params: SamplingParams) -> int:
    """Depends on every token before it and on their order; stop tokens are masked before min_tokens."""
    token = zlib.crc32(bytes(prefix)) % VOCABULARY
    while token in params.stop_token_ids and num_generated < params.min_tokens:
        token = (token + 1) % VOCABULARY
    return token


def reference(prompt: tuple[int, ...], params: SamplingParams) -> tuple[list[int], SequenceEnd]:
    """The plain loop without an engine."""
    output: list[int] = []
    while len(output) < params.max_tokens and len(prompt) + len(output) < MAX_MODEL_LEN:
        token = next_token([*prompt, *output], len(output), params)
        if token in params.stop_token_ids and len(output) >= params.min_tokens:
            return output, SequenceEnd.STOP
        output.append(token)
    return output, SequenceEnd.LENGTH


class FakeModel:
    """Writes tokens where the plan says and computes from what it then finds in the sequence's blocks."""

    def __init__(self, pool: BlockPool) -> None:
        self.block_size = pool.block_size
        self.cache: list[int | None] = [None] * (pool.num_blocks * pool.block_size)

    def run(self, plan: StepPlan, histories: dict[SequenceKey, tuple[int, SamplingParams]]) -> StepResult:
        sampled = []
        for entry in plan.entries:
            assert len(entry.block_ids) == -(-entry.end // self.block_size)
            slots = [self._slot(entry.block_ids, position) for position in range(entry.end)]
            for slot, token in zip(slots[entry.start :], entry.token_ids, strict=True):
                self.cache[slot] = token
            if entry.sample:
                prefix = [self.cache[slot] for slot in slots]
                sampled.append(SampledToken(entry.key, next_token(prefix, *histories[entry.key])))
        return StepResult(plan.step, tuple(sampled))

    def _slot(self, block_ids: tuple[int, ...], position: int) -> int:
        return block_ids[position // self.block_size] * self.block_size + position % self.block_size


@dataclass
class Client:
    """What the outside knows of one sequence."""

    sequence: Sequence
    prompt: tuple[int, ...]
    received: list[int]
    ends: list[SequenceEnd] = field(default_factory=list)


class EngineLife(RuleBasedStateMachine):
    @initialize(
        room=st.integers(16, 60), block_size=st.integers(1, 5), max_num_seqs=st.integers(1, 8),
        budget=st.integers(1, 24), max_num_waiting=st.integers(2, 12), max_preemptions=st.integers(0, 3),
    )  # fmt: skip
    def build(self, room, block_size, max_num_seqs, budget, max_num_waiting, max_preemptions) -> None:
        self.limits = SchedulerLimits(max_num_seqs, budget, max_num_waiting, MAX_MODEL_LEN, max_preemptions)
        self.pool = BlockPool(room // block_size, block_size)
        self.scheduler = Scheduler(self.limits, self.pool)
        self.model = FakeModel(self.pool)
        self.clients: dict[SequenceKey, Client] = {}
        self.now_s = 0.0
        self.step_number = 0
        self.draining = False

    # ---- what happens

    @rule(
        requests=st.lists(
            st.tuples(
                st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9).map(tuple),
                st.integers(1, 24),
                st.integers(-1, 1),
                st.none() | st.none() | st.integers(0, 40),
            ),
            min_size=1, max_size=4,
        ),
        stops=st.frozensets(st.integers(0, VOCABULARY - 1), max_size=2),
        session=st.integers(0, 3),
    )  # fmt: skip
    def arrive(self, requests, stops, session) -> None:
        for prompt, max_tokens, priority, deadline in requests:
            self.submit(prompt, max_tokens, 0, 0, stops, priority, deadline, session)

    @rule(
        prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=0, max_size=42).map(tuple),
        max_tokens=st.integers(1, 24), min_tokens=st.integers(0, 6), resume=st.integers(0, 10),
        stops=st.frozensets(st.integers(0, VOCABULARY - 1), max_size=4), priority=st.integers(-1, 1),
        deadline=st.none() | st.integers(0, 30), session=st.integers(0, 3),
    )  # fmt: skip
    def submit(self, prompt, max_tokens, min_tokens, resume, stops, priority, deadline, session) -> None:
        params = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=stops)
        journal = reference(prompt, params)[0][:resume]
        key = SequenceKey(session, len(self.clients))
        deadline_s = None if deadline is None else self.now_s + deadline
        sequence = Sequence(key, prompt, params, list(journal), priority=priority, deadline_s=deadline_s)
        self.clients[key] = Client(sequence, prompt, list(journal))
        refused = self.scheduler.submit(sequence, self.now_s)
        if refused is not None:
            assert refused.end in REFUSALS | {SequenceEnd.LENGTH, SequenceEnd.ABORTED_DEADLINE}
            assert (refused.end is SequenceEnd.REJECTED_DRAINING) == self.draining
            assert not (refused.end is SequenceEnd.REJECTED_CAPACITY and journal)
            self.hear(refused)
        else:
            assert not self.draining

    @rule(choice=st.integers(0, 1000))
    def cancel(self, choice) -> None:
        if self.clients:
            self.cancel_one(list(self.clients)[choice % len(self.clients)])

    @rule(session=st.integers(0, 2))
    def lose_session(self, session) -> None:
        if session == 0:
            return  # one session is faithful
        gone = [c for key, c in self.clients.items() if key.session == session and not c.ends]
        assert self.scheduler.cancel_session(session) == len(gone)
        for client in gone:
            client.ends.append(SequenceEnd.CANCELLED)

    @rule(seconds=st.integers(1, 5))
    def wait(self, seconds) -> None:
        self.now_s += seconds

    @rule(cancelled=st.lists(st.integers(0, 1000), max_size=2), times=st.integers(1, 8))
    def step(self, cancelled, times) -> None:
        """Some steps; cancels arrive while the last of them runs."""
        for _ in range(times - 1):
            self.run_step([])
        self.run_step(cancelled)

    @precondition(lambda self: len(self.clients) > 30)
    @rule()
    def drain(self) -> None:
        self.scheduler.drain()
        self.draining = True

    # ---- what must hold

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check()
        load = self.scheduler.load()
        open_clients = [c for c in self.clients.values() if not c.ends]
        assert load.running_sequences + load.waiting_sequences == len(open_clients)
        assert self.scheduler.has_work == bool(open_clients)
        assert load.kv_blocks_used == sum(len(c.sequence.block_ids) for c in open_clients)
        assert all(not c.sequence.block_ids for c in self.clients.values() if c.ends)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        work = sum(MAX_MODEL_LEN for c in self.clients.values() if not c.ends)
        steps = 0
        before = self.scheduler.preemptions
        while self.scheduler.has_work:
            self.run_step([])
            self.scheduler.check()
            steps += 1
            # Every step computes at least one token; a preemption repeats at most one sequence's.
            assert steps <= work + (self.scheduler.preemptions - before) * MAX_MODEL_LEN + 1
        assert self.scheduler.preemptions - before <= 4 * work
        assert self.pool.num_free == self.pool.num_blocks
        for client in self.clients.values():
            self.judge(client)

    def judge(self, client: Client) -> None:
        (end,) = client.ends
        tokens, expected_end = reference(client.prompt, client.sequence.params)
        if end in (SequenceEnd.STOP, SequenceEnd.LENGTH):
            assert (client.received, end) == (tokens, expected_end)
        else:
            assert client.received == tokens[: len(client.received)]
            if end in REFUSALS:
                assert len(client.received) == client.sequence.resumed_tokens
            if end is SequenceEnd.EVICTED_DEADLINE:
                assert not client.received

    # ---- the loop

    def run_step(self, cancelled: list[int]) -> None:
        scheduled = self.scheduler.schedule(self.now_s)
        self.now_s += 0.25
        for progress in scheduled.ended:
            self.hear(progress)
        plan = scheduled.plan
        assert (plan is not None) == self.scheduler.has_work
        if plan is None:
            return
        self.step_number += 1
        self.inspect(plan)
        histories = {
            e.key: (len(self.clients[e.key].sequence.generated_token_ids), self.clients[e.key].sequence.params)
            for e in plan.entries
        }
        victims = [plan.entries[choice % len(plan.entries)].key for choice in cancelled]
        used = self.pool.num_used
        for key in victims:
            self.cancel_one(key)
            self.scheduler.check()
            assert self.pool.num_used == used, "a block of a running plan was freed"
            assert self.scheduler.sequence(key) is self.clients[key].sequence
        progresses = self.scheduler.commit(self.model.run(plan, histories))
        order = [e.key for e in plan.entries if e.sample and e.key not in victims]
        assert [p.key for p in progresses] == order
        for progress in progresses:
            self.hear(progress)
        assert all(not self.clients[key].sequence.block_ids for key in victims)

    def inspect(self, plan: StepPlan) -> None:
        assert plan.step == self.step_number
        assert plan.num_tokens <= self.limits.max_num_batched_tokens
        keys = [e.key for e in plan.entries]
        assert len(set(keys)) == len(keys) <= self.limits.max_num_seqs
        decodes = [e.is_decode for e in plan.entries]
        assert {"decode": all(decodes), "prefill": not any(decodes), "mixed": True}[plan.kind]
        for entry in plan.entries:
            client = self.clients[entry.key]
            assert not client.ends, "a dead sequence is computed"
            known = [*client.prompt, *client.received]
            assert list(entry.token_ids) == known[entry.start : entry.end]
            assert entry.sample == (entry.end == len(known))

    def cancel_one(self, key: SequenceKey) -> None:
        client = self.clients[key]
        assert self.scheduler.cancel(key) == (not client.ends)
        if not client.ends:
            client.ends.append(SequenceEnd.CANCELLED)
        assert not self.scheduler.cancel(key)

    def hear(self, progress: SequenceProgress) -> None:
        client = self.clients[progress.key]
        assert not client.ends, "news after the end"
        assert progress.token_ids or progress.end is not None, "news without news"
        client.received.extend(progress.token_ids)
        if progress.end is not None:
            client.ends.append(progress.end)


TestEngineLife = EngineLife.TestCase
TestEngineLife.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, derandomize=True, database=None
)
