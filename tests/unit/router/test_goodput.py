from __future__ import annotations

import pytest

from cluster.router.goodput import Timing


def timing(*tokens: tuple[int, float]) -> Timing:
    made = Timing(arrived_s=10.0)
    for count, at_s in tokens:
        made.took(count, at_s)
    return made


@pytest.mark.parametrize(
    ("tokens", "ended_s", "good"),
    [
        ([(1, 11.0), (1, 11.1), (1, 11.2)], 11.2, True),
        ([(1, 12.0)], 12.0, True),  # the objective itself is met
        ([(1, 12.01)], 12.01, False),
        ([(1, 11.0), (1, 11.1), (1, 11.5)], 11.5, False),  # 0.25 s per later token
        ([(1, 11.0), (1, 11.3), (2, 11.45)], 11.45, True),  # 0.15 s on average, though one gap is long
        ([(3, 11.0)], 11.0, True),
        ([], 11.5, True),  # it stopped before any token
        ([], 12.5, False),
        ([(1, 11.0)], 60.0, True),  # what the client takes to read is not ours
    ],
)
def test_both_objectives_count(tokens: list[tuple[int, float]], ended_s: float, good: bool) -> None:
    assert timing(*tokens).meets(ttft_objective_s=2.0, tpot_objective_s=0.2, ended_s=ended_s) is good
