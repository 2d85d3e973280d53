"""Several plans outstanding, as the stages of a pipeline need them, and prompts beside decodes."""

from __future__ import annotations

import pytest

from cluster.domain.request import SequenceEnd
from cluster.engine.step import SequenceKey, StepPlan, StepResult
from tests.unit.engine.small_engine import STOP, Engine, names


def shares(plan: StepPlan) -> dict[int, tuple[int, int]]:
    return {e.key.sequence_id: (e.start, len(e.token_ids)) for e in plan.entries}


def decoding(count: int, **rest: int) -> Engine:
    """``count`` sequences whose prompts are computed, and no plan."""
    engine = Engine(max_num_seqs=max(4, count + 2), max_num_waiting=count + 2, **rest)
    for name in range(count):
        engine.submit(name)
    while engine.scheduler.num_decoding < count:
        engine.step()
    return engine


# ---- outstanding plans


def test_chunks_of_a_prompt_follow_each_other_without_a_commit() -> None:
    engine = Engine(depth=3)
    engine.submit(1, prompt=40)
    plans = engine.fill()
    assert [shares(plan) for plan in plans] == [{1: (0, 16)}, {1: (16, 16)}, {1: (32, 8)}]
    assert [plan.entries[0].sample for plan in plans] == [False, False, True]
    assert [len(plan.starts) for plan in plans] == [1, 0, 0]
    assert [engine.commit(plan) != () for plan in plans] == [False, False, True]


def test_who_samples_is_planned_again_after_the_commit() -> None:
    engine = Engine(depth=2)
    engine.submit(1)
    (plan,) = engine.fill()
    assert not engine.scheduler.can_schedule
    assert engine.scheduler.num_outstanding == 1
    engine.commit(plan)
    assert [shares(plan) for plan in engine.fill()] == [{1: (3, 1)}]


def test_nothing_to_plan_is_no_reason_to_ask_again_until_something_happens() -> None:
    engine = Engine(depth=3)
    engine.submit(1)
    engine.plan()
    assert engine.scheduler.can_schedule
    assert engine.schedule().plan is None
    assert not engine.scheduler.can_schedule
    engine.submit(2)
    assert engine.scheduler.can_schedule
    assert names(engine.plan()) == [2]
    assert engine.schedule().plan is None
    assert not engine.scheduler.can_schedule
    engine.scheduler.cancel(SequenceKey(1, 2))
    assert engine.scheduler.can_schedule


def test_no_more_plans_than_depth_and_results_in_their_order() -> None:
    engine = Engine(depth=2)
    engine.submit(1, prompt=60)
    plans = engine.fill()
    assert len(plans) == 2
    with pytest.raises(AssertionError, match="commit the oldest outstanding plan"):
        engine.schedule()
    with pytest.raises(AssertionError, match="step 1 runs, 2 was committed"):
        engine.scheduler.commit(StepResult(2, ()))
    engine.commit(plans[0])
    engine.commit(plans[1])


# ---- parts of the decodes


def test_one_plan_holds_all_decodes_where_there_is_one_stage() -> None:
    engine = decoding(6)
    assert [len(plan.entries) for plan in engine.fill()] == [6]


@pytest.mark.parametrize(("depth", "sizes"), [(2, [3, 3]), (3, [2, 2, 2]), (4, [2, 2, 2])])
def test_decodes_are_shared_out_between_plans_and_stay_so(depth: int, sizes: list[int]) -> None:
    engine = decoding(6, depth=depth)
    plans = engine.fill()
    assert [len(plan.entries) for plan in plans] == sizes
    for _ in range(12):
        done = plans.pop(0)
        engine.commit(done)
        plans += engine.fill()
        assert names(plans[-1]) == names(done)
        assert [len(plan.entries) for plan in plans] == sizes


def test_a_lump_of_decodes_is_divided_at_its_next_step() -> None:
    """Prompts that were computed in one plan would otherwise stay in one plan for ever."""
    engine = Engine(depth=2, max_num_seqs=6, max_num_waiting=6)
    for name in range(5):
        engine.submit(name)
    plans = engine.fill()
    assert [names(plan) for plan in plans] == [[0, 1, 2, 3, 4]]
    engine.commit(plans[0])
    assert [len(plan.entries) for plan in engine.fill()] == [3, 2]


