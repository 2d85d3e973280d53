"""The leader's loop with a model of plain Python, and what its sessions make of the news."""

import asyncio
import hashlib
import threading
from collections import deque

import pytest
from prometheus_client import CollectorRegistry

from cluster.domain.block_hash import block_hashes
from cluster.domain.clock import ManualClock
from cluster.domain.endpoint import LoadSnapshot
from cluster.domain.request import SamplingParams, SequenceEnd
from cluster.engine import sessions as sessions_module
from cluster.engine.block_events import RecentBlocks
from cluster.engine.block_pool import BlockPool
from cluster.engine.load_news import BURST
from cluster.engine.loop import MAX_INBOX, Cancel, CancelSession, EngineLoop, Published, Submit, refused_for_capacity
from cluster.engine.prefill_pace import PrefillPace, PromptWork
from cluster.engine.progress import RankProgress
from cluster.engine.scheduler import Scheduler, SchedulerLimits
from cluster.engine.sequence import Sequence
from cluster.engine.sessions import Outbox, Sessions
from cluster.engine.step import SampledToken, SequenceKey, SequenceProgress, StepResult
from cluster.engine.step_series import StepSeries
from cluster.telemetry.metrics import EngineMetrics
from cluster.v1 import engine_pb2


def next_token(tokens) -> int:
    return hashlib.sha256(repr(list(tokens)).encode()).digest()[0]


class PlainRunner:
    """Keeps each slot's history, as a sampling rank does. ``log`` tells the order of things."""

    def __init__(self, depth, log):
        self.depth, self.log = depth, log
        self.histories, self.plans = {}, deque()

    def dispatch(self, plan):
        self.log.append(("dispatch", plan.step))
        self.plans.append(plan)
        assert len(self.plans) <= self.depth

    def collect(self):
        plan = self.plans.popleft()
        self.log.append(("collect", plan.step))
        for start in plan.starts:
            self.histories[start.slot] = [*start.prompt_token_ids, *start.generated_token_ids]
        tokens = []
        for entry in plan.entries:
            if entry.sample:
                history = self.histories[entry.slot]
                history.append(next_token(history))
                tokens.append(SampledToken(entry.key, history[-1]))
        return StepResult(plan.step, tuple(tokens))


class Engine:
    def __init__(self, depth=1):
        self.clock, self.registry, self.published, self.log = ManualClock(), CollectorRegistry(), [], []
        self.progress = RankProgress(self.clock)
        blocks = RecentBlocks()
        self.pool = BlockPool(64, 4, blocks)
        self.scheduler = Scheduler(SchedulerLimits(8, 32, 16, 128), self.pool, depth=depth)
        series = StepSeries(EngineMetrics(self.registry), self.scheduler, self.progress)
        runner, pace = PlainRunner(depth, self.log), PrefillPace(1.7, 32)
        self.loop = EngineLoop(self.scheduler, runner, self.progress, series, self.publish, self.clock, pace, blocks)

    def publish(self, published):
        self.log.append(("publish", published.step))
        self.published.append(published)

    def news(self, key):
        return [p for published in self.published for p in published.progresses if p.key == key]

    def finish(self):
        for _ in range(500):
            if not (self.scheduler.has_work or self.loop._news):
                return
            self.loop.turn([])
            self.scheduler.check()
        raise AssertionError("the work does not end")


@pytest.fixture
def engine():
    built = Engine()
    yield built
    built.scheduler.check()


def sequence(number, prompt=(1, 2, 3), max_tokens=5, session=1, **kwargs):
    return Sequence(SequenceKey(session, number), prompt, SamplingParams(max_tokens=max_tokens), **kwargs)


