from __future__ import annotations

import pytest

from cluster.engine.step import SequenceKey, StepEntry, StepPlan

KEY = SequenceKey(1, 1)


def entry(token_ids: tuple[int, ...], start: int, sample: bool) -> StepEntry:
    return StepEntry(KEY, 0, token_ids, start, first_block=0, new_block_ids=(0, 1), sample=sample, num_prompt=9)


DECODE = entry((5,), 4, sample=True)
CHUNK = entry((5, 6), 4, sample=False)
LAST_CHUNK = entry((5, 6), 4, sample=True)
FIRST_TOKEN = entry((5,), 0, sample=True)
ONE_TOKEN_CHUNK = entry((5,), 4, sample=False)


@pytest.mark.parametrize(
    ("entries", "kind"),
    [
        ((DECODE,), "decode"),
        ((DECODE, DECODE), "decode"),
        ((CHUNK,), "prefill"),
        ((LAST_CHUNK,), "prefill"),
        ((FIRST_TOKEN,), "prefill"),
        ((ONE_TOKEN_CHUNK,), "prefill"),
        ((DECODE, LAST_CHUNK), "mixed"),
    ],
)
def test_kind(entries: tuple[StepEntry, ...], kind: str) -> None:
    assert StepPlan(1, entries).kind == kind


def test_num_tokens_and_end() -> None:
    assert StepPlan(3, (DECODE, CHUNK)).num_tokens == 3
    assert (DECODE.end, CHUNK.end) == (5, 6)


def test_a_plan_without_work_cannot_be_built() -> None:
    with pytest.raises(AssertionError):
        StepPlan(1, ())
