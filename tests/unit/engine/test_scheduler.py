from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.domain.endpoint import LoadSnapshot
from cluster.domain.request import SamplingParams, SequenceEnd, TokenLogprob
from cluster.engine.scheduler import Scheduled
from cluster.engine.sequence import Sequence
from cluster.engine.step import SampledToken, SequenceKey, StepResult
from tests.unit.engine.small_engine import STOP, TOKEN, Engine, refusal


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.scheduler.check()


# ---- coming in


@pytest.mark.parametrize(
    ("request_", "end", "words"),
    [
        ({"prompt": 0}, SequenceEnd.REJECTED_INVALID, "at least one token"),
        ({"prompt": 0, "resume": 3}, SequenceEnd.REJECTED_INVALID, "at least one token"),
        ({"prompt": 64}, SequenceEnd.REJECTED_INVALID, "shorten it to at most 63"),
        ({"prompt": 40, "resume": 25}, SequenceEnd.REJECTED_INVALID, "65 tokens"),
        ({"prompt": 14, "resume": 50}, SequenceEnd.LENGTH, ""),
        ({"max_tokens": 5, "resume": 5}, SequenceEnd.LENGTH, ""),
        ({"max_tokens": 5, "resume": 6}, SequenceEnd.LENGTH, ""),
        ({"deadline_s": 100.0}, SequenceEnd.EVICTED_DEADLINE, ""),
        ({"deadline_s": 99.0, "resume": 1}, SequenceEnd.ABORTED_DEADLINE, ""),
    ],
)
def test_what_is_refused_at_once(engine: Engine, request_: dict, end: SequenceEnd, words: str) -> None:
    got, detail = refusal(engine.submit(1, **request_))
    assert got is end
    assert words in detail
    assert not engine.scheduler.has_work
    assert engine.schedule() == Scheduled(None, ())


def test_a_prompt_may_leave_room_for_one_token(engine: Engine) -> None:
    assert engine.submit(1, prompt=63) is None


@pytest.mark.parametrize(("max_tokens", "fits"), [(14, True), (15, False), (10_000, False)])
def test_the_pool_must_hold_the_longest_course(max_tokens: int, fits: bool) -> None:
    """3 + 14 tokens: the last is never computed, so 4 blocks of 4 are enough."""
    engine = Engine(num_blocks=4)
    progress = engine.submit(1, prompt=3, max_tokens=max_tokens)
    if fits:
        assert progress is None
        while engine.scheduler.has_work:
            engine.step()
    else:
        end, detail = refusal(progress)
        assert end is SequenceEnd.REJECTED_INVALID
        assert "shorten them to 17" in detail


def test_the_models_length_bounds_the_longest_course() -> None:
    assert Engine(num_blocks=16).submit(1, prompt=3, max_tokens=10_000) is None


def test_the_waiting_queue_is_bounded(engine: Engine) -> None:
    for name in range(3):
        assert engine.submit(name) is None
    end, detail = refusal(engine.submit(3))
    assert end is SequenceEnd.REJECTED_CAPACITY
    assert "3 requests wait" in detail
    engine.step()
    assert engine.submit(3) is None


def test_a_resumed_sequence_is_exempt_from_the_bound_and_takes_nobodys_place() -> None:
    engine = Engine()
    engine.submit(0)
    engine.submit(1)
    assert engine.submit(2, resume=2) is None
    assert engine.submit(3) is None
    assert engine.submit(4, resume=2) is None
    assert refusal(engine.submit(5, max_tokens=2))[0] is SequenceEnd.REJECTED_CAPACITY


def test_the_waiting_tokens_are_bounded_but_a_single_prompt_may_be_long() -> None:
    engine = Engine(max_waiting_prompt_tokens=20)
    assert engine.submit(1, prompt=30) is None
    end, detail = refusal(engine.submit(2, prompt=1))
    assert end is SequenceEnd.REJECTED_CAPACITY
    assert "30 tokens wait already" in detail
    assert "max_waiting_prompt_tokens 20" in detail
    assert engine.submit(3, prompt=40, resume=1) is None
    engine.step()
    assert engine.submit(4, prompt=12) is None
    assert engine.submit(5, prompt=8) is None
    assert refusal(engine.submit(6, prompt=1))[0] is SequenceEnd.REJECTED_CAPACITY
    engine.scheduler.cancel(SequenceKey(1, 5))
    assert engine.submit(7, prompt=8) is None