def test_a_sequence_runs_to_its_length_and_is_counted(engine):
    engine.loop.turn([Submit(sequence(1))])
    for _ in range(5):
        engine.loop.turn([])
    news = engine.news(SequenceKey(1, 1))
    tokens = [t for p in news for t in p.token_ids]
    expected = []
    for _ in range(5):
        expected.append(next_token([1, 2, 3, *expected]))
    assert tokens == expected
    assert [p.end for p in news] == [None] * 4 + [SequenceEnd.LENGTH]
    sample = engine.registry.get_sample_value
    assert sample("cluster_engine_generation_tokens_total") == 5
    assert sample("cluster_engine_prompt_tokens_total") == 3
    assert sample("cluster_engine_step_seconds_count", {"kind": "decode"}) == 4
    assert sample("cluster_engine_kv_cache_usage_ratio") == 0
    assert sample("cluster_engine_prefix_cache_queries_total") == 3
    assert sample("cluster_engine_prefix_cache_hits_total") == 0
    assert engine.progress.step == 5
    assert engine.progress.step_age_s() == 0


def test_blocks_are_published_with_the_step_that_filled_them_even_without_a_token(engine):
    prompt = tuple(range(40))  # more than a step takes
    engine.loop.turn([Submit(sequence(1, prompt=prompt, max_tokens=5))])
    engine.loop.turn([Cancel(SequenceKey(1, 1))])
    told = [p for p in engine.published if p.blocks]
    assert [p.progresses for p in told] == [()], "a chunk without a token brought them"
    assert told[0].blocks == dict.fromkeys(block_hashes(prompt[:32], 4), True)
    engine.loop.turn([Submit(sequence(2, max_tokens=3))])
    engine.finish()
    assert not engine.published[-1].blocks


def test_a_cancel_frees_its_blocks_within_the_step(engine):
    engine.loop.turn([Submit(sequence(1, max_tokens=50)), Submit(sequence(2, max_tokens=50))])
    assert engine.pool.num_used == 2
    engine.loop.turn([Cancel(SequenceKey(1, 1))])
    assert engine.pool.num_used == 1
    engine.loop.turn([CancelSession(1)])
    assert engine.pool.num_used == 0
    assert not engine.scheduler.has_work


def test_the_next_plan_is_on_its_way_before_news_are_published(engine):
    engine.loop.turn([Submit(sequence(1, max_tokens=3))])
    engine.finish()
    steps = [("dispatch", 1), ("collect", 1), ("dispatch", 2), ("publish", 1), ("collect", 2), ("dispatch", 3)]
    assert engine.log == [*steps, ("publish", 2), ("collect", 3), ("publish", 3)]


def test_stages_overlap_and_tokens_stay_the_same():
    engine, prompts = Engine(depth=2), {n: tuple(range(n, n + 3 * n)) for n in range(1, 7)}
    engine.loop.turn([Submit(sequence(n, prompt, max_tokens=9)) for n, prompt in prompts.items()])
    engine.finish()
    for n, prompt in prompts.items():
        expected = list(prompt)
        for _ in range(9):
            expected.append(next_token(expected))
        assert [t for p in engine.news(SequenceKey(1, n)) for t in p.token_ids] == expected[len(prompt) :]
    outstanding = dispatched = 0
    for what, _ in engine.log:
        dispatched += {"dispatch": 1, "collect": -1, "publish": 0}[what]
        outstanding = max(outstanding, dispatched)
    assert outstanding == 2
    assert engine.progress.step_age_s() == 0


def test_the_age_of_a_step_is_that_of_the_oldest_that_is_outstanding():
    engine = Engine(depth=2)
    engine.loop.turn([Submit(sequence(n)) for n in (1, 2)])
    engine.clock.advance(3)
    engine.loop.turn([])
    engine.clock.advance(1)
    assert engine.progress.step_age_s() == 1
    engine.finish()


def test_deadlines_are_noticed_before_and_after_the_start(engine):
    engine.loop.turn([Submit(sequence(1, deadline_s=-1.0)), Submit(sequence(2, max_tokens=50, deadline_s=5.0))])
    engine.clock.advance(6)
    engine.loop.turn([])
    assert engine.news(SequenceKey(1, 1))[-1].end is SequenceEnd.EVICTED_DEADLINE
    assert engine.news(SequenceKey(1, 2))[-1].end is SequenceEnd.ABORTED_DEADLINE


