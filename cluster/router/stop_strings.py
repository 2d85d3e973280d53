"""Stop strings in a growing text: hold back what may become one, cut before the first. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Lets text through until a stop string appears.

    What came out so far depends only on the text that went in. At most one character less than the
    longest stop is held back.
    """

    __slots__ = ("_held", "_longest", "_stops", "stopped")

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would stop everything"
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that may go out now; after ``stopped`` nothing does."""
        assert not self.stopped
        if not self._stops:
            return text
        seen = self._held + text
        found = [at for at in map(seen.find, self._stops) if at >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return seen[: min(found)]
        keep = self._held_from(seen)
        self._held = seen[keep:]
        return seen[:keep]

    def flush(self) -> str:
        """The rest, when nothing more will come."""
        held, self._held = self._held, ""
        return held

    def _held_from(self, seen: str) -> int:
        """Where the longest tail that begins some stop string starts."""
        for start in range(max(0, len(seen) - self._longest + 1), len(seen)):
            tail = seen[start:]
            if any(stop.startswith(tail) for stop in self._stops):
                return start
        return len(seen)
