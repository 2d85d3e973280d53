from __future__ import annotations

import math

import pytest

from cluster.domain.request import SamplingParams, SequenceEnd, TokenLogprob
from cluster.engine.sequence import Sequence
from cluster.engine.step import SampledToken, SequenceKey

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
    assert (sequence.tokens(0, 9), sequence.num_tokens, sequence.next_position) == ((1, 2, 3), 3, 3)


@pytest.mark.parametrize(
    ("prompt", "computed", "prefilling"),
    [([1], 0, True), ([1, 2], 0, True), ([1, 2], 1, False), ([1, 2, 3], 1, True), ([1, 2, 3], 2, False)],
)
def test_prefilling_ends_with_one_token_left_behind_others(prompt: list[int], computed: int, prefilling: bool) -> None:
    sequence = make(prompt)
    sequence.num_computed = computed
    assert sequence.is_prefilling is prefilling


def test_resumed_tokens_are_remembered_and_make_it_started() -> None:
    fresh, resumed = make([1]), make([1], [2, 3])
    resumed.generated_token_ids.append(4)
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
