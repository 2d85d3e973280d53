"""Is a machine fit to serve? Pure: facts in, verdicts out, each with its fix."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.domain.quantities import GIB, MIB, format_bytes

# DeepSpeed's shared-memory all-reduce takes 69 MB for each rank; Ray's object store lives there too.
SHM_FAIL_BYTES = 256 * MIB
SHM_WARN_BYTES = 1 * GIB
NOFILE_FAIL = 1024
NOFILE_WARN = 8192
MEMORY_WARN_BYTES = 4 * GIB
_SHM = "/dev/shm"  # noqa: S108 - asked about, not written to


class Verdict(enum.StrEnum):
    """FAIL: it will not serve. WARN: it will, but less well or only with other settings."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Role(enum.StrEnum):
    """What a machine is to run. A worker has what all of them need."""

    ROUTER = "router"
    CONTROLLER = "controller"
    WORKER = "worker"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report; ``fix`` is empty when all is well."""

    name: str
    verdict: Verdict
    finding: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class PortFact:
    """``fixed``: the process refuses to start when it is taken; otherwise the next free port is used."""

    name: str
    port: int
    taken: bool
    fixed: bool


@dataclass(frozen=True, slots=True)
class PackageFact:
    """An installed package; ``version`` is None when it is missing, ``wanted`` the range that we ask for."""

    name: str
    version: str | None
    wanted: str
    suits: bool


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """What was found.

    ``gpus``: one name each, None when no driver answers. ``shm_free_bytes``: None without /dev/shm.
    """

    python_version: tuple[int, int]
    packages: tuple[PackageFact, ...]
    compiler: str | None
    shared_memory_op: str | None
    cpu_kernels: str | None
    shm_free_bytes: int | None
    ports: tuple[PortFact, ...]
    gpus: tuple[str, ...] | None
    cpu_cores: int
    memory_bytes: int
    open_files_limit: int
    run_dir: str
    run_dir_problem: str = ""


def judge(facts: MachineFacts) -> tuple[Check, ...]:
    """Every check, in the order in which to mend things."""
    return (
        _python(facts.python_version),
        *(_package(package) for package in facts.packages),
        _devices(facts),
        _memory(facts.memory_bytes),
        _compiler(facts.compiler),
        _shared_memory_op(facts),
        _cpu_kernels(facts),
        _shm(facts.shm_free_bytes),
        _open_files(facts.open_files_limit),
        _run_dir(facts),
        *(_port(port) for port in facts.ports),
    )


def counts(checks: tuple[Check, ...]) -> Mapping[Verdict, int]:
    return {verdict: sum(check.verdict is verdict for check in checks) for verdict in Verdict}


def _python(version: tuple[int, int]) -> Check:
    found = f"{version[0]}.{version[1]}"
    if version >= (3, 11):
        return Check("python", Verdict.OK, found)
    return Check("python", Verdict.FAIL, found, "Use Python 3.11 or newer.")


def _package(package: PackageFact) -> Check:
    if package.version is None:
        return Check(
            package.name,
            Verdict.FAIL,
            "not installed",
            f"Run ops/setup, or pip install '{package.name}{package.wanted}'.",
        )
    if package.suits:
        return Check(package.name, Verdict.OK, package.version)
    fix = f"Install a version in {package.wanted}: pip install '{package.name}{package.wanted}'."
    return Check(package.name, Verdict.FAIL, package.version, fix)


def _devices(facts: MachineFacts) -> Check:
    cores = f"{facts.cpu_cores} CPU core{'s' if facts.cpu_cores != 1 else ''}"
    if facts.gpus:
        return Check("devices", Verdict.OK, f"{len(facts.gpus)} x {facts.gpus[0]}, {cores}")
    if facts.gpus is not None:
        return Check("devices", Verdict.WARN, f"driver without a GPU, {cores}", "Check the driver with nvidia-smi.")
    if facts.cpu_cores >= 2:
        return Check("devices", Verdict.OK, f"no GPU, {cores}: ranks run on the CPU")
    return Check("devices", Verdict.WARN, f"no GPU, {cores}", "Give it 2 cores or more: every CPU rank wants its own.")


def _memory(amount: int) -> Check:
    if amount >= MEMORY_WARN_BYTES:
        return Check("memory", Verdict.OK, format_bytes(amount))
    fix = f"A cluster of two small ranks wants {format_bytes(MEMORY_WARN_BYTES)}; use fewer ranks or more memory."
    return Check("memory", Verdict.WARN, format_bytes(amount), fix)


def _compiler(compiler: str | None) -> Check:
    if compiler:
        return Check("C++ compiler", Verdict.OK, compiler)
    fix = "Install g++ (Debian, Ubuntu: apt install g++) and run ops/setup again; without it CPU ranks use gloo."
    return Check("C++ compiler", Verdict.WARN, "none", fix)


def _shared_memory_op(facts: MachineFacts) -> Check:
    name = "shared-memory all-reduce"
    if facts.shared_memory_op:
        return Check(name, Verdict.OK, facts.shared_memory_op)
    if facts.gpus:
        return Check(name, Verdict.OK, "not built; GPUs use NCCL")
    fix = "Run ops/setup: it compiles it once; until then CPU ranks use gloo, up to 100 times slower per call."
    return Check(name, Verdict.WARN, "not built", fix)


def _cpu_kernels(facts: MachineFacts) -> Check:
    name = "CPU kernels"
    if facts.cpu_kernels:
        return Check(name, Verdict.OK, facts.cpu_kernels)
    if facts.gpus:
        return Check(name, Verdict.OK, "not built; GPUs need none")
    fix = "Run ops/setup: it compiles them in seconds; until then CPU ranks use slower operations of torch."
    return Check(name, Verdict.WARN, "not built for this processor", fix)


def _shm(free: int | None) -> Check:
    if free is None:
        return Check(_SHM, Verdict.FAIL, "missing", "Mount a tmpfs at /dev/shm (containers: --shm-size=2g).")
    if free >= SHM_WARN_BYTES:
        return Check(_SHM, Verdict.OK, f"{format_bytes(free)} free")
    fix = "Free some, or make it larger (mount -o remount,size=2G /dev/shm; containers: --shm-size=2g)."
    return Check(_SHM, Verdict.WARN if free >= SHM_FAIL_BYTES else Verdict.FAIL, f"{format_bytes(free)} free", fix)


def _open_files(limit: int) -> Check:
    if limit >= NOFILE_WARN:
        return Check("open files", Verdict.OK, str(limit))
    fix = f"Raise it: ulimit -n {NOFILE_WARN} (Ray opens hundreds of files and sockets)."
    return Check("open files", Verdict.WARN if limit >= NOFILE_FAIL else Verdict.FAIL, str(limit), fix)


def _run_dir(facts: MachineFacts) -> Check:
    if facts.run_dir_problem:
        return Check("run directory", Verdict.FAIL, facts.run_dir, facts.run_dir_problem)
    return Check("run directory", Verdict.OK, facts.run_dir)


def _port(port: PortFact) -> Check:
    name = f"port {port.port} ({port.name})"
    if not port.taken:
        return Check(name, Verdict.OK, "free")
    if port.fixed:
        fix = (
            f"Stop who listens there (llm-cluster stop, if it is yours), or set LLM_CLUSTER_{port.name.upper()}__PORT."
        )
        return Check(name, Verdict.FAIL, "taken", fix)
    return Check(name, Verdict.WARN, "taken", "Nothing to do: the next free port is used.")
