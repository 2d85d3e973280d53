"""Memory of the running process: how the kernel counts it, and in which pages it hands it out (Linux)."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")
_MAPS = Path("/proc/self/smaps_rollup")
_INTERVAL_S = 0.01


def prefer_huge_pages() -> None:
    """Has torch ask for huge pages (2 MiB) for what it allocates on the CPU in pieces of 2 MiB or more.

    Weights, also those that oneDNN reorders, then cost a hundredth of the page faults and miss the TLB less; numpy asks
    for the KV pool by itself. It takes effect until torch allocates its first tensor. Whoever set the variable already
    is left his choice; a kernel whose transparent huge pages are off ("never") does as before.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def huge_page_bytes() -> int:
    """AnonHugePages now: the part of the anonymous memory that lies in transparent huge pages."""
    for line in _MAPS.read_text().splitlines():
        if line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return 0


def anonymous_bytes() -> int:
    """RssAnon now: what the process has written and nobody else can give back.

    Mapped files (libraries, and whatever is read through a mapping) and shared memory do not count; nor does the page
    cache, which belongs to no process.
    """
    for line in _STATUS.read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


class AnonymousPeak:
    """The most anonymous memory seen above what there was at the beginning, while the ``with`` block runs.

    The kernel keeps a peak of all resident memory only, so a thread looks a hundred times a second; ``sample`` looks
    at once. ``bytes`` is 0 or more.
    """

    def __init__(self) -> None:
        self._baseline = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)
        self.bytes = 0

    def __enter__(self) -> AnonymousPeak:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.sample()

    def sample(self) -> int:
        """Looks, and returns the peak so far."""
        self.bytes = max(self.bytes, anonymous_bytes() - self._baseline)
        return self.bytes

    def _run(self) -> None:
        while not self._done.wait(_INTERVAL_S):
            self.sample()
