"""cluster/v1 is what protos/ says: regenerate and compare."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "cluster" / "v1"


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("protos")
    env = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(
        [ROOT / "ops" / "protos", out], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return out / "cluster" / "v1"


def test_the_same_files_are_there(generated: Path) -> None:
    committed = {path.name for path in COMMITTED.iterdir() if path.is_file()} - {"__init__.py"}
    assert committed == {path.name for path in generated.iterdir()}


def test_their_contents_are_the_same(generated: Path) -> None:
    differ = [path.name for path in generated.iterdir() if path.read_bytes() != (COMMITTED / path.name).read_bytes()]
    assert differ == [], "run ops/protos"


def test_every_proto_was_generated() -> None:
    names = {path.stem for path in (ROOT / "protos" / "cluster" / "v1").glob("*.proto")}
    assert names
    assert {f"{name}_pb2.py" for name in names} <= {path.name for path in COMMITTED.iterdir()}
