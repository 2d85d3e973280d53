"""What a step still has room for while it is being planned."""

from __future__ import annotations


class StepRoom:
    """``tokens`` of a step: prompts of more than ``short_prompt`` tokens take ``long_tokens`` at most (None: all)."""

    def __init__(self, tokens: int, long_tokens: int | None, short_prompt: int) -> None:
        self.tokens = tokens
        self._long_tokens = tokens if long_tokens is None else min(tokens, long_tokens)
        self._short_prompt = short_prompt

    def of(self, known_tokens: int) -> int:
        """Tokens that a sequence with so many known tokens could have."""
        return self.tokens if known_tokens <= self._short_prompt else min(self.tokens, self._long_tokens)

    def take(self, known_tokens: int, wanted: int) -> int:
        """As many of the ``wanted`` tokens as there is room for; they are taken."""
        count = min(wanted, self.of(known_tokens))
        self.tokens -= count
        if known_tokens > self._short_prompt:
            self._long_tokens -= count
        return count