def test_an_id_in_use_is_refused_and_does_no_harm(engine: Engine) -> None:
    engine.submit(1)
    assert refusal(engine.submit(1))[0] is SequenceEnd.REJECTED_INVALID
    assert engine.submit(1, session=2) is None
    assert engine.scheduler.load().waiting_sequences == 2


# ---- sharing out a step


def test_a_prompt_is_cut_to_the_budget(engine: Engine) -> None:
    engine.submit(1, prompt=40)
    plans = [engine.plan()]
    assert engine.commit(plans[0]) == ()
    plans.append(engine.plan())
    assert engine.commit(plans[1]) == ()
    plans.append(engine.plan())
    assert [p.token_ids for p in engine.commit(plans[2])] == [(TOKEN,)]
    entries = [p.entries[0] for p in plans]
    assert [(e.start, len(e.token_ids), e.first_block, len(e.new_block_ids), e.sample) for e in entries] == [
        (0, 16, 0, 10, False), (16, 16, 10, 0, False), (32, 8, 10, 0, True),
    ]  # fmt: skip
    assert [p.starts != () for p in plans] == [True, False, False]
    assert sum((e.token_ids for e in entries), ()) == tuple(range(10, 50))
    assert engine.step() == {1: (40, 1)}


def test_decodes_go_before_chunks_and_chunks_before_newcomers(engine: Engine) -> None:
    engine.submit(1, prompt=40, priority=1)
    engine.step()
    engine.submit(2)
    engine.step()
    assert engine.step() == {1: (32, 8), 2: (0, 3)}
    engine.submit(3, prompt=20, priority=9)
    engine.submit(4, prompt=5)
    plan = engine.plan()
    assert [(e.key.sequence_id, len(e.token_ids)) for e in plan.entries] == [(1, 1), (2, 1), (3, 14)]
    assert plan.kind == "mixed"
    engine.commit(plan)
    plan = engine.plan()
    assert [(e.key.sequence_id, e.start, len(e.token_ids)) for e in plan.entries] == [
        (1, 41, 1), (2, 4, 1), (3, 14, 6), (4, 0, 5),
    ]  # fmt: skip


def test_more_decodes_than_budget_go_by_rank() -> None:
    engine = Engine(max_num_batched_tokens=2)
    for name in range(3):
        engine.submit(name, prompt=1, max_tokens=3)
    assert [engine.names() for _ in range(6)] == [[0, 1], [0, 1], [0, 1], [2], [2], [2]]


def test_admission_follows_priority_then_arrival() -> None:
    engine = Engine(max_num_seqs=1, max_num_waiting=9)
    for name, priority in [(1, 0), (2, 5), (3, 0), (4, 5)]:
        engine.submit(name, max_tokens=1, priority=priority)
    assert [engine.names() for _ in range(4)] == [[2], [4], [1], [3]]


def test_max_num_seqs_bounds_the_batch() -> None:
    engine = Engine(max_num_seqs=2)
    for name in range(3):
        engine.submit(name)
    assert engine.names() == [0, 1]
    assert engine.names() == [0, 1]
    assert engine.scheduler.cancel(SequenceKey(1, 0))
    assert engine.names() == [1, 2]


def test_admission_leaves_a_block_for_each_running_sequence() -> None:
    engine = Engine(num_blocks=4)
    engine.submit(1, prompt=4, max_tokens=5)
    engine.submit(2, prompt=12, max_tokens=1)
    assert engine.names() == [1]
    assert engine.pool.num_free == 3
    assert engine.names() == [1]


