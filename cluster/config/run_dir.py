"""The run directory: state, logs, sockets and process ids of one local cluster, for its owner's eyes only."""

from __future__ import annotations

import fcntl
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
        candidate = Path(runtime) / "llm-cluster"
        if len(os.fsencode(candidate)) <= MAX_RUN_DIR_BYTES:
            return candidate
    return Path(f"/tmp/llm-cluster-{os.getuid() if uid is None else uid}")  # noqa: S108 - owner and mode are checked


def open_run_dir(path: Path) -> Path:
    """Makes ``path`` with mode 0700 when it is not there, and returns it absolute.

    ConfigError when it is too long for Ray's sockets, belongs to somebody else, or others may write to it.
    """
    path = path.expanduser().absolute()
    check_run_dir_length(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ConfigError(
            f"The run directory {path} cannot be made: {error.strerror}; choose another with --run-dir."
        ) from error
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"The run directory {path} is no directory; choose another with --run-dir.")
    if found.st_uid != os.getuid():
        raise ConfigError(f"The run directory {path} belongs to another user; choose another with --run-dir.")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"Others may write to the run directory {path}; say 'chmod 700 {path}'.")
    return path


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


def check_run_dir_length(path: Path) -> None:
    """ConfigError when Ray's unix sockets below ``path`` would have too long a name."""
    length = len(os.fsencode(path))
    if length > MAX_RUN_DIR_BYTES:
        raise ConfigError(
            f"The run directory {path} has {length} bytes in its name and Ray's sockets below it allow "
            f"{MAX_RUN_DIR_BYTES}; choose a shorter one with --run-dir."
        )
