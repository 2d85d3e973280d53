from __future__ import annotations

import math

import pytest

from cluster.domain.request import SamplingParams, SequenceEnd, TokenLogprob
from cluster.engine.sequence import Sequence
from cluster.engine.step import SampledToken, SequenceKey, SequenceStart, StepEntry

KEY = SequenceKey(2, 9)


def make(prompt: list[int], generated: list[int] | None = None, **rest: object) -> Sequence:
    return Sequence(KEY, prompt, SamplingParams(max_tokens=8), generated or [], **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize("start", range(5))
@pytest.mark.parametrize("end", range(6))
def test_tokens_cross_the_border_of_prompt_and_output(start: int, end: int) -> None:
    sequence = make([10, 11, 12], [13, 14])
    assert sequence.tokens(start, end) == tuple([10, 11, 12, 13, 14][start:end])


def test_a_sequence_owns_its_tokens() -> None:
    prompt, generated = [1, 2], [3]
    sequence = make(prompt, generated)
    prompt.append(9)
    generated.append(9)
    assert (sequence.tokens(0, 9), sequence.num_tokens) == ((1, 2, 3), 3)


@pytest.mark.parametrize(
    ("prompt", "planned", "prefilling"),
    [([1], 0, True), ([1, 2], 0, True), ([1, 2], 1, False), ([1, 2], 2, False), ([1, 2, 3], 1, True)],
)
def test_prefilling_ends_with_one_token_left_behind_others(prompt: list[int], planned: int, prefilling: bool) -> None:
    sequence = make(prompt)
    sequence.num_planned = planned
    assert sequence.is_prefilling is prefilling


def test_resumed_tokens_are_remembered_and_make_it_started() -> None:
    fresh, resumed = make([1]), make([1], [2, 3])
    resumed.append(4)
    assert (resumed.num_tokens, resumed.tokens(0, 9)) == (4, (1, 2, 3, 4))
    assert (fresh.resumed_tokens, resumed.resumed_tokens) == (0, 2)
    assert (fresh.late_end, resumed.late_end) == (SequenceEnd.EVICTED_DEADLINE, SequenceEnd.ABORTED_DEADLINE)


def test_rank_and_deadline() -> None:
    urgent, old, new = make([1], priority=1), make([1]), make([1])
    urgent.arrival, old.arrival, new.arrival = 5, 1, 2
    assert sorted([new, old, urgent], key=lambda s: s.rank) == [urgent, old, new]
    assert (old.due_s, make([1], deadline_s=3.0).due_s) == (math.inf, 3.0)


def test_progress_carries_the_logprob_only_with_its_token() -> None:
    logprob = TokenLogprob(7, -0.5)
    sequence = make([1], attempt=3)
    assert sequence.progress(SampledToken(KEY, 7, logprob)).logprobs == (logprob,)
    bare = sequence.progress(SampledToken(KEY, 7), end=SequenceEnd.LENGTH)
    assert (bare.attempt, bare.token_ids, bare.logprobs, bare.end) == (3, (7,), (), SequenceEnd.LENGTH)
    assert sequence.progress(end=SequenceEnd.STOP).token_ids == ()


def test_a_plan_tells_each_block_once_and_an_admission_tells_them_all() -> None:
    sequence = make([10, 11, 12, 13, 14])
    sequence.admit(2, [], [7, 8], block_size=4)
    first, second = sequence.plan(2), sequence.plan(3)
    assert first == StepEntry(KEY, 2, (10, 11), 0, 0, (7, 8), sample=False, num_prompt=5)
    assert second == StepEntry(KEY, 2, (12, 13, 14), 2, 2, (), sample=True, num_prompt=5)
    assert (sequence.num_planned, sequence.num_plans) == (5, 2)
    sequence.append(15)
    sequence.block_ids.append(3)
    third = sequence.plan(1)
    assert (third.token_ids, third.first_block, third.new_block_ids, third.num_prompt) == ((15,), 2, (3,), 5)
    assert sequence.give_back() == [7, 8, 3]
    sequence.admit(0, [5], [6], block_size=4)
    again = sequence.plan(2)
    assert again == StepEntry(KEY, 0, (14, 15), 4, 0, (5, 6), sample=True, num_prompt=5)


def test_cached_prompt_tokens_are_those_of_the_first_admission() -> None:
    sequence = make([10, 11, 12], [13, 14, 15, 16])
    sequence.admit(0, [5], [6], block_size=4)
    assert (sequence.num_computed, sequence.cached_prompt_tokens) == (4, 3)
    fresh = make([10, 11, 12, 13, 14])
    fresh.admit(0, [], [5, 6], block_size=4)
    fresh.give_back()
    fresh.admit(0, [5], [6], block_size=4)
    assert (fresh.num_computed, fresh.cached_prompt_tokens) == (4, 0)


def test_a_start_tells_all_that_is_known() -> None:
    sequence = make([10, 11], [12])
    sequence.admit(3, [], [1], block_size=4)
    assert sequence.begin() == SequenceStart(3, sequence.params, (10, 11), (12,))