def test_nobody_overtakes_the_first_that_does_not_fit() -> None:
    engine = Engine(num_blocks=6)
    engine.submit(1, prompt=15, max_tokens=2)
    engine.submit(2, prompt=12, max_tokens=2)
    engine.submit(3, prompt=1, max_tokens=2)
    assert [engine.names() for _ in range(3)] == [[1], [1], [2, 3]]


def test_there_is_one_plan_at_a_time(engine: Engine) -> None:
    engine.submit(1)
    assert engine.scheduler.can_schedule
    plan = engine.plan()
    assert not engine.scheduler.can_schedule
    with pytest.raises(AssertionError, match="commit the oldest outstanding plan"):
        engine.schedule()
    with pytest.raises(AssertionError, match="step 1 runs, 2 was committed"):
        engine.scheduler.commit(StepResult(plan.step + 1, ()))


@pytest.mark.parametrize("names", [[2], [1, 1]])
def test_a_result_must_answer_its_plan(names: list[int]) -> None:
    engine = Engine()
    engine.submit(1)
    tokens = tuple(SampledToken(SequenceKey(1, name), TOKEN) for name in names)
    with pytest.raises(AssertionError):
        engine.scheduler.commit(StepResult(engine.plan().step, tokens))


# ---- ends


def test_a_stop_token_ends_unreported_and_uncounted(engine: Engine) -> None:
    engine.submit(1)
    engine.step()
    (progress,) = engine.commit(engine.plan(), token=STOP)
    assert (progress.token_ids, progress.end) == ((), SequenceEnd.STOP)
    assert engine.pool.num_free == 32
    assert not engine.scheduler.has_work


def test_before_min_tokens_a_stop_token_is_a_token_like_others(engine: Engine) -> None:
    engine.submit(1, min_tokens=2)
    seen = [engine.commit(engine.plan(), token=STOP)[0] for _ in range(3)]
    assert [(p.token_ids, p.end) for p in seen] == [((STOP,), None), ((STOP,), None), ((), SequenceEnd.STOP)]


def test_max_tokens_ends_with_the_last_token(engine: Engine) -> None:
    engine.submit(1, max_tokens=2)
    seen = [engine.commit(engine.plan())[0] for _ in range(2)]
    assert [(p.token_ids, p.end) for p in seen] == [((TOKEN,), None), ((TOKEN,), SequenceEnd.LENGTH)]
    assert engine.pool.num_free == 32


def test_a_stop_at_the_last_token_is_a_stop(engine: Engine) -> None:
    engine.submit(1, max_tokens=1)
    assert engine.commit(engine.plan(), token=STOP)[0].end is SequenceEnd.STOP


def test_the_models_length_ends_too() -> None:
    engine = Engine(max_model_len=6)
    engine.submit(1, prompt=4)
    assert [engine.commit(engine.plan())[0].end for _ in range(2)] == [None, SequenceEnd.LENGTH]


def test_a_resume_continues_behind_its_tokens(engine: Engine) -> None:
    engine.submit(1, prompt=3, resume=2, max_tokens=4)
    plan = engine.plan()
    (entry,) = plan.entries
    assert (entry.token_ids, entry.start, entry.end, entry.sample) == ((10, 11, 12, TOKEN, TOKEN), 0, 5, True)
    ends = [engine.commit(plan)[0].end, engine.commit(engine.plan())[0].end]
    assert ends == [None, SequenceEnd.LENGTH]


def test_news_come_in_plan_order_with_attempt_and_logprob(engine: Engine) -> None:
    params = SamplingParams(max_tokens=5, logprobs=1)
    for name in (1, 2):
        engine.scheduler.submit(Sequence(SequenceKey(1, name), (1, 2), params, attempt=name), engine.now_s)
    plan = engine.plan()
    logprobs = [TokenLogprob(TOKEN, -0.1 * name) for name in (1, 2)]
    tokens = tuple(SampledToken(e.key, TOKEN, p) for e, p in zip(plan.entries, logprobs, strict=True))
    progresses = engine.scheduler.commit(StepResult(plan.step, tokens))
    assert [(p.key.sequence_id, p.attempt, p.logprobs) for p in progresses] == [
        (1, 1, (logprobs[0],)), (2, 2, (logprobs[1],)),
    ]  # fmt: skip


