"""Names a process so that it is found again, or known to be gone: process ids are used again and again."""

from __future__ import annotations

import psutil

# Both come from the kernel's ticks; only the arithmetic may differ.
_SAME_S = 0.005


def started_s(process: psutil.Process) -> float:
    """When it started, in seconds since the machine did: setting the clock changes nothing about it."""
    return process.create_time() - psutil.boot_time()


def find_process(pid: int, started: float) -> psutil.Process | None:
    """The process that had this id and ``started_s``, None once it has ended."""
    try:
        process = psutil.Process(pid)
        same = abs(started_s(process) - started) < _SAME_S and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if same else None
