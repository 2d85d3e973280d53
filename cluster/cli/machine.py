"""Probes: what this machine has. Nothing heavy is imported, nothing is changed, every wait has an end."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from cluster.cli.fitness import MachineFacts, PackageFact, PortFact, Role
from cluster.config.listening import can_listen
from cluster.config.run_dir import check_private, default_run_dir
from cluster.config.schema import ClusterConfig
from cluster.domain.errors import ConfigError
from cluster.engine import cpu_kernels, shm_kernel

DISTRIBUTION = "llm-cluster"
# What a process of each role loads: an image of that role has no more (dependency groups of the same names).
PACKAGES = {
    Role.ROUTER: ("grpcio", "tokenizers"),
    Role.CONTROLLER: ("ray", "grpcio", "tokenizers"),
    Role.WORKER: ("torch", "deepspeed", "ray", "transformers", "grpcio", "safetensors", "tokenizers"),
}
NVIDIA_SMI_DEADLINE_S = 15.0


def probe(config: ClusterConfig, env: Mapping[str, str], role: Role = Role.WORKER) -> MachineFacts:
    """Everything that ``judge`` wants to know."""
    run_dir = Path(config.run_dir) if config.run_dir else default_run_dir(env)
    return MachineFacts(
        python_version=(sys.version_info.major, sys.version_info.minor),
        packages=tuple(package_fact(name, wanted) for name, wanted in _wanted_packages(role).items()),
        compiler=_compiler(env),
        shared_memory_op=_shared_memory_op(),
        cpu_kernels=_cpu_kernels(),
        shm_free_bytes=_free_bytes(Path("/dev/shm")),  # noqa: S108 - asked about, not written to
        ports=_ports(config),
        gpus=_gpus(),
        cpu_cores=_cpu_cores(),
        memory_bytes=psutil.virtual_memory().total,
        open_files_limit=_open_files_limit(),
        run_dir=str(run_dir),
        run_dir_problem=_run_dir_problem(run_dir),
    )


def package_fact(name: str, wanted: str) -> PackageFact:
    """The installed version of ``name``, read from its metadata, against the range ``wanted``."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return PackageFact(name, None, wanted, suits=False)
    return PackageFact(
        name, version, wanted, Requirement(f"{name}{wanted}").specifier.contains(version, prereleases=True)
    )


def _wanted_packages(role: Role) -> dict[str, str]:
    """The ranges that our own metadata asks for, of what the role loads."""
    requirements = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    ranges = {requirement.name: str(requirement.specifier) for requirement in requirements}
    return {name: ranges.get(name, "") for name in PACKAGES[role]}


def _compiler(env: Mapping[str, str]) -> str | None:
    candidates = (env.get("CXX"), "c++", "g++")
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def _shared_memory_op() -> str | None:
    return str(shm_kernel.kernel_file()) if shm_kernel.is_built() else None


def _cpu_kernels() -> str | None:
    path = cpu_kernels.best_file()
    return None if path is None else str(path)


def _free_bytes(folder: Path) -> int | None:
    return shutil.disk_usage(folder).free if folder.is_dir() else None


def _ports(config: ClusterConfig) -> tuple[PortFact, ...]:
    router, controller = config.router, config.controller
    asked = (
        ("router", router.host, router.port, True),
        ("controller", controller.host, controller.port, True),
        ("engine", controller.host, controller.engine_port, False),
        ("metrics", router.host, router.metrics_port, False),
    )
    return tuple(PortFact(name, port, not can_listen(host, port), fixed) for name, host, port, fixed in asked if port)


def _gpus() -> tuple[str, ...] | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        answer = subprocess.run(
            [program, "--list-gpus"], capture_output=True, text=True, timeout=NVIDIA_SMI_DEADLINE_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    names = (re.match(r"GPU \d+: (.+?)(?: \(UUID|$)", line) for line in answer.stdout.splitlines())
    return tuple(match.group(1) for match in names if match)


def _cpu_cores() -> int:
    """Those that this process may use: a container may see more than it was given."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _open_files_limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def _run_dir_problem(run_dir: Path) -> str:
    try:
        check_private(run_dir)
    except FileNotFoundError:
        return ""  # the first serve makes it
    except (ConfigError, OSError) as error:
        return str(error)
    return ""
