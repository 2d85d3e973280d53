"""What ops/bench/survive makes of its streams."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from ops.bench.survive import __main__ as bench
from ops.bench.survive import report
from ops.bench.survive.streams import Stream, arrivals

GOALS = {"p99_factor": 1.5, "answer_ms": 50, "pause_ms": 2200, "goes_on_share": 0.95, "retry_share": 0.2}


def stream(at_s: float, *token_s: float) -> Stream:
    return Stream(at_s, len(token_s), token_s=list(token_s), end="OK")


def test_a_window_takes_gaps_by_their_end_and_requests_by_their_begin() -> None:
    early, late = stream(0.0, 0.1, 0.2, 5.2), stream(5.5, 5.75, 5.8)
    found = report.window([early, late], 5.0, 6.0, 1.0)
    assert (found["tokens"], found["slow_gap_share"], found["itl_p50_ms"], found["itl_p99_ms"]) == (
        2,
        0.5,
        50.0,
        5000.0,
    )
    assert (found["requests"], found["hit_share"], found["ttft_p99_ms"]) == (1, 0.0, 250.0)
    assert report.window([early, late], 0.0, 1.0, 1.0)["hit_share"] == 1.0, "though it was hit later"
    assert report.window([], 0.0, 1.0, 1.0)["itl_p99_ms"] is None


@pytest.mark.parametrize(("percent", "value"), [(50, 5.0), (99, 10.0), (10, 1.0)])
def test_percentiles_are_nearest_ranks(percent: float, value: float) -> None:
    assert report.percentile([float(i) for i in range(10, 0, -1)], percent) == value


def test_goals_are_judged_by_part_and_a_part_that_did_not_run_is_left_out() -> None:
    storm: dict[str, Any] = {
        "sent": 100, "retries": 31.0, "free": 11.0, "answers": {"p99_ms": 50.0},
        "ends": {"UNAVAILABLE REPLICA_FAILED": 100},
    }  # fmt: skip
    assert report.verdicts({"storm": storm}, GOALS) == dict.fromkeys(
        ("storm_retries", "storm_typed", "storm_answers"), True
    )
    storm |= {"retries": 32.0, "answers": {"p99_ms": 51.0}, "ends": {"UNAVAILABLE": 100}}
    assert not any(report.verdicts({"storm": storm}, GOALS).values())
    silence = {"sent": 3, "ends": {"OK": 3}, "exact": True, "pauses": report.answers([])}
    assert report.verdicts({"silence": silence}, GOALS) == {"silence_moved": False, "silence_exact": True}


def test_a_slow_replica_must_change_no_token_and_fail_nobody() -> None:
    slow: dict[str, Any] = {
        "sent": 3, "ends": {"OK": 3}, "exact": True, "p99_factor": 1.5, "noticed_after_s": 1.4,
    }  # fmt: skip
    assert report.verdicts({"slow": slow}, GOALS) == dict.fromkeys(("slow_p99", "slow_noticed", "slow_exact"), True)
    for worse in ({"exact": False}, {"ends": {"OK": 2, "UNAVAILABLE REPLICA_FAILED": 1}}):
        assert not report.verdicts({"slow": slow | worse}, GOALS)["slow_exact"]


def test_an_unknown_part_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.parts("death,slow") == {"death", "slow"}
    monkeypatch.setattr("sys.argv", ["measure", "--only", "slow,typo"])
    with pytest.raises(SystemExit) as caught:
        bench.main()
    assert caught.value.code == 2
    assert "no part is called 'typo'; parts are slow,death,silence,storm" in capsys.readouterr().err


def test_arrivals_are_the_same_for_the_same_seed_and_in_their_time() -> None:
    sent = arrivals(3, 50.0, 2.0, 4.0, 20)
    assert sent == arrivals(3, 50.0, 2.0, 4.0, 20)
    assert all(2.0 <= s.at_s < 4.0 and 2 <= s.tokens <= 80 for s in sent)
    assert 50 < len(sent) < 150


def test_the_workload_names_what_the_parts_take() -> None:
    workload = yaml.safe_load((bench.HERE / "workload.yaml").read_text())
    assert set(workload["goals"]) == set(GOALS)
    for part, changes in workload["quick"].items():
        assert set(changes) <= set(workload[part])
