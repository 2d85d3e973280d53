"""ops/monitor as a user runs it: the dashboards and alerts have data on a real cluster and a real Prometheus."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def prometheus() -> str:
    found = subprocess.run(
        [ROOT / "ops" / "debian-tool", "prometheus", "prometheus"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if found.returncode == 3:
        pytest.skip(found.stderr.strip())
    return found.stdout.strip()


def running(binary: str) -> set[int]:
    return {p.pid for p in psutil.process_iter(["exe"]) if p.info["exe"] == binary}


@pytest.mark.timeout(280)
def test_every_query_has_data_on_a_real_cluster(prometheus: str, tmp_path: Path) -> None:
    before = running(prometheus)
    picture = tmp_path / "dashboard.png"
    done = subprocess.run(
        [ROOT / "ops" / "monitor", "--json", "--load-s", "25", "--picture", picture],
        capture_output=True, text=True, timeout=270, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [verdict for verdict in found if verdict["fault"]] == []
    kinds = {kind: sum(v["kind"] == kind for v in found) for kind in ("panel", "rule", "alert", "target")}
    assert kinds["panel"] > 60
    assert kinds["alert"] > 15
    assert kinds["target"] == 6  # controller, router, four ranks
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert running(prometheus) <= before
