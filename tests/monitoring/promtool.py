"""Debian's promtool, or a skip that says why there is none."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    found = subprocess.run(
        [ROOT / "ops" / "debian-tool", "prometheus", "promtool"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if found.returncode == 3:
        pytest.skip(found.stderr.strip())
    assert found.returncode == 0, found.stderr
    return subprocess.run(
        [found.stdout.strip(), *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
