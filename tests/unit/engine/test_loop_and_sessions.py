"""The leader's loop with a model of plain Python, and what its sessions make of the news."""

import asyncio
import hashlib

import pytest
from prometheus_client import CollectorRegistry

from cluster.domain.clock import ManualClock
from cluster.domain.endpoint import LoadSnapshot
from cluster.domain.request import SamplingParams, SequenceEnd
from cluster.engine import sessions as sessions_module
from cluster.engine.block_pool import BlockPool
from cluster.engine.loop import MAX_INBOX, Cancel, CancelSession, EngineLoop, Published, Submit, refused_for_capacity
from cluster.engine.progress import RankProgress
from cluster.engine.scheduler import Scheduler, SchedulerLimits
from cluster.engine.sequence import Sequence
from cluster.engine.sessions import Outbox, Sessions
from cluster.engine.step import SampledToken, SequenceKey, SequenceProgress, StepResult
from cluster.telemetry.metrics import EngineMetrics
from cluster.v1 import engine_pb2


def next_token(tokens) -> int:
    return hashlib.sha256(repr(list(tokens)).encode()).digest()[0]


class PlainRunner:
    def run(self, plan, histories):
        sampled = [entry.key for entry in plan.entries if entry.sample]
        tokens = [next_token([*h.prompt_token_ids, *h.generated_token_ids]) for h in histories]
        return StepResult(plan.step, tuple(SampledToken(k, t) for k, t in zip(sampled, tokens, strict=True)))


@pytest.fixture
def engine():
    class Engine:
        def __init__(self):
            self.clock, self.registry, self.published = ManualClock(), CollectorRegistry(), []
            self.progress = RankProgress(self.clock)
            self.pool = BlockPool(64, 4)
            self.scheduler = Scheduler(SchedulerLimits(8, 32, 16, 128), self.pool)
            self.loop = EngineLoop(
                self.scheduler, PlainRunner(), self.progress, EngineMetrics(self.registry), self.published.append, self.clock
            )  # fmt: skip

        def news(self, key):
            return [p for published in self.published for p in published.progresses if p.key == key]

    built = Engine()
    yield built
    built.scheduler.check()


def sequence(number, prompt=(1, 2, 3), max_tokens=5, session=1, **kwargs):
    return Sequence(SequenceKey(session, number), prompt, SamplingParams(max_tokens=max_tokens), **kwargs)


def test_a_sequence_runs_to_its_length_and_is_counted(engine):
    engine.loop.turn([Submit(sequence(1))])
    for _ in range(4):
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
    assert engine.progress.step == 5
    assert engine.progress.step_age_s() == 0


def test_a_cancel_frees_its_blocks_within_the_step(engine):
    engine.loop.turn([Submit(sequence(1, max_tokens=50)), Submit(sequence(2, max_tokens=50))])
    assert engine.pool.num_used == 2
    engine.loop.turn([Cancel(SequenceKey(1, 1))])
    assert engine.pool.num_used == 1
    engine.loop.turn([CancelSession(1)])
    assert engine.pool.num_used == 0
    assert not engine.scheduler.has_work


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


async def test_news_that_nobody_took_is_merged_by_sequence():
    sessions = Sessions()
    first, outbox = sessions.open()
    second, other = sessions.open()
    sessions.deliver(Published(1, (progress(7, 10), progress(8, 20), progress(7, 30, session=second)), LOAD))
    sessions.deliver(Published(2, (progress(7, 11), progress(8, end=SequenceEnd.STOP)), LOAD))
    message = await asyncio.wait_for(outbox.take(), 1)
    assert message.step == 2
    assert {u.sequence_id: list(u.token_ids) for u in message.sequences} == {7: [10, 11], 8: [20]}
    assert [u.end for u in message.sequences] == [engine_pb2.SEQUENCE_END_UNSPECIFIED, engine_pb2.SEQUENCE_END_STOP]
    assert [list(u.token_ids) for u in (await asyncio.wait_for(other.take(), 1)).sequences] == [[30]]
    sessions.close(first)
    sessions.deliver(Published(3, (progress(7, 12),), LOAD))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(outbox.take(), 0.01)


async def test_a_session_that_never_reads_overflows(monkeypatch):
    monkeypatch.setattr(sessions_module, "MAX_PENDING_BYTES", 100)
    outbox = Outbox()
    outbox.put(1, [progress(1, 1, 2, 3)], engine_pb2.Load())
    assert not outbox.overflow.is_set()
    outbox.put(2, [progress(number, end=SequenceEnd.REJECTED_CAPACITY) for number in range(4)], engine_pb2.Load())
    assert outbox.overflow.is_set()
    await asyncio.wait_for(outbox.take(), 1)
    outbox.put(3, [progress(1, 5)], engine_pb2.Load())
    assert outbox.overflow.is_set(), "who was too slow once is reset"
