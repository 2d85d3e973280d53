"""How a request is ended from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interruption:
    """Why a request has to end, once somebody says so; the first reason counts."""

    __slots__ = ("_callback", "error")

    def __init__(self) -> None:
        self.error: Exception | None = None
        self._callback: Callable[[Exception], None] | None = None

    def trip(self, error: Exception) -> bool:
        """False when there was a reason already."""
        if self.error is not None:
            return False
        self.error = error
        if self._callback is not None:
            self._callback(error)
        return True

    def check(self) -> None:
        """Raises the reason, if there is one."""
        if self.error is not None:
            raise self.error

    def forget(self) -> None:
        """The request has ended; its error is not kept alive by what it came through."""
        self.error = None

    @contextmanager
    def calls(self, callback: Callable[[Exception], None]) -> Iterator[None]:
        """Meanwhile ``callback`` hears the reason, at once if there is one already."""
        assert self._callback is None, "one at a time"
        self._callback = callback
        try:
            if self.error is not None:
                callback(self.error)
            yield
        finally:
            self._callback = None
