"""Random lives of a whole engine over a fake model that reads its context from a paged KV cache, as a real one does."""

from __future__ import annotations

import zlib
from array import array
from collections import deque
from dataclasses import dataclass, field
from functools import cache

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cluster.domain.model_spec import RopeByLength
from cluster.domain.request import SamplingParams, SequenceEnd
from cluster.engine.block_pool import BlockPool
from cluster.engine.scheduler import Scheduler, SchedulerLimits
from cluster.engine.sequence import Sequence
from cluster.engine.step import SampledToken, SequenceKey, SequenceProgress, StepEntry, StepPlan, StepResult

VOCABULARY = 40
MAX_MODEL_LEN = 40
ORIGINAL_LEN = 12
ROPES = (None, None, RopeByLength("switch", ORIGINAL_LEN), RopeByLength("dynamic", ORIGINAL_LEN))
BASES = ((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16), (1, 2, 3, 4, 5, 6, 39, 39, 1, 2, 3, 4, 5, 6, 7, 8))
REFUSALS = {SequenceEnd.REJECTED_CAPACITY, SequenceEnd.REJECTED_INVALID, SequenceEnd.EVICTED_DEADLINE}

PROMPTS = st.tuples(
    st.sampled_from(BASES), st.integers(0, 16), st.lists(st.integers(0, VOCABULARY - 1), min_size=0, max_size=5)
).map(lambda parts: (*parts[0][: parts[1]], *parts[2]))
SALTS = st.sampled_from((b"", b"", b"a"))


# ---- the model: what a position holds depends on everything before it, what is sampled on everything there is


def frequency(rope: RopeByLength | None, length: int) -> int:
    """Which rotary frequencies a token of a sequence of ``length`` has."""
    if rope is None or length <= rope.original_len:
        return 0
    return length if rope.kind == "dynamic" else 1


def cell(before: list[int], token: int, freq: int) -> int:
    return zlib.crc32(array("Q", [*before, token, freq]).tobytes())


def draw(cells: list[int], prompt: tuple[int, ...], generated: tuple[int, ...], params: SamplingParams) -> int:
    """Stop tokens are masked before min_tokens; the history counts besides the cells, as it does for penalties."""
    token = zlib.crc32(array("Q", [*cells, *prompt, *generated, len(prompt)]).tobytes()) % VOCABULARY
    while token in params.stop_token_ids and len(generated) < params.min_tokens:
        token = (token + 1) % VOCABULARY
    return token


@cache
def plain_cells(tokens: tuple[int, ...], num_prompt: int, rope: RopeByLength | None) -> tuple[int, ...]:
    """What the cells of a sequence hold that is computed alone."""
    if rope is not None and rope.kind == "switch":
        cells: list[int] = []
        for token in tokens:
            cells.append(cell(cells, token, frequency(rope, len(tokens))))
        return tuple(cells)
    before = plain_cells(tokens[:-1], num_prompt, rope) if len(tokens) > 1 else ()
    return (*before, cell(list(before), tokens[-1], frequency(rope, max(num_prompt, len(tokens)))))


def reference(
    prompt: tuple[int, ...], params: SamplingParams, rope: RopeByLength | None
) -> tuple[list[int], SequenceEnd]:
    """The plain loop without an engine."""
    output: list[int] = []
    while len(output) < params.max_tokens and len(prompt) + len(output) < MAX_MODEL_LEN:
        cells = list(plain_cells((*prompt, *output), len(prompt), rope))
        token = draw(cells, prompt, tuple(output), params)
        if token in params.stop_token_ids and len(output) >= params.min_tokens:
            return output, SequenceEnd.STOP
        output.append(token)
    return output, SequenceEnd.LENGTH


