"""The pace of prompts beside decodes, on machines of known cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.engine.prefill_pace import LEAST_CHUNK_TOKENS, PrefillPace


def test_before_anything_is_known_and_without_decodes_the_budget_is_whole():
    pace = PrefillPace(2.0, 2048)
    assert pace.budget(0) == pace.budget(8) == 2048
    pace.observe(8, 0, 0.010)
    pace.observe(8, 100, 0.035)
    assert pace.budget(0) == 2048


def test_the_budget_keeps_a_step_at_its_slowdown():
    pace = PrefillPace(2.0, 2048)
    pace.observe(8, 0, 0.010)
    pace.observe(8, 100, 0.010 + 100 * 0.00025)
    assert pace.budget(8) == 40


def test_a_crowd_without_a_token_is_worth_as_many_slowdowns_as_come_on_each_stream():
    pace = PrefillPace(2.0, 2048)
    pace.observe(8, 0, 0.010)
    pace.observe(8, 100, 0.010 + 100 * 0.00025)
    assert pace.budget(8, 1) == pace.budget(8, 8) == 40
    assert pace.budget(8, 24) == 120
    assert pace.budget(1, 31) == min(31 * 40, 2048)


def test_a_prompt_is_short_up_to_eight_steps_of_the_decodes():
    pace = PrefillPace(2.0, 512)
    assert pace.short_prompt(8) == 0
    pace.observe(8, 0, 0.010)
    assert pace.short_prompt(8) == 0
    pace.observe(8, 100, 0.010 + 100 * 0.00025)
    assert pace.short_prompt(8) == 320
    pace.observe(32, 0, 0.040)
    assert pace.short_prompt(32) == 512
    assert pace.short_prompt(0) == 0


def test_a_prompt_before_any_decode_was_seen_leaves_the_least_chunk():
    pace = PrefillPace(2.0, 2048)
    pace.observe(0, 2048, 0.5)
    assert pace.budget(4) == LEAST_CHUNK_TOKENS


def test_a_budget_smaller_than_the_least_chunk_holds():
    pace = PrefillPace(1.5, 8)
    pace.observe(1, 0, 1e-6)
    pace.observe(1, 8, 1.0)
    assert pace.budget(1) == 8


@pytest.mark.parametrize("num_decodes", [1, 7, 32])
def test_an_8000_token_prompt_does_not_double_the_steps_of_a_machine_whose_attention_grows(num_decodes):
    """Cost per prompt token triples along the prompt, as on a small model; every step stays below 2.2 times."""
    alone_s, pace, done, steps = 0.004 + 0.0004 * num_decodes, PrefillPace(1.8, 2048), 0, []
    for _ in range(5):
        pace.observe(num_decodes, 0, alone_s)
    pace.observe(num_decodes, 16, alone_s + 16 * 0.0002)
    while done < 8000:
        chunk = min(pace.budget(num_decodes), 8000 - done)
        seconds = alone_s + chunk * (0.0002 + 0.0004 * done / 8000)
        pace.observe(num_decodes, chunk, seconds)
        done += chunk
        steps.append(seconds / alone_s)
    assert max(steps) < 2.2
    assert sum(steps) / len(steps) > 1.5  # and the prompt is not starved either


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 4096), st.floats(0, 100)), max_size=30), st.integers(0, 300)
)
def test_the_budget_is_always_within_its_bounds(observations, num_decodes):
    pace = PrefillPace(1.8, 512)
    for decodes, tokens, seconds in observations:
        if decodes or tokens:
            pace.observe(decodes, tokens, seconds)
    assert LEAST_CHUNK_TOKENS <= pace.budget(num_decodes) <= 512