def test_nobody_is_left_out_of_the_rounds() -> None:
    engine = decoding(7, depth=3)
    plans = engine.fill()
    seen: dict[int, int] = {}
    for _ in range(9):
        engine.commit(plans.pop(0))
        plans += engine.fill()
        for name in names(plans[-1]):
            seen[name] = seen.get(name, 0) + 1
    assert sorted(seen) == list(range(7))
    assert set(seen.values()) == {3}


# ---- ends while plans are outstanding


def test_blocks_and_slot_come_back_with_the_last_plan_that_names_them() -> None:
    engine = Engine(depth=3, max_num_seqs=1)
    engine.submit(1, prompt=40)
    plans = engine.fill()
    engine.scheduler.cancel(SequenceKey(1, 1))
    engine.scheduler.check()
    engine.submit(2)
    for plan in plans:
        assert engine.pool.num_free == 22
        assert not engine.scheduler.can_schedule or engine.schedule().plan is None
        assert engine.commit(plan) == ()
    assert engine.pool.num_free == 32
    assert shares(engine.plan()) == {2: (0, 3)}


def test_a_deadline_ends_a_sequence_in_flight_and_its_results_are_dropped() -> None:
    engine = Engine(depth=2)
    engine.submit(1, deadline_s=101.0)
    engine.submit(2, priority=-1, prompt=20)
    plans = [engine.plan()]
    engine.now_s = 101.0
    scheduled = engine.schedule()
    assert [(p.key.sequence_id, p.end) for p in scheduled.ended] == [(1, SequenceEnd.ABORTED_DEADLINE)]
    assert scheduled.plan is not None
    used = engine.pool.num_used
    assert engine.commit(plans[0]) == ()
    assert engine.pool.num_used == used - 1
    assert [p.key.sequence_id for p in engine.commit(scheduled.plan)] == [2]


def test_an_end_while_another_plan_is_outstanding_frees_what_only_its_own_plan_named() -> None:
    engine = decoding(2, depth=2)
    first, second = engine.fill()
    (progress,) = engine.commit(first, token=STOP)
    assert progress.end is SequenceEnd.STOP
    assert engine.pool.num_used == 1
    engine.commit(second)


# ---- preemption while plans are outstanding


def crowded() -> tuple[Engine, list[StepPlan]]:
    """Two plans are outstanding; 1 will want a fourth block at its next step, and none is free."""
    engine = Engine(num_blocks=6, depth=2)
    engine.submit(1, prompt=7, max_tokens=10)
    engine.submit(2, prompt=7, max_tokens=10)
    plans = engine.fill()
    while engine.scheduler.sequence(SequenceKey(1, 1)).num_tokens < 12:
        engine.commit(plans.pop(0))
        plans += engine.fill()
    assert engine.pool.num_free == 0
    assert [names(plan) for plan in plans] == [[2], [1]] or [names(plan) for plan in plans] == [[1], [2]]
    return engine, plans


def test_a_victim_in_flight_is_left_out_until_its_plan_is_committed() -> None:
    engine, plans = crowded()
    while names(plans[0]) != [1]:
        engine.commit(plans.pop(0))
        plans += engine.fill()
    engine.commit(plans.pop(0))  # 1 has 13 tokens now and needs a block; 2 is in flight
    assert engine.scheduler.sequence(SequenceKey(1, 1)).num_tokens == 13
    assert engine.fill() == []
    assert engine.scheduler.preemptions == 0
    (progress,) = engine.commit(plans.pop(0))  # its token still counts
    assert (progress.key.sequence_id, len(progress.token_ids)) == (2, 1)
    (plan,) = engine.fill()
    assert names(plan) == [1]
    assert engine.scheduler.preemptions == 1
    assert engine.scheduler.load().waiting_sequences == 1


def test_a_prompt_under_way_is_held_back_as_a_victim_and_does_not_run_on() -> None:
    """Its chunks would follow each other for ever, and it would never be free to be preempted."""
    engine = Engine(num_blocks=12, depth=2, max_num_batched_tokens=2)
    engine.submit(1, prompt=3, max_tokens=20)
    plans = engine.fill()
    engine.submit(2, prompt=40, max_tokens=2)
    preempted_at = None
    for _ in range(20):
        engine.commit(plans.pop(0))
        plans += engine.fill()
        if engine.scheduler.preemptions and preempted_at is None:
            preempted_at = engine.scheduler.sequence(SequenceKey(1, 1)).num_tokens
    assert preempted_at is not None
    assert preempted_at == 9  # where it needs its third block


