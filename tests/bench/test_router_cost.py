"""What ops/bench/router makes of its runs."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from ops.bench.router import __main__ as bench
from ops.bench.router import cases, cold, load, report, usage, waking

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
        "added_p50_ms": "reached", "rates": "not measured",
    }  # fmt: skip
    assert "| ours | 599 | - | 121 |" in report.table(report.summarise(runs, WORKLOAD))


@pytest.mark.parametrize("shrunk", [False, True])
def test_the_workload_names_what_there_is(shrunk: bool) -> None:
    workload = bench.shrunk(WORKLOAD) if shrunk else WORKLOAD
    known = bench.Starter(Path(), None).known
    assert set(workload["contenders"]) <= set(known)
    assert {*workload["direct"], *workload["direct"].values()} <= set(known)
    assert set(workload["scenarios"]) <= {*report.COSTS, *cases.PROCESSES, "rates"}
    assert {scenario["kind"] for scenario in workload["scenarios"].values()} <= set(load.KINDS)
    assert set(workload["limited"]) <= set(known)


@pytest.mark.parametrize("name", WORKLOAD["cases"])
def test_a_case_is_part_of_the_workload(name: str) -> None:
    case = bench.of_case(WORKLOAD, name)
    assert set(case["contenders"]) <= set(WORKLOAD["contenders"])
    assert case["scenarios"].items() <= WORKLOAD["scenarios"].items()
    for scenario in case["scenarios"].values():
        assert set(case["contenders"]) == set(scenario["only"])


def at_rates(contender: str, number: int, costs: dict[int, float | None]) -> dict[str, Any]:
    """A run whose rates without a cost are those that the load did not keep up with."""
    found = {f"requests_at_{rate}": 100 for rate in costs} | {f"lag_p90_ms_at_{rate}": 3.0 for rate in costs}
    found |= {f"us_at_{rate}": cost for rate, cost in costs.items() if cost is not None}
    return {"contender": contender, "scenario": "rates", "round": number} | found


def test_a_rate_counts_when_the_load_kept_up_with_it_in_every_round() -> None:
    runs = [
        at_rates("ours", 0, {50: 1800.0, 400: 700.0, 800: 500.0}),
        at_rates("ours", 1, {50: 1600.0, 400: 590.0, 800: None}),
        at_rates("ours", 2, {50: 2000.0, 400: 550.0, 800: 400.0}),
    ]
    summary = report.summarise(runs, WORKLOAD)
    assert cases.curve(summary, "ours") == {50: 1800.0, 400: 590.0}
    assert cases.rate_goal(summary, "ours", 600).endswith("1,800 at 50/s, 590 at 400/s (goal 600): reached at 400/s")
    assert cases.rate_goal(summary, "ours", 500).endswith("missed")
    assert cases.rate_goal(summary, "ours", 2000).endswith("reached")
    assert "| ours | 1,800 | 590 | - | 3.0 / 3.0 / 3.0 |" in cases.tables(summary)


def paced(contender: str, number: int, cost: float, machine_cores: float = 1.0) -> dict[str, Any]:
    return {
        "contender": contender, "scenario": "processes_paced", "round": number, "cpu_us_per_token": cost,
        "machine_cores": machine_cores, "tokens_per_message": 1.0,
    }  # fmt: skip


def test_processes_are_compared_within_a_round_and_only_while_cores_are_free() -> None:
    goals = {"processes_paced": 1.15, "processes_closed": 1.15}
    runs = [paced("ours", 0, 50.0), paced("ours_4", 0, 55.0), paced("ours", 1, 80.0), paced("ours_4", 1, 84.0),
            paced("ours", 2, 50.0), paced("ours_4", 2, 90.0), paced("ours_2", 0, 500.0), paced("ours_4", 3, 900.0)]  # fmt: skip
    found = cases.linear_goals(runs, goals, cores=2)
    assert found["processes_paced"] == {"ratio": 1.1, "goal": 1.15, "verdict": "reached"}
    assert found["processes_closed"]["verdict"] == "not measured"
    assert cases.linear_goals(runs, {"processes_paced": 1.05}, cores=2)["processes_paced"]["verdict"] == "missed"
    full = [*runs, paced("ours_4", 4, 50.0, machine_cores=1.95), paced("ours", 4, 50.0)]
    assert "cores were full" in str(cases.linear_goals(full, goals, cores=2)["processes_paced"]["verdict"])
    assert cases.panels(report.summarise(runs, WORKLOAD)) == ["processes_paced"]


def test_what_is_for_each_process_grows_with_them() -> None:
    scenario = {"each": {"streams": 64, "connections": 16}, "pace_ms": 30}
    assert load.for_each(scenario, 4) == scenario | {"streams": 256, "connections": 64}
    assert load.for_each({"streams": 64}, 4) == {"streams": 64}


def test_the_parent_is_counted_and_serves_nobody() -> None:
    target = load.Target([10, 11, 12], 10)
    assert (target.serving, load.Target([10]).serving) == ([11, 12], [10])
    spent = load.Spent([0.2, 0.3], 0.1, 1.5, 2.0)
    assert spent.figures() == pytest.approx(
        {"cores": 0.3, "busiest_share": 0.5, "parent_us_s": 50_000, "machine_cores": 0.75}
    )


async def test_arrivals_say_how_late_they_left() -> None:
    class Answering:
        async def whole(self, _how: tuple[int, int]) -> None:
            await asyncio.sleep(0)

    arrivals = load.Arrivals(Answering(), random.Random(7))  # type: ignore[arg-type]
    sent = await arrivals.phase(1000, 0.05)
    assert 0 < sent == len(arrivals.taken_s) == len(arrivals.lag_s)
    assert all(0 <= lag <= taken for lag, taken in zip(sorted(arrivals.lag_s), sorted(arrivals.taken_s), strict=True))


def test_cpu_time_counts_threads_that_live_and_those_that_have_ended(tmp_path: Path, monkeypatch: Any) -> None:
    class Proc:
        """/proc of process 5: ticks by /proc/5/stat, nanoseconds by thread."""

        def set(self, ticks: int, threads: dict[int, int]) -> None:
            (tmp_path / "5/task").mkdir(parents=True, exist_ok=True)
            (tmp_path / "5/stat").write_text("5 (a) b) S " + " ".join(["0"] * 10) + f" {ticks} 0 0")
            for folder in (tmp_path / "5/task").iterdir():
                (folder / "schedstat").unlink()
            for thread, nanoseconds in threads.items():
                (tmp_path / f"5/task/{thread}").mkdir(exist_ok=True)
                (tmp_path / f"5/task/{thread}/schedstat").write_text(f"{nanoseconds} 7 9\n")

    monkeypatch.setattr(usage, "PROC", tmp_path)
    tick_ns = 10**9 // usage.TICKS
    proc = Proc()
    proc.set(100, {5: 40 * tick_ns, 6: 60 * tick_ns})
    cpu = usage.CpuTime([5])
    proc.set(101, {5: 40 * tick_ns, 6: 60 * tick_ns + 12_345})
    assert cpu.seconds() == pytest.approx(12_345e-9)  # less than a tick is seen
    proc.set(150, {5: 50 * tick_ns, 7: 5 * tick_ns})  # 6 ended, having run for 35 ticks more
    assert cpu.seconds() == pytest.approx(50 / usage.TICKS)


def test_the_work_between_pauses_is_a_call_and_is_done_as_often_as_said() -> None:
    calls = cold.CallsInMemory()
    assert min(calls.call() for _ in range(300)) > 30 + 3 * 9  # a message and three frames' heads, each time
    done: list[int] = []
    found = cold.after_pauses((0.0, 0.5), times=3, work=lambda: done.append(1))
    assert list(found) == ["0", "0.5"]
    assert len(done) == cold.TIMES_BEFORE + 2 * 2 * 3


def test_writes_that_wake_a_reader_are_timed_after_each_pause_and_at_once() -> None:
    found = waking.after_sleeps((0.5, 1.0), times=3)
    assert list(found) == ["0.5", "1", "at once"]
    assert min(found.values()) > 0.0


def test_the_error_of_a_broken_load_is_told_with_its_status() -> None:
    told = (
        "future: <Task exception=ValueError>\nTraceback (most recent call last):\n  File x\n"
        "grpc.aio._call.AioRpcError: <AioRpcError of RPC that terminated with:\n\tstatus = StatusCode.UNAVAILABLE\n>\n"
    )
    assert bench.last_error(told).endswith("terminated with: status = StatusCode.UNAVAILABLE >")
    assert bench.last_error("killed") == "the load broke"
