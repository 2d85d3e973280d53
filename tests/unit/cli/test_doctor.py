from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cluster.cli import doctor, machine
from cluster.cli.fitness import (
    NOFILE_FAIL,
    SHM_FAIL_BYTES,
    SHM_WARN_BYTES,
    Check,
    MachineFacts,
    PackageFact,
    PortFact,
    Role,
    Verdict,
    judge,
)
from cluster.config.schema import ClusterConfig, RouterConfig

FIT = MachineFacts(
    python_version=(3, 11),
    packages=(PackageFact("torch", "2.13.0", ">=2.11,<2.14", suits=True),),
    compiler="/usr/bin/g++",
    shared_memory_op="/x/op.so",
    cpu_kernels="/x/x86-64-v3.so",
    shm_free_bytes=4 * 2**30,
    ports=(PortFact("router", 50051, taken=False, fixed=True),),
    gpus=None,
    cpu_cores=4,
    memory_bytes=16 * 2**30,
    open_files_limit=65536,
    run_dir="/tmp/llm-cluster-0",
)


def check_of(name: str, **changes: object) -> Check:
    checks = judge(dataclasses.replace(FIT, **changes))
    (found,) = [check for check in checks if check.name.startswith(name)]
    return found


class TestJudge:
    def test_a_fit_machine_needs_nothing(self) -> None:
        assert all(check.verdict is Verdict.OK and not check.fix for check in judge(FIT))

    @pytest.mark.parametrize(
        ("name", "changes", "verdict"),
        [
            ("python", {"python_version": (3, 10)}, Verdict.FAIL),
            ("torch", {"packages": (PackageFact("torch", None, ">=2.11", suits=False),)}, Verdict.FAIL),
            ("torch", {"packages": (PackageFact("torch", "2.0", ">=2.11", suits=False),)}, Verdict.FAIL),
            ("C++", {"compiler": None}, Verdict.WARN),
            ("shared-memory", {"shared_memory_op": None}, Verdict.WARN),
            ("CPU kernels", {"cpu_kernels": None}, Verdict.WARN),
            ("/dev/shm", {"shm_free_bytes": None}, Verdict.FAIL),
            ("/dev/shm", {"shm_free_bytes": SHM_FAIL_BYTES - 1}, Verdict.FAIL),
            ("/dev/shm", {"shm_free_bytes": SHM_WARN_BYTES - 1}, Verdict.WARN),
            ("open files", {"open_files_limit": NOFILE_FAIL - 1}, Verdict.FAIL),
            ("open files", {"open_files_limit": NOFILE_FAIL}, Verdict.WARN),
            ("memory", {"memory_bytes": 2**30}, Verdict.WARN),
            ("devices", {"cpu_cores": 1}, Verdict.WARN),
            ("devices", {"gpus": ()}, Verdict.WARN),
            ("run directory", {"run_dir_problem": "Others may write to it."}, Verdict.FAIL),
            ("port 1 ", {"ports": (PortFact("router", 1, taken=True, fixed=True),)}, Verdict.FAIL),
            ("port 1 ", {"ports": (PortFact("metrics", 1, taken=True, fixed=False),)}, Verdict.WARN),
        ],
    )
    def test_every_flaw_has_a_verdict_and_a_fix(self, name: str, changes: dict[str, object], verdict: Verdict) -> None:
        found = check_of(name, **changes)
        assert found.verdict is verdict
        assert found.fix.endswith(".")

    def test_gpus_need_no_shared_memory_op(self) -> None:
        assert check_of("shared-memory", shared_memory_op=None, gpus=("NVIDIA H100",)).verdict is Verdict.OK
        assert check_of("CPU kernels", cpu_kernels=None, gpus=("NVIDIA H100",)).verdict is Verdict.OK


class TestProbes:
    def test_a_taken_port_is_seen(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            facts = machine.probe(ClusterConfig(router=RouterConfig(port=port)), {})
        assert next(fact for fact in facts.ports if fact.name == "router").taken

    def test_versions_come_from_metadata(self) -> None:
        assert machine.package_fact("grpcio", ">=1").suits
        assert not machine.package_fact("grpcio", "<1").suits
        assert machine.package_fact("no-such-package-here", ">=1").version is None

    def test_a_role_is_asked_only_for_what_it_loads(self) -> None:
        asked = {role: {fact.name for fact in machine.probe(ClusterConfig(), {}, role).packages} for role in Role}
        assert asked[Role.ROUTER] < asked[Role.CONTROLLER] < asked[Role.WORKER]
        assert "torch" in asked[Role.WORKER] - asked[Role.CONTROLLER]
        assert "ray" in asked[Role.CONTROLLER] - asked[Role.ROUTER]

    def test_the_op_is_found_where_setup_builds_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        assert machine.probe(ClusterConfig(), {}).shared_memory_op is None
        (tmp_path / "deepspeed_shm_comm").mkdir()
        (tmp_path / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").touch()
        assert machine.probe(ClusterConfig(), {}).shared_memory_op is not None

    def test_the_kernels_are_found_where_setup_builds_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        monkeypatch.setattr("platform.machine", lambda: "aarch64")
        assert machine.probe(ClusterConfig(), {}).cpu_kernels is None
        (tmp_path / "llm_cluster_kernels").mkdir()
        (tmp_path / "llm_cluster_kernels" / "armv8-a.so").touch()
        assert machine.probe(ClusterConfig(), {}).cpu_kernels == str(tmp_path / "llm_cluster_kernels" / "armv8-a.so")

    @pytest.mark.parametrize(
        ("script", "expected"),
        [
            ("echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'; echo 'GPU 1: NVIDIA L4 (UUID: GPU-2)'",
             ("NVIDIA H100 80GB HBM3", "NVIDIA L4")),
            ("exit 9", None),
            ("true", ()),
        ],
    )  # fmt: skip
    def test_gpus_are_what_the_driver_lists(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: tuple[str, ...] | None
    ) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert machine.probe(ClusterConfig(), {}).gpus == expected

    def test_a_driver_that_hangs_is_no_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def hangs(*_: object, **__: object) -> None:
            raise subprocess.TimeoutExpired("nvidia-smi", 15)

        monkeypatch.setattr(machine.shutil, "which", lambda _: "/bin/nvidia-smi")
        monkeypatch.setattr(machine.subprocess, "run", hangs)
        assert machine.probe(ClusterConfig(), {}).gpus is None


class TestCommand:
    @pytest.fixture
    def run(self, monkeypatch: pytest.MonkeyPatch):
        app = typer.Typer()
        app.command()(doctor.doctor_command)

        def run(facts: MachineFacts, *arguments: str):
            monkeypatch.setattr(doctor, "probe", lambda *_: facts)
            return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})

        return run

    def test_a_fit_machine_ends_well(self, run) -> None:
        result = run(FIT)
        assert result.exit_code == 0
        assert "0 fail" in result.output

    def test_an_unfit_one_does_not_and_says_what_to_do(self, run) -> None:
        result = run(dataclasses.replace(FIT, shm_free_bytes=None))
        assert result.exit_code == 1
        assert "Mount a tmpfs" in result.output

    def test_json(self, run) -> None:
        result = run(dataclasses.replace(FIT, compiler=None), "--json")
        assert result.exit_code == 0
        rows = {row["name"]: row for row in json.loads(result.output)}
        assert rows["C++ compiler"]["verdict"] == "warn"

    def test_the_real_machine_can_be_judged(self, run) -> None:
        assert len(judge(machine.probe(ClusterConfig(), os.environ))) >= 15
