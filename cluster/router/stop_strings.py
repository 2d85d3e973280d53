"""Stop strings in a growing text: hold back what may become one, cut before the first. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Lets text through until a stop string appears.

    What came out so far depends only on the text that went in. At most one character less than the
    longest stop is held back.
    """

    __slots__ = ("_held", "_longest", "_stops", "_void", "stopped")

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would stop everything"
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self._void = 0  # characters of what is held that no stop may end in
        self.stopped = False

    @property
    def held_back_max(self) -> int:
        """Characters held back, at most."""
        return max(0, self._longest - 1)

    def push(self, text: str, *, searched: bool = True) -> str:
        """The text that may go out now; after ``stopped`` nothing does.

        No stop ends in a text that is not ``searched``, though one may begin there.
        """
        assert not self.stopped
        if not self._stops:
            return text
        seen = self._held + text
        void = self._void if searched else len(seen)
        found = [at for stop in self._stops if (at := seen.find(stop, max(0, void - len(stop) + 1))) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return seen[: min(found)]
        keep = self._held_from(seen)
        self._held, self._void = seen[keep:], max(0, void - keep)
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
