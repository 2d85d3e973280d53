"""The long-prompt bench's procedure, with an engine that is made up: it measures, and it ends whatever happens."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "ops" / "bench" / "long_prompt"))
from streams import Plan, Streams, measure


def plan(prompt_deadline_s: float) -> Plan:
    return Plan(
        streams=2, prompt_tokens=500, vocab_size=100, window_s=0.05, repetitions=2, prompt_deadline_s=prompt_deadline_s
    )


def engine(prompt_s: float | None):
    async def generate(prompt: list[int], tokens: int) -> AsyncIterator[object]:
        if len(prompt) == 500:
            await (asyncio.sleep(prompt_s) if prompt_s is not None else asyncio.Event().wait())
        for _ in range(tokens):
            yield object()
            await asyncio.sleep(0.001)

    return generate


async def test_it_tells_gaps_before_beside_and_after_and_the_prompts_first_token():
    rows = await asyncio.wait_for(measure(engine(0.03), plan(30)), 30)
    assert len(rows) == 2
    for row in rows:
        assert row["ttft_s"] >= 0.03
        assert row["ttft_without_streams_s"] >= 0.03
        for part in ("alone_before", "beside", "alone_after"):
            assert 1.0 <= row[part]["p50_ms"] <= row[part]["p99_ms"] <= row[part]["most_ms"]
            assert row[part]["gaps"] > 0


async def test_a_prompt_that_never_brings_a_token_is_given_up_and_said_to_be():
    rows = await asyncio.wait_for(measure(engine(None), plan(0.05)), 30)
    assert [row["ttft_s"] for row in rows] == [None, None]
    assert all(row["beside"]["gaps"] > 0 for row in rows)


async def test_percentiles_are_by_nearest_rank():
    streams = Streams(engine(None), plan(1), 0)
    streams.gaps = [n / 1e3 for n in range(1, 201)]
    assert streams.percentiles() == {"p50_ms": 100.0, "p99_ms": 198.0, "most_ms": 200.0, "gaps": 200}
    streams.gaps = []
    with pytest.raises(RuntimeError, match="no token"):
        streams.percentiles()
    await streams.stop()
