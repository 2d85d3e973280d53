"""The benchmark's own parts: its processes with a driver of no model at all, its figures, its bound."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from ops.bench.engine import __main__ as comparison
from ops.bench.engine import report
from ops.bench.engine.processes import DRIVERS, Contender, ContenderError
from ops.bench.engine.roofline import Machine, bound_tokens_s

DEADLINE_S = 20.0
HANGS, LOSES = 1001, 1002  # as a number of new tokens
CHATTY = f"""
import subprocess, sys, time
from wire import Request, drive

HANGS, LOSES = {HANGS}, {LOSES}
"""
CHATTY += """

def start(config):
    print("noise that a library would print")
    if config.get("fail"):
        raise ValueError("no")
    subprocess.Popen([sys.executable, "-c", "import time; print('child', flush=True)\\nwhile True: pass"])
    def run(job):
        while job.new_tokens == HANGS:
            time.sleep(60)
        found = []
        for prompt in job.prompts[: 1 if job.new_tokens == LOSES else None]:
            request = Request(time.monotonic())
            request.take(prompt[: job.new_tokens])
            found.append(request)
        return found
    return run, {"python": "3"}

drive(start)
"""


def started(tmp_path: Path, *, fail: bool = False) -> Contender:
    (tmp_path / "chatty.py").write_text(CHATTY)
    config = {"fail": fail, "first_prompt": [5]}
    return Contender(
        str(tmp_path / "chatty"), Path(sys.executable), config, {"PYTHONPATH": str(DRIVERS)}, tmp_path / "log"
    )


def test_a_contender_runs_is_stopped_with_its_children_and_leaves_nobody(tmp_path: Path) -> None:
    contender = started(tmp_path)
    try:
        assert contender.versions == {"python": "3"}
        assert 0 < contender.start_up_s < DEADLINE_S
        assert "noise" in (tmp_path / "log").read_text()
        until_s = time.monotonic() + DEADLINE_S
        while contender._cpu_s() < 0.05:  # its child spins
            assert time.monotonic() < until_s
        answer = contender.run([[1, 2, 3], [4, 5, 6]], 1, 2)
        assert [request["token_ids"] for request in answer["requests"]] == [[1, 2], [4, 5]]
        contender.pause()
        members = contender._members()
        assert len(members) == 2
        while not all(state_of(pid) == "T" for pid in members):
            assert time.monotonic() < until_s
        contender.resume()
        assert contender.run([[7]], 1, 1)["requests"][0]["token_ids"] == [7]
    finally:
        contender.end()
    assert not [pid for pid in members if Path(f"/proc/{pid}").exists() and state_of(pid) != "Z"]


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_contender_that_breaks_names_its_log(tmp_path: Path) -> None:
    with pytest.raises(ContenderError, match="log"):
        started(tmp_path, fail=True)
    assert "ValueError: no" in (tmp_path / "log").read_text()


def test_a_contender_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    contender = started(tmp_path)
    members = contender._members()
    with pytest.raises(ContenderError, match="no answer within"):
        contender.run([[1]], 1, HANGS, deadline_s=0.2)
    assert not [pid for pid in members if Path(f"/proc/{pid}").exists() and state_of(pid) != "Z"]
    contender.end()  # once more costs nothing


def test_an_answer_may_come_in_pieces(tmp_path: Path) -> None:
    contender = started(tmp_path)
    try:
        prompts = [[1] * 300] * 300  # far beyond a pipe's buffer
        assert sum(len(r["token_ids"]) for r in contender.run(prompts, 1, 300)["requests"]) == 90_000
    finally:
        contender.end()


def workload_of(contenders: list[str]) -> dict:
    return {
        "checkpoint": {"vocab_size": 100}, "seed": 1, "dtype": "float32", "cpus": [0], "prompt_tokens": 3, "new_tokens": 2,
        "warm_up": {}, "requests": {1: 2, 4: 4}, "rounds": 2, "contenders": {name: {"driver": name} for name in contenders},
    }  # fmt: skip


def test_the_others_go_on_without_one_that_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Scripted:
        """Answers as told by its name; "lost" loses a request in round 1, "stubborn" does not end."""

        def __init__(self, driver: str, *_: object) -> None:
            self.driver, self.jobs = driver, 0
            self.start_up_s, self.versions = 1.0, {"python": "3"}

        def run(self, prompts: list[list[int]], concurrency: int, new_tokens: int) -> dict:
            self.jobs += 1
            if self.driver == "hung" and concurrency == 4:
                raise ContenderError("no answer within 1 s")
            lost = self.driver == "lost" and self.jobs > 2
            requests = [
                {"started_s": 1.0, "times_s": [2.0] * new_tokens, "token_ids": [1] * new_tokens} for _ in prompts
            ]
            return {"requests": requests[:-1] if lost else requests, "cpu_s": 1.0}

        def pause(self) -> None:
            log.append(f"{self.driver} paused")

        def resume(self) -> None:
            pass

        def end(self) -> None:
            log.append(f"{self.driver} ended")
            if self.driver == "stubborn":
                raise ContenderError("outlives SIGKILL")

    monkeypatch.setattr(comparison, "Contender", Scripted)
    monkeypatch.setattr(comparison.checkpoint, "make", lambda *_: tmp_path)
    names = ["hung", "lost", "stubborn", "fine"]
    found = comparison.Comparison(workload_of(names), None, tmp_path, names)
    found.run()
    rounds_of = {
        name: sorted((r["round"], r["concurrency"]) for r in found.runs if r["contender"] == name) for name in names
    }
    assert rounds_of["fine"] == rounds_of["stubborn"] == [(0, 1), (0, 4), (1, 1), (1, 4)]
    assert rounds_of["hung"] == [(0, 1)]
    assert rounds_of["lost"] == [(0, 1), (0, 4)]
    assert found.left_out == {
        "hung": "no answer within 1 s",
        "lost": "2 output tokens of 4",
        "stubborn": "outlives SIGKILL",
    }
    assert sorted(line for line in log if "ended" in line) == [f"{name} ended" for name in sorted(names)]


def request_of(started_s: float, *times_s: float) -> dict:
    return {"started_s": started_s, "times_s": list(times_s), "token_ids": list(range(len(times_s)))}


def test_measures_of_a_run() -> None:
    found = report.measures({"requests": [request_of(1.0, 1.5, 1.6, 2.0), request_of(1.2, 1.4, 3.0)], "cpu_s": 0.5})
    assert found["output_tokens"] == 5
    assert found["wall_s"] == 2.0
    assert found["output_tokens_s"] == 2.5
    assert found["cpu_ms_per_token"] == 100
    assert found["ttft_ms"] == {"p50": 200.0, "p90": 500.0, "p99": 500.0}
    assert found["itl_ms"] == {"p50": 400.0, "p90": 1600.0, "p99": 1600.0}


def run_of(contender: str, number: int, rate: float, *, same: float | None = 1.0) -> dict:
    latencies = {"p50": 1.0, "p90": 2.0, "p99": 3.0}
    return {
        "contender": contender, "round": number, "concurrency": 8, "output_tokens_s": rate, "cpu_ms_per_token": 2.0,
        "ttft_ms": latencies, "itl_ms": latencies, "same_tokens": same,
    }  # fmt: skip


WORKLOAD = {
    "pairs": {"served": ["ours", "vllm_served"], "engine": ["ours_engine", "vllm_compiled"]},
    "goal": {"pair": "engine", "start_up_pair": "served", "output_tokens_s": 1.5, "start_up": 0.25},
    "requests": {8: 1},
    "dtype": "float32",
}


def test_like_stands_beside_like_and_ratios_are_of_the_same_round(tmp_path: Path) -> None:
    # A slow machine in round 1: rates differ, the ratio does not.
    rates = {
        "ours": (200, 60, 210), "vllm_served": (100, 30, 70), "ours_engine": (300, 90), "vllm_compiled": (200, 60),
    }  # fmt: skip
    runs = [run_of(name, number, rate) for name, found in rates.items() for number, rate in enumerate(found)]
    runs[5]["same_tokens"] = 0.5
    start_ups = {"ours": [9.0, 11, 10], "vllm_served": [40.0], "ours_engine": [4.0], "vllm_compiled": [30.0]}
    summary = report.summarise(runs, start_ups, {8: 400.0})
    ours = summary["ours"]["by_concurrency"][8]
    assert ours["over"] == {"vllm_served": 2.0, "vllm_compiled": 1.0}
    assert ours["output_tokens_s"] == 200
    assert ours["output_tokens_s_range"] == [60, 210]
    assert ours["share_of_roofline"] == 0.5
    assert summary["vllm_served"]["by_concurrency"][8]["same_tokens"] == 0.5
    pairs = report.compare_pairs(runs, start_ups, WORKLOAD)
    assert pairs["served"]["output_tokens_s"] == {8: 2.0}
    assert (pairs["served"]["start_up"], pairs["served"]["start_up_goal"]) == (0.25, 0.25)
    assert (pairs["engine"]["output_tokens_s"], pairs["engine"]["output_tokens_s_goal"]) == ({8: 1.5}, 1.5)
    assert pairs["engine"]["start_up"] == 0.133
    assert pairs["engine"]["start_up_goal"] is None
    told = report.pair_table(pairs)
    assert "| served | ours / vllm_served | 2.00 | 0.25 (goal <= 0.25) |" in told
    assert "| engine | ours_engine / vllm_compiled | 1.50 (goal >= 1.5) | 0.13 |" in told
    for lines in (report.table(summary).splitlines(), told.splitlines()):
        assert len({line.count("|") for line in lines}) == 1, "one number of columns"
    result = {
        "summary": summary, "pairs": pairs, "roofline": {"bound_tokens_s": {8: 400.0}}, "workload": WORKLOAD,
        "machine": {"cpu": "x", "cores_used": 2}, "commit": "0" * 40, "modified": False, "date": "today",
    }  # fmt: skip
    report.plot(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_without_vllm_there_is_no_ratio(tmp_path: Path) -> None:
    runs, start_ups = [run_of("ours", 0, 200, same=None)], {"ours": [9.0]}
    summary, pairs = report.summarise(runs, start_ups, {8: 400.0}), report.compare_pairs(runs, start_ups, WORKLOAD)
    assert summary["ours"]["by_concurrency"][8]["over"] == {"vllm_served": None, "vllm_compiled": None}
    assert pairs["served"]["output_tokens_s"] == {8: None}
    assert pairs["served"]["start_up"] is None
    assert "| - | - |" in report.table(summary)
    assert "| - (goal >= 1.5) | - |" in report.pair_table(pairs)
    result = {
        "summary": summary, "pairs": pairs, "roofline": {"bound_tokens_s": {8: 400.0}}, "workload": WORKLOAD,
        "machine": {"cpu": "x", "cores_used": 2}, "commit": "0" * 40, "modified": False, "date": "today",
    }  # fmt: skip
    report.plot(result, tmp_path / "picture.png")


def test_the_workload_names_contenders_that_are_there() -> None:
    workload = yaml.safe_load((Path(report.__file__).with_name("workload.yaml")).read_text())
    usual = {name for name, spec in workload["contenders"].items() if not spec.get("on_demand")}
    assert {name for pair in workload["pairs"].values() for name in pair} <= usual - set(workload["quick"]["leave_out"])
    assert {workload["goal"]["pair"], workload["goal"]["start_up_pair"]} <= set(workload["pairs"])
    assert all((DRIVERS / f"{spec['driver']}.py").is_file() for spec in workload["contenders"].values())


SHAPE = {
    "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "vocab_size": 10,
}  # fmt: skip


def test_the_bound_is_that_of_memory_or_of_products() -> None:
    layer, head = 4 * 4 * 2 + 4 * 2 * 2 + 3 * 4 * 8, 40
    parameters = 2 * layer + head
    # No product costs anything: three decode steps read weights and a growing cache; the first token is the prompt's.
    memory = Machine(bandwidth_bytes_s=1000.0, gemm_flops=float("inf"), thin_gemm_flops={})
    kv_bytes = 2 * 2 * 2 * 4
    step_s = (4 * parameters + 5 * (6 + 2) * kv_bytes) / 1000
    assert bound_tokens_s(memory, SHAPE, 5, 6, 4) == pytest.approx(5 * 4 / (3 * step_s))
    products = Machine(bandwidth_bytes_s=float("inf"), gemm_flops=1000.0, thin_gemm_flops={})
    total_s = (2 * 2 * layer * 6 * 5 + 3 * 2 * parameters * 5) / 1000
    assert bound_tokens_s(products, SHAPE, 5, 6, 4) == pytest.approx(5 * 4 / total_s)


def test_help_says_what_it_needs() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "ops.bench.engine", "--help"], capture_output=True, text=True, timeout=60, check=True,
        cwd=Path(report.__file__).parents[3],
    ).stdout  # fmt: skip
    assert "--vllm-python" in told
    assert "METHODOLOGY.md" in told
