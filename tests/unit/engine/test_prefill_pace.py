"""The pace of prompts beside decodes, on machines of known cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.engine.prefill_pace import LEAST_CHUNK_TOKENS, PrefillPace, PromptCost, PromptWork

NOTHING = PromptWork()


def at_start(tokens: int) -> PromptWork:
    return PromptWork.chunk(0, tokens)


def known(slowdown: float = 2.0, most_tokens: int = 2048) -> PrefillPace:
    """10 ms for a step of 8 decodes, a quarter of a millisecond for a token."""
    pace = PrefillPace(slowdown, most_tokens)
    pace.observe(8, NOTHING, 0.010)
    pace.observe(8, at_start(100), 0.010 + 100 * 0.00025)
    return pace


def test_before_anything_is_known_and_without_decodes_the_budget_is_whole():
    pace = PrefillPace(2.0, 2048)
    assert pace.budget(0) == pace.budget(8) == 2048
    assert known().budget(0) == 2048


def test_the_budget_keeps_a_step_at_its_slowdown():
    assert known().budget(8) == 40


def test_a_crowd_without_a_token_is_worth_as_many_slowdowns_as_come_on_each_stream():
    pace = known()
    assert pace.budget(8, 1) == pace.budget(8, 8) == 40
    assert pace.budget(8, 24) in range(112, 136)
    pace.observe(1, NOTHING, 0.009)
    assert pace.budget(1, 31) in range(1040, 2049)


def test_fewer_streams_than_were_ever_seen_are_looked_at_first():
    """From eight streams nobody can tell what one takes: a step could be many times too long until the next look."""
    pace = known()
    assert pace.budget(1) == pace.short_prompt(1) == 0
    pace.observe(1, NOTHING, 0.002)
    assert pace.budget(1) == 8
    assert pace.short_prompt(1) == 64
    assert pace.budget(8) == 40


def test_between_two_numbers_of_streams_their_time_lies_on_a_line():
    pace = known()
    pace.observe(32, NOTHING, 0.034)
    assert [pace.budget(n) for n in (8, 20, 32, 64)] == [40, 88, 128, 128]
    pace.observe(16, NOTHING, 0.5)  # a hiccup: fewer take no longer than more
    assert pace.budget(16) <= 136
    assert pace.budget(8) == 40


def test_behind_a_cached_beginning_the_first_chunk_is_small_and_believed():
    pace = known()
    assert pace.budget(8, 1, 500) == 32
    assert pace.budget(8, 1, 6000) == LEAST_CHUNK_TOKENS
    pace.observe(8, PromptWork.chunk(6000, 2), 0.010 + 0.009)  # reading the past takes nearly all that may be taken
    assert pace.budget(8, 1, 6002) in (2, 3, 4)
    assert pace.budget(8) in (32, 40)


def test_a_stream_that_is_computed_anew_may_cost_as_much_as_a_short_prompt():
    pace = known()
    assert pace.budget(8, 1, anew=True) == pace.short_prompt(8) // 8 * 8 == 312
    assert pace.budget(8, 240, anew=True) == pace.budget(8, 240)


def test_short_prompts_in_every_step_do_not_keep_it_from_looking_at_the_streams_alone():
    """Else streams that have become faster would pass for prompts that cost nothing."""
    pace = known()
    for _ in range(600):
        may_go = pace.budget(8) or pace.short_prompt(8)
        pace.observe(8, at_start(8) if may_go else NOTHING, 0.004 + (8 * 0.0002 if may_go else 0.0))
    assert pace.short_prompt(8) <= 8 * 0.004 / 0.0002 * 1.2


def test_a_prompt_is_short_up_to_eight_steps_of_the_decodes():
    pace = PrefillPace(2.0, 512)
    assert pace.short_prompt(8) == 0
    pace.observe(8, NOTHING, 0.010)
    assert pace.short_prompt(8) == 0
    pace.observe(8, at_start(100), 0.010 + 100 * 0.00025)
    assert pace.short_prompt(8) in range(300, 330)
    pace.observe(32, NOTHING, 0.040)
    assert pace.short_prompt(32) == 512
    assert pace.short_prompt(0) == 0


def test_streams_that_were_never_seen_alone_are_looked_at_first():
    pace = PrefillPace(2.0, 2048)
    pace.observe(0, at_start(2048), 0.5)
    assert (pace.budget(4), pace.short_prompt(4)) == (0, 0)
    pace.observe(4, NOTHING, 0.010)
    assert 40 <= pace.budget(4) <= 80  # of one chunk nobody knows what reading its own beginning took


def test_a_crowd_on_a_fresh_engine_is_computed_in_full_steps():
    """Else the prompts that did not fit into the first step are computed by twos for as long as the first streams."""
    pace, length = PrefillPace(2.0, 512), 64
    decodes, left, steps = 0, 32 * length, 0
    while left:
        waiting = math.ceil(left / length)
        tokens = pace.budget(decodes, waiting)
        if decodes and pace.short_prompt(decodes) >= length:
            tokens = 512
        tokens = min(tokens, left)
        pace.observe(decodes, at_start(tokens) if tokens else NOTHING, 0.005 + tokens * 0.0002)
        left, steps = left - tokens, steps + 1
        decodes = 32 - math.ceil(left / length)
        assert steps < 10


def test_a_budget_smaller_than_the_least_chunk_holds():
    pace = PrefillPace(1.5, 1)
    pace.observe(1, NOTHING, 1e-6)
    pace.observe(1, at_start(8), 1.0)
    assert pace.budget(1) == 1


def test_now_and_then_a_step_goes_without_prompts_so_that_the_streams_own_time_stays_known():
    pace, looks, since = known(), 0, 0
    for _ in range(1000):
        tokens = pace.budget(8)
        looks += not tokens
        since = since + 1 if tokens else 0
        assert since <= 64
        # The streams have grown: a step of theirs takes twice as long as it did.
        pace.observe(8, at_start(tokens) if tokens else NOTHING, 0.020 + tokens * 0.00025)
    assert 15 <= looks <= 16
    assert pace.budget(8) in (72, 80)


def test_steps_that_carry_short_prompts_instead_do_not_hold_the_long_one_up():
    pace = known()
    given_tokens = 0
    for _ in range(1000):
        given_tokens += pace.budget(8)
        pace.observe(8, at_start(64), 0.010 + 64 * 0.00025)
    assert given_tokens > 1000 * 30


def test_a_large_chunk_alone_does_not_make_small_ones_look_cheap():
    pace = known()
    for _ in range(20):
        pace.observe(0, PromptWork.chunk(4096, 2048), 0.001)
    assert pace.budget(8) == 40


def test_one_hiccup_of_the_machine_is_soon_forgotten():
    pace = known()
    pace.observe(8, at_start(40), 5.0)
    assert pace.budget(8) >= 16
    steps = 0
    while pace.budget(8) < 32:
        tokens = pace.budget(8)
        pace.observe(8, at_start(tokens) if tokens else NOTHING, 0.010 + tokens * 0.00025)
        steps += 1
        assert steps < 100


@given(
    st.lists(
        st.tuples(st.integers(0, 300), st.integers(0, 16_000), st.integers(0, 4096), st.floats(0, 100)), max_size=30
    ),
    st.integers(0, 300),
    st.integers(0, 100_000),
)
@example([(0, 0, 1, 0.0), (2, 0, 0, 0.0)], 1, 0)  # fewer streams than were ever seen
def test_the_budget_is_always_within_its_bounds_but_for_one_look_at_the_streams_alone(observations, num_decodes, start):
    pace = PrefillPace(1.8, 512)
    for decodes, at, tokens, seconds in observations:
        if decodes or tokens:
            pace.observe(decodes, PromptWork.chunk(at, tokens) if tokens else NOTHING, seconds)
    if not pace.budget(num_decodes, 1, start):
        assert pace.short_prompt(num_decodes) == 0
        pace.observe(num_decodes, NOTHING, 0.01)
    assert LEAST_CHUNK_TOKENS <= pace.budget(num_decodes, 1, start) <= 512
    assert 0 <= pace.short_prompt(num_decodes) <= 512


def test_work_is_counted_where_it_lies():
    work = PromptWork.chunk(100, 10) + PromptWork.chunk(0, 4)
    assert work == PromptWork(tokens=14, past=114, pairs=10 * 105.0 + 4 * 2.0)


@given(st.floats(1e-6, 1e-2), st.floats(0, 1e-6), st.floats(0, 1e-5), st.integers(0, 16_000), st.floats(1e-4, 1.0))
def test_the_most_tokens_within_a_time_are_the_most(a, b, c, start, seconds):
    cost = PromptCost()
    for _ in range(2):
        for at in (0, 2048, 8192):
            for tokens in (1, 16, 256):
                work = PromptWork.chunk(at, tokens)
                cost.observe(work, a * work.tokens + b * work.pairs + c * work.past)
    tokens = cost.tokens(seconds, start)
    assert cost.seconds(PromptWork.chunk(start, tokens)) <= seconds * 1.001 or not tokens
    assert cost.seconds(PromptWork.chunk(start, tokens + 1)) >= seconds * 0.999


# ---- a whole prompt beside streams


@dataclass
class Run:
    alone: list[float]
    beside: list[float]
    done: int


def run(
    pace: PrefillPace, num_decodes: int, alone_s: Callable[[int], float], extra_s: Callable[[int, int], float],
    prompt: int, start: int = 0, *, anew: bool = False,
) -> Run:  # fmt: skip
    """``extra_s(tokens, start)`` beside streams whose own step, ``alone_s(step)``, may grow."""
    found = Run([], [], start)
    pace.observe(num_decodes, at_start(64), alone_s(0) + extra_s(64, 0))  # as the streams' own prompts were
    for step in range(200):
        found.alone.append(alone_s(step))
        pace.observe(num_decodes, NOTHING, found.alone[-1])
    while found.done < prompt and len(found.beside) < prompt:
        tokens = min(pace.budget(num_decodes, 1, found.done, anew=anew), prompt - found.done)
        seconds = alone_s(200 + len(found.beside)) + (extra_s(tokens, found.done) if tokens else 0.0)
        pace.observe(num_decodes, PromptWork.chunk(found.done, tokens) if tokens else NOTHING, seconds)
        found.done += tokens
        found.beside.append(seconds)
    return found


def p99(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


@given(
    num_decodes=st.integers(1, 32),
    token_s=st.floats(1e-5, 4e-4),
    growth=st.floats(0, 8),
    power=st.sampled_from([0.5, 1.0, 2.0]),
    past_share=st.floats(0, 0.5),
    packing=st.floats(0, 0.4),
    streams_growth=st.floats(0, 1e-3),
)
def test_streams_beside_a_long_prompt_stay_within_twice_their_own_time_and_the_prompt_ends(
    num_decodes, token_s, growth, power, past_share, packing, streams_growth
):
    """Whatever a token costs, how that rises along the prompt, what reading the past costs, where small chunks pay more.

    Only where two tokens and the past they read take longer than a step of the streams can nobody hold the bound.
    """
    own_s = 0.004 + 0.0004 * num_decodes

    def extra_s(tokens: int, start: int) -> float:
        reading = past_share * own_s * start / 8000
        rate = token_s * (1 + growth * (start / 8000) ** power) * (1 + packing * (4 < tokens < 16))
        return reading + tokens * rate

    found = run(PrefillPace(1.7, 2048), num_decodes, lambda step: own_s * (1 + streams_growth * step), extra_s, 8000)
    assert found.done == 8000
    assert len(found.beside) <= 8000 / LEAST_CHUNK_TOKENS * 1.02 + 1
    steps = [seconds / (own_s * (1 + streams_growth * (200 + i))) for i, seconds in enumerate(found.beside)]
    least = max(extra_s(LEAST_CHUNK_TOKENS, 8000), extra_s(LEAST_CHUNK_TOKENS, 0)) / own_s
    assert p99(steps) <= max(2.0, 1.0 + least)
    assert least > 0.3 or len(found.beside) < 4000  # and the prompt is not starved either


# Milliseconds beyond 8 decodes' own 20.2 on one core of a server, 27M parameters: by tokens, at 0, 2,000 .. 7,800.
MEASURED_MS = {
    1: (0.4, 4.5, 8.0, 10.1, 13.1), 4: (1.2, 11.4, 14.8, 21.2, 25.6), 8: (3.2, 20.5, 31.9, 47.4, 57.5),
    16: (7.1, 24.7, 43.4, 60.9, 76.0), 32: (14.9, 42.6, 64.6, 88.2, 111.7), 64: (32.4, 69.9, 109.1, 145.3, 180.9),
    128: (65.3, 132.4, 214.3, 281.4, 360.2),
}  # fmt: skip
MEASURED_AT = (0, 2000, 4000, 6000, 7800)


def between(at: float, xs: tuple[float, ...], ys: tuple[float, ...]) -> float:
    last = max(1, min(sum(x <= at for x in xs), len(xs) - 1))
    x, after = xs[last - 1], xs[last]
    return ys[last - 1] + (ys[last] - ys[last - 1]) * (at - x) / (after - x)


def measured_s(tokens: int, start: int) -> float:
    by_tokens = tuple(between(start, MEASURED_AT, row) for row in MEASURED_MS.values())
    return between(8 if 4 < tokens < 8 else tokens, tuple(MEASURED_MS), by_tokens) / 1e3


@pytest.mark.parametrize(("start", "most_steps"), [(0, 2900), (6000, 1100)])
def test_8000_tokens_on_a_machine_that_was_measured(start, most_steps):
    """From the beginning, and after 6,000 tokens that were found in the cache."""
    found = run(PrefillPace(1.7, 2048), 8, lambda _step: 0.0202, measured_s, 8000, start)
    assert found.done == 8000
    assert p99(found.beside) <= 2.0 * p99(found.alone)
    assert len(found.beside) < most_steps


def test_the_next_prompt_begins_in_larger_chunks_than_the_last_one_ended():
    pace = PrefillPace(1.7, 2048)
    run(pace, 8, lambda _step: 0.0202, measured_s, 8000)
    assert pace.budget(8, 1, 7000) < pace.budget(8, 1, 0)
    again = run(pace, 8, lambda _step: 0.0202, measured_s, 1000)
    assert p99(again.beside) <= 2.0 * p99(again.alone)
    assert len(again.beside) < 150


@pytest.mark.parametrize("start", [2000, 6000])
def test_no_step_behind_a_cached_beginning_takes_far_too_long(start):
    found = run(PrefillPace(1.7, 2048), 8, lambda _step: 0.0202, measured_s, 8000, start)
    assert max(found.beside) <= 2.6 * 0.0202


def test_a_stream_that_is_computed_anew_is_soon_there():
    """Four times sooner than a newcomer, at the price of steps that take up to nine times as long."""
    newcomer = run(PrefillPace(1.7, 2048), 8, lambda _step: 0.0202, measured_s, 8000)
    again = run(PrefillPace(1.7, 2048), 8, lambda _step: 0.0202, measured_s, 8000, anew=True)
    assert sum(again.beside) < sum(newcomer.beside) / 4
    assert max(again.beside) < 13 * 0.0202