class Ranks:
    """Runs plans in order. It knows of a sequence what plans have told: tables and histories by slot, cells by block."""

    def __init__(self, pool: BlockPool, max_num_seqs: int, rope: RopeByLength | None) -> None:
        self.block_size, self.rope = pool.block_size, rope
        self.cells: list[int | None] = [None] * (pool.num_blocks * pool.block_size)
        self.tables: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self.histories: list[tuple[SamplingParams, tuple[int, ...], tuple[int, ...]]] = [None] * max_num_seqs

    def run(self, plan: StepPlan) -> StepResult:
        for start in plan.starts:
            self.histories[start.slot] = (start.params, start.prompt_token_ids, start.generated_token_ids)
        return StepResult(plan.step, tuple(token for e in plan.entries if (token := self.compute(e)) is not None))

    def compute(self, entry: StepEntry) -> SampledToken | None:
        table = self.tables[entry.slot]
        assert entry.first_block <= len(table)
        assert entry.first_block == len(table) or not entry.new_block_ids or entry.first_block == 0
        table[entry.first_block :] = entry.new_block_ids
        places = [table[p // self.block_size] * self.block_size + p % self.block_size for p in range(entry.end)]
        for position, token in zip(range(entry.start, entry.end), entry.token_ids, strict=True):
            before = [self.cells[place] for place in places[:position]]
            freq = frequency(self.rope, max(entry.num_prompt, position + 1))
            self.cells[places[position]] = cell(before, token, freq)
        if not entry.sample:
            return None
        params, prompt, generated = self.histories[entry.slot]
        token = draw([self.cells[place] for place in places], prompt, generated, params)
        self.histories[entry.slot] = (params, prompt, (*generated, token))
        return SampledToken(entry.key, token)


# ---- the machine


@dataclass
class Client:
    """What the outside knows of one sequence."""

    sequence: Sequence
    prompt: tuple[int, ...]
    received: list[int]
    ends: list[SequenceEnd] = field(default_factory=list)


class EngineLife(RuleBasedStateMachine):
    @initialize(
        room=st.integers(32, 72), block_size=st.integers(1, 5), max_num_seqs=st.integers(1, 8),
        budget=st.integers(1, 24), max_num_waiting=st.integers(4, 24),
        max_waiting_prompt_tokens=st.integers(10, 60) | st.just(500),
        max_preemptions=st.integers(0, 3), depth=st.integers(1, 3), rope=st.sampled_from(ROPES),
        caching=st.sampled_from((True, True, True, False)),
    )  # fmt: skip
    def build(
        self, room, block_size, max_num_seqs, budget, max_num_waiting, max_waiting_prompt_tokens, max_preemptions,
        depth, rope, caching,
    ) -> None:  # fmt: skip
        self.limits = SchedulerLimits(
            max_num_seqs, budget, max_num_waiting, MAX_MODEL_LEN, max_preemptions,
            max_waiting_prompt_tokens=max_waiting_prompt_tokens, rope_by_length=rope,
        )  # fmt: skip
        self.pool = BlockPool(room // block_size, block_size)
        self.depth, self.rope = depth, rope
        self.scheduler = Scheduler(self.limits, self.pool, depth=depth, prefix_caching=caching)
        self.ranks = Ranks(self.pool, max_num_seqs, rope)
        self.clients: dict[SequenceKey, Client] = {}
        self.in_flight: deque[tuple[StepPlan, set[int]]] = deque()  # with the blocks that the plan names
        self.tables: dict[int, list[int]] = {}  # by slot, as the newest plan leaves them
        self.now_s = 0.0
        self.step_number = 0

    # ---- what happens

    @rule(
        requests=st.lists(
            st.tuples(
                PROMPTS.filter(bool), st.integers(1, 24) | st.just(24), st.integers(-1, 1),
                st.none() | st.none() | st.integers(0, 40), SALTS,
            ),
            min_size=1, max_size=4,
        ),
        stops=st.frozensets(st.integers(0, VOCABULARY - 1), max_size=2),
        session=st.integers(0, 3),
    )  # fmt: skip
    def arrive(self, requests, stops, session) -> None:
        for prompt, max_tokens, priority, deadline, salt in requests:
            self.submit(prompt, max_tokens, 0, 0, stops, priority, deadline, session, salt)

    @rule(
        prompt=PROMPTS | st.lists(st.integers(0, VOCABULARY - 1), min_size=0, max_size=42).map(tuple),
        max_tokens=st.integers(1, 24), min_tokens=st.integers(0, 6), resume=st.integers(0, 10),
        stops=st.frozensets(st.integers(0, VOCABULARY - 1), max_size=4), priority=st.integers(-1, 1),
        deadline=st.none() | st.integers(0, 30), session=st.integers(0, 3), salt=SALTS,
    )  # fmt: skip
    def submit(self, prompt, max_tokens, min_tokens, resume, stops, priority, deadline, session, salt) -> None:
        params = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=stops)
        journal = reference(prompt, params, self.rope)[0][:resume] if prompt else []
        key = SequenceKey(session, len(self.clients))
        deadline_s = None if deadline is None else self.now_s + deadline
        sequence = Sequence(
            key, prompt, params, list(journal), priority=priority, deadline_s=deadline_s, cache_salt=salt
        )
        self.clients[key] = Client(sequence, prompt, list(journal))
        refused = self.scheduler.submit(sequence, self.now_s)
        if refused is not None:
            assert refused.end in REFUSALS | {SequenceEnd.LENGTH, SequenceEnd.ABORTED_DEADLINE}
            assert not (refused.end is SequenceEnd.REJECTED_CAPACITY and journal)
            self.hear(refused)

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

    @rule(cancelled=st.lists(st.integers(0, 1000), max_size=2), prefill_tokens=st.none() | st.integers(0, 9))
    def schedule(self, cancelled, prefill_tokens) -> None:
        """One more plan, and cancels of sequences that it names."""
        if not self.scheduler.can_schedule:
            return
        plan = self.dispatch(prefill_tokens)
        for choice in cancelled if plan is not None else ():
            self.cancel_one(plan.entries[choice % len(plan.entries)].key)

    @rule(times=st.integers(1, 8), prefill_tokens=st.none() | st.integers(0, 9))
    def step(self, times, prefill_tokens) -> None:
        """As the loop does it: as many plans as may be, then the oldest result."""
        for _ in range(times):
            while self.scheduler.can_schedule:
                self.dispatch(prefill_tokens)
            self.collect()

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
        assert self.scheduler.can_schedule or self.in_flight or not open_clients, "nothing will ever happen"
        for _, blocks in self.in_flight:
            assert self.pool.num_held(blocks) == len(blocks), "a block is free that an outstanding plan names"
        salts: dict[int, bytes] = {}
        for client in open_clients:
            for block in client.sequence.block_ids:
                assert salts.setdefault(block, client.sequence.cache_salt) == client.sequence.cache_salt
        if not self.in_flight:
            assert all(not c.sequence.block_ids for c in self.clients.values() if c.ends)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        work = sum(2 * MAX_MODEL_LEN for c in self.clients.values() if not c.ends)
        steps = 0
        before = self.scheduler.preemptions
        while self.scheduler.has_work or self.in_flight:
            while self.scheduler.can_schedule:
                self.dispatch(None)
            self.collect()
            self.books_agree()
            steps += 1
            # Every step computes at least one token; a preemption repeats at most one sequence's.
            assert steps <= work + (self.scheduler.preemptions - before) * MAX_MODEL_LEN + self.depth
        assert self.scheduler.preemptions - before <= 4 * work
        assert self.pool.num_free == self.pool.num_blocks
        assert self.scheduler.prefix_hits <= self.scheduler.prefix_queries
        for client in self.clients.values():
            self.judge(client)

    def judge(self, client: Client) -> None:
        (end,) = client.ends
        if not client.prompt:
            assert end is SequenceEnd.REJECTED_INVALID
            return
        tokens, expected_end = reference(client.prompt, client.sequence.params, self.rope)
        if end in (SequenceEnd.STOP, SequenceEnd.LENGTH):
            assert (client.received, end) == (tokens, expected_end)
        else:
            assert client.received == tokens[: len(client.received)]
            if end in REFUSALS:
                assert len(client.received) == client.sequence.resumed_tokens
            if end is SequenceEnd.EVICTED_DEADLINE:
                assert not client.received

    # ---- the loop

    def dispatch(self, prefill_tokens: int | None) -> StepPlan | None:
        decoding = self.scheduler.num_decoding
        scheduled = self.scheduler.schedule(self.now_s, prefill_tokens)
        self.now_s += 0.25
        for progress in scheduled.ended:
            self.hear(progress)
        self.scheduler.check()
        plan = scheduled.plan
        if plan is None:
            assert self.in_flight or not self.scheduler.has_work
            assert not self.scheduler.can_schedule
            return None
        self.step_number += 1
        self.inspect(plan)
        prefill = sum(len(e.token_ids) for e in plan.entries if not e.is_decode)
        # Deadlines are looked at before decodes are counted.
        if prefill_tokens is not None and decoding and not scheduled.ended:
            assert prefill <= prefill_tokens or (prefill == 1 and not any(e.is_decode for e in plan.entries))
        self.in_flight.append((plan, self.named_blocks(plan)))
        return plan

    def inspect(self, plan: StepPlan) -> None:
        assert plan.step == self.step_number
        assert plan.num_tokens <= self.limits.max_num_batched_tokens
        keys = [e.key for e in plan.entries]
        assert len(set(keys)) == len(keys) <= self.limits.max_num_seqs
        decodes = [e.is_decode for e in plan.entries]
        assert decodes == sorted(decodes, reverse=True), "a decode comes behind a chunk"
        if self.depth == 1 and self.pool.num_free and sum(decodes) < self.limits.max_num_batched_tokens:
            assert {e.key for e in plan.entries} >= {
                c.sequence.key for c in self.clients.values() if c.sequence.slot >= 0 and c.sequence.generated_token_ids
                and c.sequence.num_tokens - c.sequence.num_computed == 1 and not c.ends
            }, "a decode is left out"  # fmt: skip
        for entry in plan.entries:
            client = self.clients[entry.key]
            assert not client.ends, "a dead sequence is computed"
            known = [*client.prompt, *client.received]
            assert list(entry.token_ids) == known[entry.start : entry.end]
            assert entry.sample == (entry.end == len(known))
        assert [s.slot for s in plan.starts] == [e.slot for e in plan.entries if e.first_block == 0]

    def named_blocks(self, plan: StepPlan) -> set[int]:
        named: set[int] = set()
        for entry in plan.entries:
            table = self.tables.setdefault(entry.slot, [])
            table[entry.first_block :] = entry.new_block_ids
            named.update(table)
        return named

    def collect(self) -> None:
        if not self.in_flight:
            return
        plan, _ = self.in_flight[0]
        expected = [e.key for e in plan.entries if e.sample and not self.clients[e.key].ends]
        progresses = self.scheduler.commit(self.ranks.run(plan))
        self.in_flight.popleft()
        self.scheduler.check()
        assert [p.key for p in progresses] == expected
        for progress in progresses:
            self.hear(progress)

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
    max_examples=100, stateful_step_count=30, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