def test_the_inbox_is_bounded_for_submits_only(engine):
    for number in range(MAX_INBOX):
        assert engine.loop.post(Submit(sequence(number)))
    assert not engine.loop.post(Submit(sequence(MAX_INBOX)))
    assert engine.loop.post(Cancel(SequenceKey(1, 0)))
    assert refused_for_capacity(SequenceKey(1, 9), 3).end is SequenceEnd.REJECTED_CAPACITY


def test_stop_ends_an_idle_loop(engine):
    engine.loop.stop()
    engine.loop.run()


LOAD = LoadSnapshot(running_sequences=1)


def progress(number, *tokens, session=1, attempt=1, end=None):
    return SequenceProgress(SequenceKey(session, number), attempt, tokens, (), end)


def taken(outbox):
    """A copy: the outbox goes on with what it gave."""
    message = outbox.take()
    return None if message is None else engine_pb2.SessionResponse.FromString(message.SerializeToString()).step


async def test_news_that_nobody_took_is_merged_by_sequence():
    sessions = Sessions()
    first, outbox = sessions.open()
    second, other = sessions.open()
    last = SequenceProgress(SequenceKey(1, 8), 1, (), (), SequenceEnd.REJECTED_INVALID, "no")
    sessions.deliver(Published(1, (progress(7, 10), progress(8, 20), progress(7, 30, session=second)), LOAD))
    sessions.deliver(Published(2, (progress(7, 11), last), LOAD))
    message = taken(outbox)
    assert message.step == 2
    assert message.load.running_sequences == 1
    assert {u.sequence_id: list(u.token_ids) for u in message.sequences} == {7: [10, 11], 8: [20]}
    ends = [(u.end, u.detail) for u in message.sequences]
    assert ends == [(engine_pb2.SEQUENCE_END_UNSPECIFIED, ""), (engine_pb2.SEQUENCE_END_REJECTED_INVALID, "no")]
    assert [list(u.token_ids) for u in taken(other).sequences] == [[30]]
    sessions.close(first)
    sessions.deliver(Published(3, (progress(7, 12),), LOAD))
    assert taken(outbox) is None


def cached(number, count, *tokens):
    return SequenceProgress(SequenceKey(1, number), 1, tokens, cached_prompt_tokens=count)


def told(step):
    return [(u.sequence_id, u.attempt, list(u.token_ids), u.cached_prompt_tokens, u.end) for u in step.sequences]


async def test_messages_that_resemble_the_last_one_are_as_if_made_anew():
    """Steps of decodes, and everything that may come between: news that others have, more of them, fewer, none."""
    ended = SequenceEnd.STOP
    steps = [
        [progress(1, 10), progress(2, 20)],
        [progress(1, 11), progress(2, 21)],
        [progress(2, 22), progress(1, 12)],
        [progress(2, 23), progress(1, 13), progress(3, 30)],
        [progress(2, 24), progress(1, 14), progress(3, 31, 32)],
        [progress(2, 25), progress(1, 15), progress(3, 33)],
        [progress(2, 26), progress(1, 16), progress(3, 34)],
        [progress(2, 27, end=ended), progress(1, 17), progress(3, 35)],
        [progress(1, 18), progress(3, 36)],
        [progress(1, 19), progress(3, 37)],
        [progress(1, 0, attempt=2), progress(3, 0)],
        [progress(1, 1, attempt=2), progress(1, 2, attempt=2)],
        [progress(1, 3, attempt=2), progress(1, 4, attempt=2)],
        [cached(1, 7, 5), progress(3, 6)],
        [cached(1, 7, 6), progress(3, 7)],
        [cached(1, 8, 7), progress(3, 8)],
        [progress(1, end=ended), progress(3)],
        [progress(1), progress(3)],
        [progress(1, 5)],
        [progress(1, 6)],
    ]
    outbox = Outbox()
    for number, news in enumerate(steps):
        outbox.put(number, news, LoadSnapshot(running_sequences=number))
        anew = Outbox()
        anew.put(number, news, LoadSnapshot(running_sequences=number))
        message = taken(outbox)
        assert message == taken(anew), news
        assert told(message), "there is something to compare"
    assert told(message) == [(1, 1, [6], 0, engine_pb2.SEQUENCE_END_UNSPECIFIED)]


