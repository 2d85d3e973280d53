"""Names a process so that it is found again, or known to have ended: process ids are used again and again."""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from contextlib import ExitStack, suppress

import psutil

from cluster.domain.clock import Clock, MonotonicClock

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


def outlive(processes: Sequence[psutil.Process], deadline_s: float, clock: Clock | None = None) -> list[psutil.Process]:
    """Those that still run when all have ended or ``deadline_s`` is over.

    What has ended has ended, whether or not its parent took notice: process 1 of many a container never does.
    """
    if hasattr(os, "pidfd_open"):
        with suppress(OSError):  # a kernel without it, or no descriptor left
            return _outlive(processes, deadline_s, clock or MonotonicClock())
    _, left = psutil.wait_procs(processes, timeout=deadline_s)
    return [process for process in left if _runs(process)]


def _outlive(processes: Sequence[psutil.Process], deadline_s: float, clock: Clock) -> list[psutil.Process]:
    give_up_s = clock.now() + deadline_s
    running: dict[int, psutil.Process] = {}
    ends = select.poll()
    with ExitStack() as descriptors:
        for process in processes:
            descriptor = _descriptor(process)
            if descriptor is not None:
                descriptors.callback(os.close, descriptor)
                ends.register(descriptor, select.POLLIN)
                running[descriptor] = process
        left_s = deadline_s
        while running:
            for descriptor, _ in ends.poll(left_s * 1000):
                ends.unregister(descriptor)
                del running[descriptor]
            if left_s <= 0:
                break
            left_s = max(0.0, give_up_s - clock.now())
    return list(running.values())


def _descriptor(process: psutil.Process) -> int | None:
    """Readable once the process has ended, the caller's to close; None when the process is gone."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    if process.is_running():  # and no other one of its id
        return descriptor
    os.close(descriptor)
    return None


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
