"""Memory of the running process as the kernel counts it (Linux)."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")
_INTERVAL_S = 0.01


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