# ---- cancels and deadlines


def test_cancelling_a_waiting_or_idle_running_sequence_frees_at_once(engine: Engine) -> None:
    engine.submit(1)
    engine.step()
    engine.submit(2)
    assert engine.scheduler.cancel(SequenceKey(1, 1))
    assert engine.scheduler.cancel(SequenceKey(1, 2))
    assert engine.pool.num_free == 32
    assert not engine.scheduler.has_work
    assert not engine.scheduler.cancel(SequenceKey(1, 1))
    with pytest.raises(KeyError):
        engine.scheduler.sequence(SequenceKey(1, 1))


def test_blocks_of_a_running_plan_are_freed_when_it_commits(engine: Engine) -> None:
    engine.submit(1)
    engine.submit(2)
    plan = engine.plan()
    assert engine.scheduler.cancel(SequenceKey(1, 1))
    engine.scheduler.check()
    assert engine.pool.num_free == 30
    assert engine.scheduler.load().running_sequences == 1
    assert [p.key.sequence_id for p in engine.commit(plan)] == [2]
    assert engine.pool.num_free == 31


def test_an_id_cancelled_in_the_plan_does_not_answer_for_its_successor(engine: Engine) -> None:
    engine.submit(1)
    plan = engine.plan()
    engine.scheduler.cancel(SequenceKey(1, 1))
    engine.submit(1, prompt=5)
    assert engine.commit(plan) == ()
    assert engine.step() == {1: (0, 5)}


def test_a_lost_session_takes_its_sequences_along(engine: Engine) -> None:
    engine.submit(1, session=1)
    engine.submit(1, session=2)
    engine.step()
    engine.submit(2, session=1)
    assert engine.scheduler.cancel_session(1) == 2
    assert engine.scheduler.cancel_session(1) == 0
    assert engine.scheduler.load().running_sequences == 1


def test_deadlines_evict_the_unstarted_and_abort_the_started() -> None:
    engine = Engine(max_num_seqs=1)
    engine.submit(1, deadline_s=110.0)
    engine.submit(2, deadline_s=105.0)
    engine.submit(3, deadline_s=110.0, resume=1)
    engine.submit(4)
    engine.step()
    engine.now_s = 104.9
    assert engine.schedule().ended == ()
    engine.scheduler.commit(StepResult(2, (SampledToken(SequenceKey(1, 1), TOKEN),)))
    engine.now_s = 110.0
    scheduled = engine.schedule()
    assert {p.key.sequence_id: p.end for p in scheduled.ended} == {
        1: SequenceEnd.ABORTED_DEADLINE, 2: SequenceEnd.EVICTED_DEADLINE, 3: SequenceEnd.ABORTED_DEADLINE,
    }  # fmt: skip
    assert scheduled.plan is not None
    assert [e.key.sequence_id for e in scheduled.plan.entries] == [4]


def test_a_deadline_has_passed_when_it_is_reached(engine: Engine) -> None:
    engine.submit(1, deadline_s=105.0)
    engine.now_s = 105.0
    assert [p.end for p in engine.schedule().ended] == [SequenceEnd.EVICTED_DEADLINE]


def test_what_is_too_late_is_told_what_it_waited_for() -> None:
    engine = Engine(max_num_seqs=1)
    engine.submit(1, deadline_s=110.0)
    engine.submit(2, deadline_s=110.0)
    engine.submit(3)
    engine.step()
    engine.now_s = 110.0
    details = {p.key.sequence_id: p.detail for p in engine.schedule().ended}
    assert "after 1 tokens" in details[1]
    assert "2 requests waited" in details[2]
    assert "add a replica" in details[2]


# ---- preemption


def two_that_fill_the_pool(**limits: int) -> Engine:
    """Sequence 1 and 2 hold three blocks of four tokens each, all full, and none is free."""
    engine = Engine(num_blocks=6, **limits)
    engine.submit(1, prompt=7, max_tokens=10)
    engine.submit(2, prompt=7, max_tokens=10)
    for _ in range(6):
        engine.step()
    assert engine.pool.num_free == 0
    return engine