async def test_a_beat_is_asked_for_beside_the_news():
    outbox, told = Outbox(), []
    outbox.on_news = lambda: told.append((taken(outbox), outbox.take_beat()))
    outbox.ask_for_beat()
    outbox.put(1, [progress(7, 10)], LOAD)
    assert [(step and step.step, beat_due) for step, beat_due in told] == [(None, True), (1, False)]


async def test_sessions_hear_of_loads_that_others_change(monkeypatch):
    monkeypatch.setattr(sessions_module, "TELL_LOADS_S", 0.0)
    sessions = Sessions()
    mine, _ = sessions.open(load_pause_s=0.001)
    busy = LoadSnapshot(running_sequences=1, queued_prompt_tokens=9)
    sessions.deliver(Published(1, (progress(1, 5),), busy))
    _, other = sessions.open(load_pause_s=0.001)
    _, deaf = sessions.open()
    sessions.deliver(Published(2, (progress(1, 6),), busy))
    assert taken(other) is None, "nothing has changed"
    sessions.deliver(Published(3, (progress(1, 7),), LoadSnapshot(running_sequences=1, kv_blocks_used=5)))
    message = taken(other)
    assert (message.step, message.load.kv_blocks_used, len(message.sequences)) == (3, 5, 0)
    assert taken(deaf) is taken(other) is None
    heard = asyncio.Event()
    other.on_news = lambda: taken(other).load.queued_prompt_tokens == 98 and heard.set()
    for tokens in range(2, 99):  # more changes than it wants to hear of
        sessions.load_changed(4, LoadSnapshot(queued_prompt_tokens=tokens), but=(mine,))
    await asyncio.wait_for(heard.wait(), 5)


async def test_the_only_session_hears_nothing_but_its_own():
    sessions = Sessions()
    _, outbox = sessions.open(load_pause_s=0.001)
    sessions.load_changed(1, LoadSnapshot(running_sequences=1), but=())
    assert taken(outbox) is None


async def test_a_message_with_tokens_brings_the_load_to_who_is_late():
    outbox = Outbox(load_pause_s=1.0)
    assert all(outbox.load_changed(1, LOAD, now_s=0.0) for _ in range(BURST))
    assert not outbox.load_changed(1, LOAD, now_s=0.0)
    assert outbox.load_is_late
    outbox.put(2, [progress(1, 5)], LOAD)
    assert not outbox.load_is_late
    assert outbox.load_changed(3, LOAD, now_s=1.0), "a pause later there is room for one more"


def test_what_comes_while_a_step_runs_counts_as_waiting(engine):
    loop = engine.loop
    assert loop.post(Submit(sequence(1, prompt=(1, 2, 3))))
    assert loop.post(Cancel(SequenceKey(1, 9)))
    assert (loop.load.waiting_sequences, loop.load.queued_prompt_tokens) == (1, 3)
    commands = loop._receive()
    assert loop.load.waiting_sequences == 1, "taken, and not told by the scheduler yet"
    assert loop.post(Submit(sequence(2, prompt=(1, 2, 3, 4))))
    loop.turn(commands)
    assert (loop.load.running_sequences, loop.load.waiting_sequences) == (1, 1)
    assert loop.load.queued_prompt_tokens == engine.progress.load.queued_prompt_tokens + 4
    loop.turn(loop._receive())
    assert loop.load == engine.progress.load
    engine.finish()


