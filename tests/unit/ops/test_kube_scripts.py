from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ops.kube.control_plane import CANNOT_BE_HAD, ControlPlane, UnavailableError, free_ports

ROOT = Path(__file__).parents[3]
BUILD, UP = ROOT / "ops/kube/build", ROOT / "ops/kube/up"


def run(script: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [script, *arguments],
        env={**os.environ, **env},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("script", [BUILD, UP], ids=lambda path: path.name)
def test_help_works_from_anywhere(script: Path) -> None:
    result = run(script, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith(f"Usage: ops/kube/{script.name}")


@pytest.mark.parametrize("script", [BUILD, UP], ids=lambda path: path.name)
def test_an_unknown_option_is_one_sentence(script: Path) -> None:
    result = run(script, "--fast")
    assert result.returncode == 2
    assert "no option '--fast'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_what_is_not_built_is_said_and_not_built(tmp_path: Path) -> None:
    result = run(BUILD, "--print", XDG_CACHE_HOME=str(tmp_path))
    assert result.returncode == CANNOT_BE_HAD
    assert result.stderr == "kube/build: Kubernetes is not built here yet; run ops/kube/build (minutes, once).\n"
    assert list(tmp_path.iterdir()) == []


def test_without_debian_it_says_what_to_do_instead(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "env", "sed", "sha256sum", "cut", "uname"):
        (programs / name).symlink_to(shutil.which(name))
    result = run(BUILD, PATH=str(programs), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert result.returncode == CANNOT_BE_HAD
    assert "this machine has no apt-get; give a cluster by KUBECONFIG instead" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_control_plane_that_cannot_be_had_gives_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UnavailableError, match="not built here yet"):
        ControlPlane(build=False).__enter__()


def test_ports_are_all_different() -> None:
    assert len(set(free_ports(50))) == 50
