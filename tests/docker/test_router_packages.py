"""The router's image is slim: what its process really loads is what its dependency group brings, and nothing else."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
# gRPC and rich look whether they are there, and do without.
OPTIONAL = {"grpcio-tools", "attrs"}
# Runs a command in a fresh interpreter and leaves the files of what was imported beyond a bare start.
WATCHED = """
import sys
bare = set(sys.modules)
import atexit, json
path = sys.argv.pop(1)
def leave():
    loaded = [getattr(m, "__file__", None) for name, m in list(sys.modules.items()) if name not in bare]
    open(path, "w").write(json.dumps(sorted({file for file in loaded if file})))
atexit.register(leave)
from cluster.cli.main import main
main(sys.argv[1:])
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@functools.cache
def owners() -> dict[str, str]:
    """Installed file -> the distribution that it belongs to."""
    found: dict[str, str] = {}
    for one in metadata.distributions():
        folder, name = os.path.realpath(one.locate_file("")), normal(one.metadata["Name"])
        found |= {f"{folder}/{file}": name for file in one.files or () if file.suffix in {".py", ".so"}}
    return found


def distributions_of(files: list[str]) -> set[str]:
    known = owners()
    found = {known[path] for file in files if (path := os.path.realpath(file)) in known}
    # An editable install lists no files of its own.
    return found | {"llm-cluster" for file in files if Path(file).is_relative_to(ROOT / "cluster")}


def closure(names: set[str]) -> set[str]:
    """The distributions that ``names`` bring with them, themselves included."""
    found: set[str] = set()
    left = {normal(name) for name in names}
    while left:
        name = left.pop()
        found.add(name)
        for line in metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left |= {normal(requirement.name)} - found
    return found


@pytest.fixture(scope="module")
def router_group() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["router"])


def loaded_by_a_router(folder: Path) -> set[str]:
    """Of a router that started, wrote down where it listens, and was told to stop."""
    record = folder / "modules.json"
    command = [sys.executable, "-c", WATCHED, str(record), "router", "--controller", "127.0.0.1:9", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--metrics-port", "0", "--run-dir", str(folder / "run")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert b'"router"' in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    return distributions_of(json.loads(record.read_text()))


def loaded_by(folder: Path, *arguments: str) -> set[str]:
    """Of a command that ends by itself."""
    record = folder / f"{arguments[0]}.json"
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(record), *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode in {0, 1}, done.stderr
    return distributions_of(json.loads(record.read_text()))


def test_the_router_loads_what_its_group_brings_and_no_more(router_group: set[str], tmp_path: Path) -> None:
    router = loaded_by_a_router(tmp_path)
    generate = loaded_by(tmp_path, "generate", "x", "--address", "127.0.0.1:9", "--timeout", "1")
    doctor = loaded_by(tmp_path, "doctor", "--role", "router")
    assert {"grpcio", "tokenizers", "uvloop"} <= router
    assert "grpcio" in generate
    loaded = router | generate | doctor
    assert loaded - closure(router_group) - OPTIONAL == {"llm-cluster"}
    assert {normal(name) for name in router_group} - loaded == set()