def test_the_last_in_rank_makes_room_and_is_computed_anew() -> None:
    engine = two_that_fill_the_pool()
    assert engine.names() == [1]
    assert engine.scheduler.preemptions == 1
    assert engine.scheduler.load() == LoadSnapshot(1, 1, 13, 4, 6)
    steps = [engine.step() for _ in range(4)]
    assert steps[:3] == [{1: (13, 1)}, {1: (14, 1)}, {1: (15, 1)}]
    assert steps[3] == {2: (0, 13)}


def test_priority_protects_the_later_arrival() -> None:
    engine = Engine(num_blocks=6)
    engine.submit(1, prompt=7, max_tokens=10)
    engine.submit(2, prompt=7, max_tokens=10, priority=1)
    for _ in range(6):
        engine.step()
    assert engine.names() == [2]


def test_a_preempted_sequence_waits_in_front_of_later_ones_and_beside_the_bound() -> None:
    engine = two_that_fill_the_pool(max_num_waiting=2)
    assert engine.submit(3, max_tokens=2) is None
    assert engine.submit(4, max_tokens=2) is None
    assert engine.names() == [1]
    assert engine.scheduler.load().waiting_sequences == 3
    assert refusal(engine.submit(5, max_tokens=2))[0] is SequenceEnd.REJECTED_CAPACITY
    while (names := engine.names()) == [1]:
        pass
    assert names == [2, 3]


def test_with_nobody_behind_it_a_decode_pauses() -> None:
    """Sequence 2 needs a fourth block a step before sequence 1 does."""
    engine = Engine(num_blocks=6)
    engine.submit(1, prompt=6, max_tokens=10)
    engine.submit(2, prompt=7, max_tokens=10)
    for _ in range(6):
        engine.step()
    assert engine.pool.num_free == 0
    assert (engine.step(), engine.scheduler.preemptions) == ({1: (11, 1)}, 0)
    assert (engine.step(), engine.scheduler.preemptions) == ({1: (12, 1)}, 1)


def test_beyond_the_cap_a_sequence_is_spared_while_there_is_another_victim() -> None:
    engine = Engine(num_blocks=9, max_preemptions=1)
    for name in (1, 2, 3):
        engine.submit(name, prompt=7, max_tokens=10)
    for _ in range(6):
        engine.step()
    assert engine.pool.num_free == 0
    engine.scheduler.sequence(SequenceKey(1, 3)).preemptions = 1
    assert engine.names() == [1, 3]
    assert engine.scheduler.sequence(SequenceKey(1, 2)).preemptions == 1


def test_of_several_victims_the_last_in_rank_is_taken() -> None:
    engine = Engine(num_blocks=9)
    for name in (1, 2, 3):
        engine.submit(name, prompt=7, max_tokens=10)
    for _ in range(6):
        engine.step()
    assert engine.names() == [1, 2]


def test_the_first_takes_from_a_capped_one_when_nothing_else_is_left() -> None:
    engine = two_that_fill_the_pool(max_preemptions=0)
    assert engine.names() == [1]
    assert engine.scheduler.preemptions == 1


def test_load_counts_what_is_left_to_compute(engine: Engine) -> None:
    engine.submit(1, prompt=40)
    engine.submit(2, prompt=5)
    assert engine.scheduler.load() == LoadSnapshot(0, 2, 45, 0, 32)
    engine.step()
    assert engine.scheduler.load() == LoadSnapshot(1, 1, 29, 10, 32)
    engine.step()
    engine.step()
    assert engine.scheduler.load() == LoadSnapshot(2, 0, 0, 12, 32)


def test_a_token_outside_the_vocabulary_is_refused_by_name() -> None:
    engine = Engine(vocab_size=12)
    refused = engine.submit(1, prompt=3)  # ids 10, 11, 12
    assert refused is not None
    assert refused.end is SequenceEnd.REJECTED_INVALID
    assert "Token 12 is outside the vocabulary of 12" in refused.detail
    assert engine.submit(2, prompt=2) is None
