"""The run directory: state, logs, sockets and process ids of one local cluster, for its owner's eyes only."""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cluster.domain.errors import ConfigError

RUN_DIR_VARIABLE = "LLM_CLUSTER_RUN_DIR"
RAY_DIR = "ray/session"
# The longest path that Ray makes below its folder; pid and all. A socket's path may have 107 bytes.
_RAY_SOCKET = f"{RAY_DIR}/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.10"
_SOCKET_PATH_BYTES = 107
MAX_RUN_DIR_BYTES = _SOCKET_PATH_BYTES - len("/") - len(_RAY_SOCKET)


def default_run_dir(env: Mapping[str, str], uid: int | None = None) -> Path:
    """$LLM_CLUSTER_RUN_DIR, else $XDG_RUNTIME_DIR/llm-cluster, else /tmp/llm-cluster-UID. Touches nothing."""
    if chosen := env.get(RUN_DIR_VARIABLE):
        return Path(chosen)
    if runtime := env.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "llm-cluster"
    return Path(f"/tmp/llm-cluster-{os.getuid() if uid is None else uid}")  # noqa: S108 - owner and mode are checked


def open_run_dir(path: Path) -> Path:
    """Makes ``path`` with mode 0700 when it is not there, and returns it absolute.

    ConfigError when it belongs to somebody else, or others may write to it.
    """
    path = path.expanduser().absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The run directory {path} cannot be made: {error.strerror}; choose another with --run-dir."
        ) from error
    check_private(path)
    return path


def check_private(path: Path) -> None:
    """ConfigError unless ``path`` is a directory of ours that nobody else may write to."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"The run directory {path} is no directory; choose another with --run-dir.")
    if found.st_uid != os.getuid():
        raise ConfigError(f"The run directory {path} belongs to another user; choose another with --run-dir.")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"Others may write to the run directory {path}; say 'chmod 700 {path}'.")


def ray_dir(run_dir: Path) -> Path:
    """Ray's folder of a run directory: inside it, or in /tmp where the names of Ray's sockets would be too long.

    Always the same for the same run directory; ``open_ray_dir`` makes it.
    """
    inside = run_dir.resolve() / RAY_DIR
    if len(os.fsencode(run_dir.resolve())) <= MAX_RUN_DIR_BYTES:
        return inside
    name = hashlib.sha256(os.fsencode(inside)).hexdigest()[:8]
    return Path(f"/tmp/llmc-{os.getuid()}-{name}")  # noqa: S108 - owner and mode are checked


def open_ray_dir(run_dir: Path) -> Path:
    """``ray_dir``, there and ours alone.

    Ray opens its folder to everybody. Inside the run directory nobody else could reach it: it is closed again, for
    the next start.
    """
    folder = ray_dir(run_dir)
    if folder.is_relative_to(run_dir.resolve()) and folder.is_dir() and folder.lstat().st_uid == os.getuid():
        folder.chmod(0o700)
    return open_run_dir(folder)


@contextmanager
def hold_run_dir(run_dir: Path) -> Iterator[None]:
    """Nobody else starts a cluster or a node under ``run_dir`` meanwhile; ConfigError when somebody does already.

    The kernel lets go of the lock when this process ends, however it ends.
    """
    with (run_dir / "lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"Another llm-cluster process works under {run_dir}; end it first, or choose another --run-dir."
            ) from None
        yield
