"""From tokens to the text a client may see: detokenization and stop strings together. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cluster.router.detokenizer import Detokenizer, Vocabulary
from cluster.router.stop_strings import StopFilter

HELD_BACK_MAX = 16  # characters that bytes may be which are no whole character yet: one each


class Emission(NamedTuple):
    """What some tokens let out: ``kept`` of them count, the rest came after a stop."""

    text: str
    kept: int


class TextStream:
    """One request's text. Everything it says is a pure function of the tokens pushed so far.

    A stop string that ends before ``min_tokens`` tokens does not count; one that only begins there does.
    """

    __slots__ = ("_detokenizer", "_filter", "_min_tokens", "_tokens")

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str], min_tokens: int = 0) -> None:
        self._detokenizer = Detokenizer(vocabulary)
        self._filter = StopFilter(stops) if stops else None
        self._min_tokens = min_tokens
        self._tokens = 0

    @property
    def stopped(self) -> bool:
        return self._filter is not None and self._filter.stopped

    @property
    def held_back_max(self) -> int:
        """Characters that ``flush`` may let out, at most."""
        return HELD_BACK_MAX if self._filter is None else self._filter.held_back_max + HELD_BACK_MAX

    def push(self, token_ids: Sequence[int]) -> Emission:
        assert not self.stopped
        stops, pieces = self._filter, list[str]()
        for index, token_id in enumerate(token_ids):
            self._tokens += 1
            text = self._detokenizer.push(token_id)
            if text and stops is not None:
                text = self._filtered(stops, text)
            pieces.append(text)
            if stops is not None and stops.stopped:
                return Emission("".join(pieces), index + 1)
        return Emission("".join(pieces), len(token_ids))

    def flush(self) -> str:
        """The rest after the last token; it may still end at a stop string."""
        stops = self._filter
        if stops is None:
            return self._detokenizer.flush()
        if self.stopped:
            return ""
        text = self._filtered(stops, self._detokenizer.flush())
        return text if stops.stopped else text + stops.flush()

    def _filtered(self, stops: StopFilter, text: str) -> str:
        return stops.push(text, searched=self._tokens >= self._min_tokens)
