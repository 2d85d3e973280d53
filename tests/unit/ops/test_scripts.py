from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPTS = [ROOT / "ops" / name for name in ("setup", "test", "check", "demo", "protos")] + [ROOT / ".ci" / "run"]


def run(script: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [script, *arguments], env=env, cwd="/", capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
class TestEveryScript:
    def test_is_executable_and_is_bash(self, script: Path) -> None:
        assert os.access(script, os.X_OK)
        assert subprocess.run(["bash", "-n", script], timeout=10, check=False).returncode == 0

    def test_stops_at_unset_variables(self, script: Path) -> None:
        assert re.search(r"^set -e?uo pipefail$", script.read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", ["setup", "test", "demo"])
def test_help_works_from_anywhere_with_a_bare_environment(name: str) -> None:
    result = run(ROOT / "ops" / name, "--help", env={"PATH": os.environ["PATH"]})
    assert result.returncode == 0
    assert result.stdout.startswith(f"Usage: ops/{name}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--devise", "cpu"], "no option '--devise'"),
        (["--device", "tpu"], "auto, cpu or cuda, not 'tpu'"),
        (["--device"], "wants a value"),
    ],
)
def test_setup_says_what_is_wrong_in_one_sentence(arguments: list[str], said: str) -> None:
    result = run(ROOT / "ops" / "setup", *arguments)
    assert result.returncode == 1
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def bare_checkout(tmp_path: Path) -> Path:
    """What set-up reads, in a folder of its own, without an environment."""
    read = ("ops/setup", "ops/compile-shared-memory-op", "ops/compile-cpu-kernels", "cluster/engine/model/kernels.cpp")
    for name in (*read, "pyproject.toml", "constraints.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "ops" / "setup").chmod(0o755)
    return tmp_path


def bare_tools(folder: Path, *names: str) -> str:
    """A PATH with nothing on it but the named tools."""
    folder.mkdir()
    for name in names:
        found = next(Path(part) / name for part in os.defpath.split(":") if part and (Path(part) / name).exists())
        (folder / name).symlink_to(found)
    return str(folder)


def test_setup_without_python_says_so(bare_checkout: Path, tmp_path: Path) -> None:
    path = bare_tools(tmp_path / "bin", "bash", "env", "dirname", "cksum", "cat", "flock", "awk", "df", "grep")
    result = run(bare_checkout / "ops" / "setup", "--device", "cpu", env={"PATH": path, "HOME": str(tmp_path)})
    assert result.returncode == 1
    assert "no Python 3.11, 3.12 or 3.13 found" in result.stderr
    assert not (bare_checkout / ".venv").exists()


def test_setup_with_an_unsuitable_python_says_so(bare_checkout: Path) -> None:
    env = {"PATH": os.environ["PATH"], "LLM_CLUSTER_PYTHON": "/bin/false"}
    result = run(bare_checkout / "ops" / "setup", "--device", "cpu", env=env)
    assert result.returncode == 1
    assert "LLM_CLUSTER_PYTHON (/bin/false)" in result.stderr


def test_setup_in_a_path_with_a_space_says_so(bare_checkout: Path) -> None:
    moved = bare_checkout.parent / "with space"
    bare_checkout.rename(moved)
    result = run(moved / "ops" / "setup", "--device", "cpu")
    assert result.returncode == 1
    assert "move the checkout" in result.stderr


def test_the_constraints_are_exact_and_cover_what_we_ask_for() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==(\d+!)?[A-Za-z0-9_.]+", line)] == []
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    quoted = re.findall(r'^  "([A-Za-z0-9_.-]+)[><=;]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in quoted} - pinned == set()
