"""Starts, joins and ends Ray nodes of this machine: token authentication on, bound to one address, ours to stop."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.config.process_identity import find_process, outlive, started_s
from cluster.config.run_dir import open_ray_dir, ray_dir
from cluster.config.schema import LOOPBACK
from cluster.controller.node_sweep import sweep_node
from cluster.controller.rank_marker import NODE_VARIABLE, SweepOrder
from cluster.controller.ray_token import make_or_take, read_token, take_token, token_path
from cluster.domain.errors import ConfigError, ReplicaError

OBJECT_STORE_BYTES = 100_000_000
START_DEADLINE_S = 90.0
LISTENER_DEADLINE_S = 5.0
STOP_DEADLINE_S = 2.0
# A head starts a server for remote drivers wherever it can import gRPC, and that of its dashboard, without an option
# against either. Nobody here needs those processes, their seconds of start-up, or a port that executes what it is told.
# ``ray start`` itself does without gRPC, and goes on where no dashboard could be started.
_RAY_COMMAND = """import sys; sys.modules["grpc"] = None
import ray._private.services; ray._private.services.start_api_server = lambda *_, **__: (None, None)
from ray.scripts.scripts import main; main()"""
# Named for other systems; 0 keeps a node that is told loopback on loopback.
_LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_HEAD_ONLY = frozenset({"gcs_server"})
_HEAD_PROCESSES = _HEAD_ONLY | {"raylet"}
_GCS_SILENCE_S = 3600  # tokens flow while the head is away; a raylet that waits longer gives up


@dataclass(frozen=True, slots=True)
class RayNode:
    """A Ray node that we started.

    ``address``: of the head; ``processes``: (pid, start time) of those that live as long as the node does.
    """

    address: str
    token_file: str
    processes: tuple[tuple[int, float], ...]


def start_head(
    run_dir: Path,
    *,
    num_cpus: int,
    host: str = LOOPBACK,
    port: int = 0,
    num_gpus: int | None = None,
    token_file: Path | None = None,
    object_store_bytes: int = OBJECT_STORE_BYTES,
) -> RayNode:
    """A new Ray cluster of one node, here. ``port`` 0: any; ``host``: the one address that it binds and advertises.

    ``token_file``: holds the token that nodes must show; without one a token is made here.
    """
    _require_no_node(run_dir)
    make_or_take(token_file, run_dir)
    arguments = ["--head", f"--port={port}", "--include-dashboard=false", "--no-monitor"]
    return _start(run_dir, arguments, host, num_cpus, num_gpus, object_store_bytes)


def start_worker(
    address: str,
    run_dir: Path,
    *,
    host: str,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    token_file: Path | None = None,
    object_store_bytes: int = OBJECT_STORE_BYTES,
) -> RayNode:
    """Joins the Ray cluster at ``address`` as a node; ``token_file``: a copy of the head's token."""
    _require_no_node(run_dir)
    require_reachable(address)
    take_token(token_file, run_dir, address)
    return _start(run_dir, [f"--address={address}"], host, num_cpus, num_gpus, object_store_bytes)


def require_reachable(address: str) -> None:
    """ConfigError for an address that is none, or of a head that no other node can join."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"{address!r} is no HOST:PORT; give the address of the head's Ray, such as 10.0.0.1:6379.")
    if host in (LOOPBACK, "localhost"):
        raise ConfigError(
            f"The head at {address} listens on loopback only, where no other node reaches it; start it with --host "
            "and the address that other nodes know it by."
        )


def load_node(run_dir: Path) -> RayNode | None:
    """The node that was started under ``run_dir`` and has not been stopped."""
    try:
        stored = json.loads(_record(run_dir).read_text(encoding="utf-8"))
        processes = tuple((int(pid), float(started)) for pid, started in stored["processes"])
        return RayNode(stored["address"], stored["token_file"], processes)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{_record(run_dir)} is damaged; end Ray's processes by hand and delete {run_dir}."
        ) from error


def _require_no_node(run_dir: Path) -> None:
    """ConfigError while a node runs under ``run_dir``; what is left of one that died is ended."""
    node = load_node(run_dir)
    if node is None:
        return
    if is_alive(node):
        raise ConfigError(
            f"A Ray node runs under {run_dir} already; stop it with 'llm-cluster stop', or choose another --run-dir."
        )
    stop_node(run_dir)


def is_alive(node: RayNode) -> bool:
    """Whether every process of the node still runs."""
    return all(find_process(pid, started) is not None for pid, started in node.processes)


def head_is_alive(run_dir: Path) -> bool:
    """Whether what a head cannot do without still runs; Ray's dashboard is not that."""
    node = load_node(run_dir)
    found = [find_process(pid, started) for pid, started in node.processes] if node is not None else []
    return _names(process for process in found if process is not None) >= _HEAD_PROCESSES


