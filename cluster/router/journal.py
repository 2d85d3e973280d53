"""What is known for sure about one request: its tokens so far, and which attempt may add to them. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class Journal:
    """The tokens of one request, each once, however often they were replayed.

    ``resumed`` tokens came with the request (they count towards ``max_tokens``, not as this call's); ``room``: tokens
    that may still come. ``attempt`` numbers the tries from 1; only what the current one's stream lets through is
    appended.
    """

    __slots__ = ("_generated", "_resumed", "attempt", "room")

    def __init__(self, resumed: Sequence[int], max_tokens: int) -> None:
        self._generated = list(resumed)
        self._resumed = len(self._generated)
        self.room = max(0, max_tokens - self._resumed)
        self.attempt = 0

    def begin_attempt(self) -> int:
        """The number of a new try."""
        self.attempt += 1
        return self.attempt

    def withdraw_attempt(self) -> None:
        """The last try was never sent: its number is for the next one."""
        self.attempt -= 1

    def append(self, token_ids: Sequence[int]) -> None:
        self.room -= len(token_ids)
        assert self.room >= 0, "more tokens than were asked for"
        self._generated += token_ids

    @property
    def full(self) -> bool:
        return self.room == 0

    @property
    def generated(self) -> Sequence[int]:
        """All tokens after the prompt, resumed ones first: what the next attempt continues from."""
        return self._generated

    @property
    def generated_tokens(self) -> int:
        """Tokens of this call, resumed ones left out."""
        return len(self._generated) - self._resumed
