"""What processes and the machine have used, from /proc."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")
_BUSY = (0, 1, 2, 5, 6)  # of /proc/stat's first line: user, nice, system, irq, softirq


class CpuTime:
    """User and system time of all threads of ``pids`` from now on.

    /proc/PID/stat counts in ticks of 10 ms, /proc/PID/task/*/schedstat in nanoseconds, but only for threads that
    still live: where the two differ by more than ticks explain, some have ended, and the ticks count.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._ticks_before, self._threads_before = _ticks(pids), _threads(pids)

    def seconds(self) -> float:
        ticked = (_ticks(self._pids) - self._ticks_before) / TICKS
        before = self._threads_before
        exact = sum(now - before.get(thread, 0) for thread, now in _threads(self._pids).items()) / 1e9
        return exact if ticked - exact <= (1 + len(self._pids)) / TICKS else ticked


def _ticks(pids: Sequence[int]) -> int:
    total = 0
    for pid in pids:
        fields = (PROC / f"{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total


def _threads(pids: Sequence[int]) -> dict[str, int]:
    """Nanoseconds on a core by thread."""
    found = {}
    for pid in pids:
        for thread in (PROC / f"{pid}/task").iterdir():
            with suppress(OSError):  # it has ended
                found[thread.name] = int((thread / "schedstat").read_text().split()[0])
    return found


def resident_bytes(pids: Sequence[int]) -> int:
    return sum(int((PROC / f"{pid}/statm").read_text().split()[1]) for pid in pids) * os.sysconf("SC_PAGE_SIZE")


def machine_busy_s() -> float:
    """Core seconds that anybody on this machine has used since it started."""
    counts = (PROC / "stat").read_text().split("\n", 1)[0].split()[1:]
    return sum(int(counts[index]) for index in _BUSY) / TICKS
