"""What ops/bench/router makes of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ops.bench.router import __main__ as bench
from ops.bench.router import report

WORKLOAD: dict[str, Any] = yaml.safe_load((Path(bench.__file__).parent / "workload.yaml").read_text())


def run(contender: str, number: int, cost: float, p50_ms: float, scenario: str = "unary") -> dict[str, Any]:
    return {
        "contender": contender, "scenario": scenario, "round": number, report.COSTS[scenario][0]: cost,
        "p50_ms": p50_ms, "p99_ms": 2 * p50_ms,
    }  # fmt: skip


def test_latencies_become_percentiles_by_nearest_rank() -> None:
    found = report.condensed({"latency_s": [index / 1e3 for index in range(100, 0, -1)], "cores": 0.12345})
    assert found == {"p50_ms": 50.0, "p99_ms": 99.0, "cores": 0.123}


def test_added_latency_is_that_over_the_direct_way_of_the_same_round() -> None:
    runs = [
        run("ours", 0, 500.0, 2.0), run("grpcio", 0, 300.0, 1.0),
        run("ours", 1, 700.0, 9.0), run("grpcio", 1, 400.0, 8.5),
        run("ours", 2, 600.0, 5.0),  # its direct one broke
    ]  # fmt: skip
    ours = report.summarise(runs, WORKLOAD)["ours"]["unary"]
    assert (ours["cpu_us_per_request"], ours["range"]) == (600.0, [500.0, 700.0])
    assert (ours["added_p50_ms"], ours["added_p99_ms"]) == (0.75, 1.5)
    assert "added_p50_ms" not in report.summarise(runs, WORKLOAD)["grpcio"]["unary"]


def test_goals_are_reached_missed_or_not_measured() -> None:
    runs = [run("ours", 0, 599.0, 1.0), run("grpcio", 0, 300.0, 1.0), run("ours", 0, 121.0, 1.0, "paced")]
    lines = report.goals(report.summarise(runs, WORKLOAD), WORKLOAD)
    verdicts = {line.split()[1]: line.rpartition(": ")[2] for line in lines}
    assert verdicts == {
        "unary": "reached", "closed": "not measured", "paced": "missed", "saturated": "not measured",
        "added_p50_ms": "reached",
    }  # fmt: skip
    assert "| ours | 599 | - | 121 |" in report.table(report.summarise(runs, WORKLOAD))


@pytest.mark.parametrize("shrunk", [False, True])
def test_the_workload_names_what_there_is(shrunk: bool) -> None:
    workload = bench.shrunk(WORKLOAD) if shrunk else WORKLOAD
    known = bench.Starter(Path(), None).known
    assert set(workload["contenders"]) <= set(known)
    assert {*workload["direct"], *workload["direct"].values()} <= set(known)
    assert set(workload["scenarios"]) <= set(report.COSTS)