def _names(processes: Iterable[psutil.Process]) -> set[str]:
    """What those that still run are called."""
    names = set()
    for process in processes:
        try:
            names.add(process.name())
        except psutil.NoSuchProcess:
            continue
    return names


def connect(address: str, *, token_file: Path | None = None, namespace: str = "llm-cluster") -> None:
    """Joins this process to the Ray cluster at ``address``; ConfigError when nobody answers there."""
    if token_file is not None:
        read_token(token_file)
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file.absolute())
        os.environ.pop("RAY_AUTH_TOKEN", None)
    elif "RAY_AUTH_TOKEN_PATH" in os.environ or "RAY_AUTH_TOKEN" in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if given := os.environ.get("RAY_AUTH_TOKEN_PATH"):  # whoever inherits it may be in another folder
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(Path(given).absolute())
    _require_listener(address)
    on_loopback = address.startswith((f"{LOOPBACK}:", "localhost:"))
    if on_loopback:
        os.environ[_LOOPBACK_VARIABLE] = "0"
    import ray

    # Ray read the variable when it was first imported, which was before this call where this process started the node.
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = not on_loopback  # noqa: SLF001
    _forget_other_tokens()
    try:
        with _sigterm_kept():
            ray.init(
                address=address, namespace=namespace, log_to_driver=False, logging_level="ERROR",
                configure_logging=True, job_config=_search_path_of_workers(),
            )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"No Ray cluster can be joined at {address}: {reason}; check the address and token."
        ) from error


def _search_path_of_workers() -> Any:
    """A job whose workers look for modules where this package is, and not where the command was given.

    Ray would add this process's folder, and that of its program, and first: anything called "cluster" there, which is a
    likely name, would run instead of this package. It adds neither to a job with a folder of its own.
    """
    ray_jobs: Any = importlib.import_module("ray.job_config")
    job_config = ray_jobs.JobConfig(_py_driver_sys_path=[str(Path(__file__).parents[2])])
    job_config._runtime_env_has_working_dir = lambda: True  # noqa: SLF001 - the package's folder is that of the job
    return job_config


def _require_listener(address: str) -> None:
    """ConfigError at once where ``ray.init`` would wait for minutes. "auto" is Ray's to find."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=LISTENER_DEADLINE_S).close()
    except OSError as error:
        raise ConfigError(
            f"Nobody answers at {address} ({error}); give the HOST:PORT of a running Ray head."
        ) from error


def disconnect() -> None:
    import ray

    with _sigterm_kept():
        ray.shutdown()


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself when it joins, and when it leaves nobody has it: a process would end undrained."""
    ours = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if ours is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)


def stop_node(run_dir: Path, orphans: SweepOrder | None = None) -> int:
    """Ends exactly the processes of the node that was started under ``run_dir``; how many there were.

    With ``orphans`` it sweeps this machine afterwards: what a killed raylet or controller could not remove.
    """
    node = load_node(run_dir)
    ended = _end(node, run_dir) if node is not None else 0
    if orphans is not None:
        sweep_node(orphans)
    return ended


def _end(node: RayNode, run_dir: Path) -> int:
    doomed = _with_descendants(node)
    # A worker's raylet takes leave of its head. A head has nobody to take leave of and nothing to save, and its
    # gcs_server does not end on SIGTERM: every stop would wait out the deadline.
    first = "kill" if _names(doomed) & _HEAD_ONLY else "terminate"
    for process in doomed:
        _signal(process, first)
    left = outlive(doomed, STOP_DEADLINE_S)
    for process in left:
        _signal(process, "kill")
    left = outlive(left, STOP_DEADLINE_S)
    if left:
        raise ReplicaError(f"Ray's processes {[process.pid for process in left]} do not end; end them by hand.")
    _record(run_dir).unlink(missing_ok=True)
    folder = ray_dir(run_dir)
    if not folder.is_relative_to(run_dir.resolve()):
        shutil.rmtree(folder, ignore_errors=True)  # with a run directory of its own it would stay with the logs
    return len(doomed)


