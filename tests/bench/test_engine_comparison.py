"""The benchmark's own parts: its processes with a driver of no model at all, its figures, its bound."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from ops.bench.engine import report
from ops.bench.engine.processes import DRIVERS, Contender, ContenderError
from ops.bench.engine.roofline import Machine, bound_tokens_s

DEADLINE_S = 20.0
CHATTY = """
import subprocess, sys, time
from wire import Request, drive

def start(config):
    print("noise that a library would print")
    if config["fail"]:
        raise ValueError("no")
    subprocess.Popen([sys.executable, "-c", "import time; print('child', flush=True)\\nwhile True: pass"])
    def run(job):
        found = []
        for prompt in job.prompts:
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


def test_ratios_are_of_the_same_round(tmp_path: Path) -> None:
    # A slow machine in round 1: rates differ, the ratio does not.
    runs = [
        run_of("ours", 0, 200),
        run_of("vllm_compiled", 0, 100),
        run_of("ours", 1, 60),
        run_of("vllm_compiled", 1, 30),
    ]
    runs += [run_of("ours", 2, 210), run_of("vllm_compiled", 2, 70, same=0.5)]
    found = report.summarise(runs, {"ours": [9, 11, 10], "vllm_compiled": [40]}, {8: 400.0})
    ours = found["ours"]["by_concurrency"][8]
    assert ours["over_vllm_compiled"] == 2.0
    assert ours["output_tokens_s"] == 200
    assert ours["output_tokens_s_range"] == [60, 210]
    assert ours["share_of_roofline"] == 0.5
    assert found["ours"]["start_up_over_vllm_compiled"] == 0.25
    assert found["vllm_compiled"]["by_concurrency"][8]["same_tokens"] == 0.5
    lines = report.table(found).splitlines()
    assert len({line.count("|") for line in lines}) == 1, "one number of columns"
    result = {
        "summary": found, "roofline": {"bound_tokens_s": {8: 400.0}}, "workload": {"requests": {8: 1}, "dtype": "float32"},
        "machine": {"cpu": "x", "cores_used": 2}, "commit": "0" * 40, "modified": False, "date": "today",
    }  # fmt: skip
    report.plot(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_without_vllm_there_is_no_ratio() -> None:
    found = report.summarise([run_of("ours", 0, 200, same=None)], {"ours": [9]}, {8: 400.0})
    assert found["ours"]["by_concurrency"][8]["over_vllm_compiled"] is None
    assert found["ours"]["start_up_over_vllm_compiled"] is None
    assert "| - |" in report.table(found)


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