class Watched:
    """A progress whose load, when it is read and when it has been written, lets another thread go first if it can."""

    def __init__(self, progress):
        self.inner, self.meanwhile, self.threads = progress, None, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    @property
    def load(self):
        load = self.inner.load
        self.let_go()
        return load

    @load.setter
    def load(self, load):
        self.inner.load = load
        self.let_go()

    def let_go(self):
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            self.threads.append(threading.Thread(target=meanwhile))
            self.threads[-1].start()
            self.threads[-1].join(0.1)  # whoever waits for this thread goes on behind it


@pytest.mark.parametrize("first", ["reader", "writer"])
def test_an_arrival_is_counted_once_whoever_is_between(engine, first):
    loop, seen = engine.loop, []
    loop.post(Submit(sequence(1)))
    commands = loop._receive()
    watched = loop._progress = Watched(engine.progress)
    if first == "reader":
        watched.meanwhile = lambda: loop.turn(commands)
        seen.append(loop.load)
    else:
        watched.meanwhile = lambda: seen.append(loop.load)
        loop.turn(commands)
    for thread in watched.threads:
        thread.join(10)
    assert [load.running_sequences + load.waiting_sequences for load in (*seen, loop.load)] == [1, 1]
    engine.finish()


async def test_tokens_that_wait_keep_the_number_of_their_step():
    """News of a later step's load go with them: with its number the engine would seem quicker than it is."""
    outbox = Outbox(load_pause_s=1.0)
    outbox.put(10, [progress(1, 5)], LOAD)
    outbox.load_changed(11, LoadSnapshot(running_sequences=2), now_s=0.0)
    outbox.refuse(11, [progress(2, end=SequenceEnd.REJECTED_CAPACITY)], LoadSnapshot(running_sequences=2))
    message = taken(outbox)
    assert (message.step, message.load.running_sequences, len(message.sequences)) == (10, 2, 2)
    outbox.load_changed(12, LOAD, now_s=0.0)
    assert taken(outbox).step == 12
    outbox.refuse(13, [progress(3, end=SequenceEnd.REJECTED_CAPACITY)], LOAD)
    assert taken(outbox).step == 13


async def test_a_session_that_never_reads_overflows(monkeypatch):
    monkeypatch.setattr(sessions_module, "MAX_PENDING_BYTES", 100)
    outbox = Outbox()
    outbox.put(1, [progress(1, 1, 2, 3)], LOAD)
    assert not outbox.overflow.is_set()
    outbox.put(2, [progress(number, end=SequenceEnd.REJECTED_CAPACITY) for number in range(4)], LOAD)
    assert outbox.overflow.is_set()
    outbox.take()
    outbox.put(3, [progress(1, 5)], LOAD)
    assert outbox.overflow.is_set(), "who was too slow once is reset"


def test_the_pace_learns_where_prompts_go_on_and_what_each_step_asked_for():
    engine, learned = Engine(), []

    class Recorded(PrefillPace):
        def budget(self, num_decodes, num_without_token=1, start=0, *, anew=False):
            learned.append(("budget", num_decodes, start, anew))
            return 8

        def observe(self, num_decodes, prompts, seconds):
            learned.append(("observe", num_decodes, prompts))

    engine.loop._pace = Recorded(1.7, 32)
    engine.loop.turn([Submit(sequence(1, max_tokens=20))])
    engine.loop.turn([Submit(sequence(2, prompt=tuple(range(12)), max_tokens=1))])
    engine.loop.turn([])
    engine.loop.turn([Submit(sequence(3, prompt=tuple(range(20, 32)), generated_token_ids=[1]))])
    engine.loop.turn([])
    assert learned == [
        ("budget", 0, 0, False), ("observe", 0, PromptWork(3, 3, 4.5)),
        ("budget", 1, 0, False), ("observe", 1, PromptWork(8, 8, 32.0)),
        ("budget", 1, 8, False), ("observe", 1, PromptWork(4, 12, 40.0)),
        ("budget", 1, 0, False), ("observe", 1, PromptWork(8, 8, 32.0)),
        ("budget", 1, 8, True), ("observe", 1, PromptWork(5, 13, 52.5)),
    ]  # fmt: skip