def _start(
    run_dir: Path, arguments: list[str], host: str, num_cpus: int | None, num_gpus: int | None, store_bytes: int
) -> RayNode:
    folder = open_ray_dir(run_dir)
    command = [sys.executable, "-P", "-c", _RAY_COMMAND, "start", *arguments]
    command += [f"--node-ip-address={host}", f"--object-store-memory={store_bytes}", "--disable-usage-stats"]
    command.append("--include-log-monitor=false")
    if "--head" in arguments:
        command.append(f"--temp-dir={folder}")
    command += [] if num_cpus is None else [f"--num-cpus={num_cpus}"]
    command += [] if num_gpus is None else [f"--num-gpus={num_gpus}"]
    log = run_dir / "logs" / "ray-start.log"
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with log.open("ab") as output:
        # A session of its own: Ctrl-C is ours to translate, and its members are found by their session.
        child = subprocess.Popen(
            command,
            env=_environment(run_dir, host),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    token = str(token_path(run_dir))
    try:
        code = _wait_or_kill(child)
    except BaseException:  # Ctrl-C too: what is not recorded is nobody's to stop
        _save(run_dir, RayNode("", token, _session_members(child.pid)))
        stop_node(run_dir)
        raise
    node = RayNode(_address(arguments, folder), token, _session_members(child.pid))
    _save(run_dir, node)
    if code != 0 or not node.processes or not node.address:
        stop_node(run_dir)
        raise ConfigError(f"Ray could not be started: {_last_line(log)} (the whole story is in {log}).")
    return node


def _wait_or_kill(child: subprocess.Popen[bytes]) -> int:
    """The exit code of ``ray start``, which leaves its processes behind and has so long for it."""
    try:
        importlib.import_module("ray")  # takes as long as the child takes: whoever starts a node joins it afterwards
        return child.wait(START_DEADLINE_S)
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


def _address(arguments: list[str], folder: Path) -> str:
    given = next((a.partition("=")[2] for a in arguments if a.startswith("--address=")), "")
    if given:
        return given
    try:
        return (folder / "ray_current_cluster").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""


def _environment(run_dir: Path, host: str) -> Mapping[str, str]:
    foreign = ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", _LOOPBACK_VARIABLE)
    environment = {k: v for k, v in os.environ.items() if k not in foreign}
    if token_path(run_dir).exists():
        environment.pop("RAY_AUTH_TOKEN", None)
        environment["RAY_AUTH_TOKEN_PATH"] = str(token_path(run_dir))
    environment[NODE_VARIABLE] = str(run_dir.resolve())  # the raylet hands it on to its ranks
    environment["RAY_AUTH_MODE"] = "token"
    environment["RAY_USAGE_STATS_ENABLED"] = "0"
    environment["RAY_gcs_rpc_server_reconnect_timeout_s"] = str(_GCS_SILENCE_S)
    # Its killing of the largest process has no word for why; loading checks its own memory.
    environment["RAY_memory_monitor_refresh_ms"] = "0"
    if host == LOOPBACK:
        # Otherwise Ray replaces loopback by an address of the network and listens on every interface.
        environment[_LOOPBACK_VARIABLE] = "0"
    return environment


def _forget_other_tokens() -> None:
    """Ray caches mode and token per process; this one may have been joined to another cluster before."""
    raylet: Any = importlib.import_module("ray._raylet")
    raylet.AuthenticationTokenLoader.instance().reset_cache()
    raylet.Config.initialize("")


def _record(run_dir: Path) -> Path:
    return run_dir / "ray" / "node.json"


def _save(run_dir: Path, node: RayNode) -> None:
    _record(run_dir).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = _record(run_dir).with_suffix(".new")
    draft.write_text(json.dumps(asdict(node)), encoding="utf-8")
    draft.replace(_record(run_dir))


def _session_members(session: int) -> tuple[tuple[int, float], ...]:
    """(pid, start time) of the processes that ``ray start`` left in its session, without what those started in turn.

    A raylet may be starting ranks already: they come and go, and the node lives on.
    """
    found: dict[int, tuple[int, float]] = {}
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = (process.ppid(), started_s(process))
        except (OSError, psutil.Error):
            continue
    return tuple((pid, started) for pid, (parent, started) in found.items() if parent not in found)


def _with_descendants(node: RayNode) -> list[psutil.Process]:
    roots = [process for pid, started in node.processes if (process := find_process(pid, started))]
    found: dict[int, psutil.Process] = {process.pid: process for process in roots}
    for root in roots:
        try:
            found.update({child.pid: child for child in root.children(recursive=True)})
        except psutil.NoSuchProcess:
            continue
    return list(found.values())


def _signal(process: psutil.Process, how: str) -> None:
    try:
        getattr(process, how)()
    except psutil.NoSuchProcess:
        return


def _last_line(log: Path) -> str:
    lines: list[Any] = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return str(lines[-1]) if lines else "it said nothing"
