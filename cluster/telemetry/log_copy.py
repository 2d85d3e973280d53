"""Log files copied to a stream while they grow: a container's logs are what its main process says."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

LOOK_S = 0.5
# Of one file in one look; what is left follows with the next.
MOST_BYTES = 1 << 20
_PATTERN = "*.log"
_NOT_OURS = frozenset({"ray-start.log"})


class LogCopy:
    """Copies whole lines that are appended to our log files in ``folder``; what was there before is old news."""

    def __init__(self, folder: Path, out: TextIO) -> None:
        self._folder, self._out = folder, out
        self._copied = {file: file.stat().st_size for file in self._files()}

    def look(self) -> int:
        """Copies what is new; how many bytes."""
        return sum(self._copy(file) for file in self._files())

    def _files(self) -> list[Path]:
        return sorted(file for file in self._folder.glob(_PATTERN) if file.name not in _NOT_OURS)

    def _copy(self, file: Path) -> int:
        start = self._copied.get(file, 0)
        try:
            with file.open("rb") as stream:
                size = stream.seek(0, 2)
                start = start if start <= size else 0  # it was written anew
                stream.seek(start)
                fresh = stream.read(MOST_BYTES)
        except FileNotFoundError:
            return 0
        whole = fresh.rfind(b"\n") + 1
        if whole == 0 and len(fresh) == MOST_BYTES:
            whole = len(fresh)  # a line without an end must not hold up the rest
        self._copied[file] = start + whole
        if whole:
            self._out.write(fresh[:whole].decode("utf-8", errors="replace"))
            self._out.flush()
        return whole


@contextmanager
def copied_logs(folder: Path, out: TextIO) -> Iterator[None]:
    """While the block runs, and what its end has logged."""
    copy, ended = LogCopy(folder, out), threading.Event()

    def follow() -> None:
        while not ended.wait(LOOK_S):
            copy.look()

    thread = threading.Thread(target=follow, name="log-copy", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=5)
        if not thread.is_alive():
            copy.look()
