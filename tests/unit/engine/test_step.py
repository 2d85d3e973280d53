from __future__ import annotations

import pytest

from cluster.engine.step import SequenceKey, StepEntry, StepPlan

KEY = SequenceKey(1, 1)
DECODE = StepEntry(KEY, (5,), 4, (0, 1), sample=True)
CHUNK = StepEntry(KEY, (5, 6), 4, (0, 1), sample=False)
LAST_CHUNK = StepEntry(KEY, (5, 6), 4, (0, 1), sample=True)
FIRST_TOKEN = StepEntry(KEY, (5,), 0, (0,), sample=True)
ONE_TOKEN_CHUNK = StepEntry(KEY, (5,), 4, (0, 1), sample=False)


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