def test_blocks_on_their_way_spare_a_victim() -> None:
    """3 is cancelled in flight when 1 needs a block; 2, which is free to be preempted, is spared."""
    engine = Engine(num_blocks=9, depth=2)
    engine.submit(1, prompt=7, max_tokens=10)
    engine.submit(2, prompt=5, max_tokens=10)
    engine.submit(3, prompt=5, max_tokens=10)
    plans = engine.fill()
    while engine.scheduler.sequence(SequenceKey(1, 1)).num_tokens < 13:
        plans += engine.fill()
        engine.commit(plans.pop(0))
    assert engine.pool.num_free == 0
    assert [names(plan) for plan in plans] == [[3]]
    engine.scheduler.cancel(SequenceKey(1, 3))
    assert [names(plan) for plan in engine.fill()] == [[2]]
    assert engine.commit(plans.pop(0)) == ()
    assert [names(plan) for plan in engine.fill()] == [[1]]
    assert engine.scheduler.preemptions == 0


# ---- prompts beside decodes


def test_prompts_take_what_they_are_given_while_others_decode() -> None:
    engine = decoding(2)
    engine.submit(8, prompt=40)
    plan = engine.scheduler.schedule(engine.now_s, prefill_tokens=5).plan
    assert plan is not None
    assert shares(plan)[8] == (0, 5)
    engine.commit(plan)
    engine.submit(9, prompt=3)
    plan = engine.scheduler.schedule(engine.now_s, prefill_tokens=40).plan
    assert plan is not None
    assert [len(e.token_ids) for e in plan.entries] == [1, 1, 14]


def test_several_prompts_share_what_they_are_given() -> None:
    engine = decoding(1)
    engine.submit(8, prompt=3)
    engine.submit(9, prompt=9)
    plan = engine.scheduler.schedule(engine.now_s, prefill_tokens=5).plan
    assert plan is not None
    assert shares(plan) == {0: (3, 1), 8: (0, 3), 9: (0, 2)}


def test_prompts_have_the_whole_budget_while_nobody_decodes() -> None:
    engine = Engine()
    engine.submit(8, prompt=40)
    plan = engine.scheduler.schedule(engine.now_s, prefill_tokens=1).plan
    assert plan is not None
    assert shares(plan) == {8: (0, 16)}


def test_decodes_in_another_outstanding_plan_count_too() -> None:
    engine = decoding(1, depth=2)
    engine.submit(8, prompt=40)
    for expected in ({0: (3, 1), 8: (0, 2)}, {8: (2, 2)}):
        plan = engine.scheduler.schedule(engine.now_s, prefill_tokens=2).plan
        assert plan is not None
        assert shares(plan) == expected


def test_a_short_prompt_passes_a_long_one_that_waits_for_its_share() -> None:
    engine = decoding(2)
    for name in (8, 9):
        engine.submit(name, prompt=40)
    engine.submit(10, prompt=3)
    plan = engine.scheduler.schedule(engine.now_s, prefill_tokens=4, short_prompt=5).plan
    assert plan is not None
    assert shares(plan) == {0: (3, 1), 1: (3, 1), 8: (0, 4), 10: (0, 3)}


def test_a_step_may_go_without_prompts_but_never_without_anything() -> None:
    engine = decoding(1, depth=2)
    engine.submit(8, prompt=40)
    for expected in ({0: (3, 1)}, {8: (0, 1)}):  # the second has no decode: the only one is outstanding
        plan = engine.scheduler.schedule(engine.now_s, prefill_tokens=0).plan
        assert plan is not None
        assert shares(plan) == expected


def test_the_first_prompt_under_way_says_where_it_goes_on() -> None:
    engine = decoding(2)
    assert engine.scheduler.prompt_under_way is None
    engine.submit(8, prompt=40)
    engine.submit(9, prompt=40, resume=1)
    assert engine.scheduler.prompt_under_way is None
    engine.commit(engine.scheduler.schedule(engine.now_s, prefill_tokens=5).plan)
    first = engine.scheduler.prompt_under_way
    assert first is not None
    assert (first.num_planned, first.resumes) == (5, False)
    engine.scheduler.cancel(SequenceKey(1, 8))
    assert engine.scheduler.prompt_under_way is None
    engine.commit(engine.scheduler.schedule(engine.now_s, prefill_tokens=5).plan)
    first = engine.scheduler.prompt_under_way
    assert first is not None
    assert (first.num_planned, first.resumes) == (5, True)
