"""ops/demo's own course, with a stand-in for the program: what it calls, in which order, and how it ends."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from cluster.telemetry.exposition import MetricsServer
from cluster.telemetry.metrics import EngineMetrics, RouterMetrics

ROOT = Path(__file__).parents[3]
PROGRAM = """#!{python}
import json, os, sys
if sys.argv[1] == "-c":
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
command = sys.argv[3]
with open({calls!r}, "a") as calls:
    calls.write(" ".join(sys.argv[3:]) + "\\n")
if "--json" in sys.argv:
    print(json.dumps({{"processes": [
        {{"kind": "controller", "ports": {{"grpc": 1, "metrics": {port}}}}},
        {{"kind": "router", "ports": {{"grpc": 50999, "metrics": {port}}}}},
        {{"kind": "rank", "ports": {{"engine": 2, "metrics": {port}}}}},
        {{"kind": "rank"}},
    ]}}))
sys.exit(3 if command == {fails!r} else 0)
"""


@pytest.fixture
def metrics() -> Iterator[MetricsServer]:
    registry = CollectorRegistry()
    RouterMetrics(registry).requests.labels("demo", "completed").inc(4)
    EngineMetrics(registry).generation_tokens.inc(192)
    server = MetricsServer(registry, "127.0.0.1", 0)
    yield server
    server.close()


@pytest.fixture
def demo(tmp_path: Path, metrics: MetricsServer):
    def demo(*arguments: str, fails: str = "") -> tuple[subprocess.CompletedProcess[str], list[str]]:
        (tmp_path / "ops").mkdir()
        shutil.copy(ROOT / "ops" / "demo", tmp_path / "ops")
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        calls = tmp_path / "calls"
        program = PROGRAM.format(python=sys.executable, calls=str(calls), port=metrics.port, fails=fails)
        for file, text in ((".venv/bin/python", program), ("ops/setup", "#!/bin/sh\n")):
            (tmp_path / file).write_text(text)
            (tmp_path / file).chmod(0o755)
        result = subprocess.run(
            [tmp_path / "ops" / "demo", *arguments], cwd="/", capture_output=True, text=True, timeout=60, check=False
        )
        made = calls.read_text().splitlines() if calls.exists() else []
        for call in made:
            if "--run-dir" in call:
                shutil.rmtree(call.partition("--run-dir ")[2].split()[0], ignore_errors=True)
        return result, made

    return demo


def commands(calls: list[str]) -> list[str]:
    return [call.split()[0] for call in calls if "--json" not in call]


def test_the_whole_road(demo) -> None:
    result, calls = demo()
    assert result.returncode == 0, result.stderr
    assert commands(calls) == ["serve", *["generate"] * 4, "status", "stop"]
    assert calls[0].startswith("serve demo --replicas 2 -tp 2 --detach --run-dir /tmp/")
    assert all("--address 127.0.0.1:50999" in call for call in calls if call.startswith("generate"))
    assert 'cluster_router_requests_total{model="demo",outcome="completed"} 4.0' in result.stdout
    assert "cluster_engine_generation_tokens_total 192.0" in result.stdout
    assert "demo: done in" in result.stdout


def test_keep_leaves_it_up_and_says_how_to_go_on(demo) -> None:
    result, calls = demo("--keep")
    assert result.returncode == 0, result.stderr
    assert "stop" not in commands(calls)
    assert "--address 127.0.0.1:50999" in result.stdout
    assert "llm-cluster stop --run-dir /tmp/" in result.stdout


@pytest.mark.parametrize("fails", ["serve", "generate", "status"])
def test_a_failure_stops_what_was_started_and_is_told(demo, fails: str) -> None:
    result, calls = demo("--keep", fails=fails)
    assert result.returncode != 0
    assert commands(calls)[-1] == "stop"
    assert "demo: failed" in result.stderr


def test_a_stop_that_fails_is_a_failure(demo) -> None:
    result, _ = demo(fails="stop")
    assert result.returncode != 0


def test_unknown_options_start_nothing(demo) -> None:
    result, calls = demo("--kep")
    assert result.returncode == 2
    assert calls == []
