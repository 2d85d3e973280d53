"""How many prompt tokens a step may carry while others stream: as many as keep it near the decodes' own time.

A long prompt is computed in chunks beside the decodes. What a chunk costs differs by machine and by model, and grows
along the prompt, since attention looks back; so it is measured, step by step, and the next chunk follows from it.
Pure: durations come in as arguments. docs/adr/0016 has the reasons and the figures.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

# A chunk is never smaller, so a prompt of n tokens ends within n / 2 steps (and the looks between them), whatever
# else is asked for; smaller ones would do little but read the prompt's past.
LEAST_CHUNK_TOKENS = 2
# Kernels work on rows in groups: larger chunks are multiples of this, or at most a half of it.
_ROWS = 8
# After so many steps with prompt tokens comes one without: streams grow, so must what is known of their own time.
_LOOK_EVERY = 64
# Of the decodes' own time the median of so many steps counts: between prompts there are few, and one may be a hiccup.
_RECENT = 7
# What is expected of prompts is rather late than mean: steps count more that took longer than expected, but none for
# more than so many times what was expected.
_LATER, _SOONER, _HICCUP = 0.3, 0.1, 2.5
# A prompt that costs no more than so many decode steps is short: it is computed at once, for what stays in small pieces
# costs everybody more. 8 is what a stream's reader may notice as one pause.
_SHORT_STEPS = 8
# Of a step's time this share is taken to be the same for any number of streams, where only one number was seen: the
# weights are read once for all. Between two numbers that were seen a line says how it is.
_FIXED = 0.5
# Behind so many times the deepest past that was measured, and so many tokens more, a chunk's cost is a guess.
_DEEPER, _NEAR = 2.0, 512


@dataclass(frozen=True, slots=True)
class PromptWork:
    """What chunks of prompts ask of a step: their tokens, the past they read, and the pairs of token and past.

    ``past`` counts for each chunk the positions up to its end, ``pairs`` those that its tokens look at, all together.
    """

    tokens: int = 0
    past: int = 0
    pairs: float = 0.0

    @classmethod
    def chunk(cls, start: int, tokens: int) -> PromptWork:
        """The chunk at positions ``start .. start + tokens - 1``."""
        return cls(tokens, start + tokens, tokens * (start + tokens / 2))

    def __add__(self, other: PromptWork) -> PromptWork:
        return PromptWork(self.tokens + other.tokens, self.past + other.past, self.pairs + other.pairs)


class PromptCost:
    """Seconds of prompt work: a x tokens + b x pairs + c x past, where a, b and c follow the measurements.

    Each one moves the three by normalised least mean squares, in proportion to what they had to do with it. So the
    estimate is right where the last chunks were, and in proportion elsewhere: at another prompt's beginning. Where a
    cached beginning ends, far behind whatever was measured, it is a guess (``knows``): the first one there is believed.
    """

    # Work that may cost about the same: a token, 1,000 pairs, and a past of 250 for 4 tokens.
    _UNITS = (1.0, 1000.0, 250.0)

    def __init__(self) -> None:
        self._seconds = [0.0, 0.0, 0.0]  # per unit
        self.known = False  # whether anything was measured yet
        self._deepest = 0.0

    def knows(self, position: float) -> bool:
        """Whether anything was measured near so deep a past, or behind it."""
        return position <= _DEEPER * self._deepest + _NEAR

    def observe(self, work: PromptWork, seconds: float) -> None:
        """So much work took so long; it is not empty."""
        depth = work.pairs / work.tokens  # the mean past of its tokens
        new = not self.known or not self.knows(depth)
        self.known, parts, self._deepest = True, self._parts(work), max(self._deepest, depth)
        expected = math.fsum(s * p for s, p in zip(self._seconds, parts, strict=True))
        rate = 1.0
        if expected and not (new and seconds > expected):
            seconds = min(seconds, _HICCUP * expected)
            rate = _LATER if seconds > expected else _SOONER
        step = rate * (seconds - expected) / math.fsum(p * p for p in parts)
        self._seconds = [max(0.0, s + step * p) for s, p in zip(self._seconds, parts, strict=True)]

    def seconds(self, work: PromptWork) -> float:
        return math.fsum(s * p for s, p in zip(self._seconds, self._parts(work), strict=True))

    def tokens(self, seconds: float, start: int) -> int:
        """The most tokens from position ``start`` on that take no longer; at least 0. Something must be known."""
        a, b, c = (s / unit for s, unit in zip(self._seconds, self._UNITS, strict=True))
        left = seconds - c * start
        if left <= 0.0:
            return 0
        # b / 2 n^2 + (a + b start + c) n = left
        each = a + b * start + c
        root = each + math.sqrt(each * each + 2.0 * b * left)
        return int(min(2.0 * left / root, 2.0**31)) if root else 2**31

    def _parts(self, work: PromptWork) -> tuple[float, float, float]:
        one, two, three = self._UNITS
        return work.tokens / one, work.pairs / two, work.past / three


class PrefillPace:
    """The measured cost of decodes and of prompt tokens, and what follows for the next chunk.

    ``slowdown``: how many times its own time a step with decodes may take because of a prompt beside them. Where more
    sequences wait for their first token than there are streams, each stream may be slowed down for as many of them as
    come on it: one long prompt does not hold up the streams, and one stream does not hold up a crowd. A stream that is
    computed anew stands still until it is done, so it may cost the others as much as a short prompt, each step. Decodes
    are told apart by the power of two that holds their number, since a step's time grows with it; between two of these
    the time is on a line.
    """

    def __init__(self, slowdown: float, most_tokens: int) -> None:
        assert slowdown > 1.0, slowdown
        assert most_tokens >= 1, most_tokens
        self._slowdown, self._most_tokens = slowdown, most_tokens
        self._recent: dict[int, deque[tuple[float, int]]] = {}  # seconds and decodes, by the power of two
        self._decode_s: dict[int, tuple[int, float]] = {}  # of those with the median time: decodes, seconds
        self._cost = PromptCost()
        self._beside = False  # whether a chunk was measured beside decodes: one alone is large, and cheaper per token
        self._since_look = 0

    def observe(self, num_decodes: int, prompts: PromptWork, seconds: float) -> None:
        """A step with so many decodes and so much work on prompts took so long."""
        assert seconds >= 0.0, seconds
        if not prompts.tokens:
            self._since_look = 0
            bucket = num_decodes.bit_length()
            recent = self._recent.setdefault(bucket, deque(maxlen=_RECENT))
            recent.append((seconds, num_decodes))
            median_s, decodes = sorted(recent)[len(recent) // 2]
            self._decode_s[bucket] = decodes, median_s
            return
        if not num_decodes and self._beside:
            return
        self._beside = num_decodes > 0
        if num_decodes:
            self._since_look = 0 if self._since_look >= _LOOK_EVERY else self._since_look + 1
        # Decodes of which nothing is known count as prompt tokens: the chunk is then too small, not too large.
        self._cost.observe(prompts, max(seconds - (self._decodes_alone_s(num_decodes) or 0.0), 0.0))

    def budget(self, num_decodes: int, num_without_token: int = 1, start: int = 0, *, anew: bool = False) -> int:
        """Tokens of long prompts for the next step beside ``num_decodes`` decodes; 0: none this time.

        So many sequences wait for their next token, and the first of them is computed up to position ``start``;
        ``anew``: it is a stream that is computed once more.
        """
        alone = self._decodes_alone_s(num_decodes) if num_decodes else None
        if not num_decodes or not self._cost.known:
            return self._most_tokens
        if alone is None or self._must_look(num_decodes):
            return 0
        if not self._cost.knows(start):
            return min(LEAST_CHUNK_TOKENS, self._most_tokens)
        times = (self._slowdown - 1.0) * max(1.0, num_without_token / num_decodes)
        tokens = self._cost.tokens(max(times, _SHORT_STEPS * anew) * alone, start)
        tokens = tokens // _ROWS * _ROWS or min(tokens, _ROWS // 2)
        return min(max(tokens, LEAST_CHUNK_TOKENS), self._most_tokens)

    def short_prompt(self, num_decodes: int) -> int:
        """Tokens up to which a prompt is short beside ``num_decodes`` decodes; 0 when nothing is known, or none may go.

        None goes when it is time to look at the decodes alone: a step with short ones would tell nothing.
        """
        alone = self._decodes_alone_s(num_decodes)
        if not alone or not self._cost.known or self._must_look(num_decodes):
            return 0
        return min(self._cost.tokens(_SHORT_STEPS * alone, 0), self._most_tokens)

    def _must_look(self, num_decodes: int) -> bool:
        """Whether the next step tells what the streams take alone: it is time, or so few were never seen.

        More than were ever seen take no less than the most that were; a guess at fewer may be many times too long.
        """
        return self._since_look >= _LOOK_EVERY or num_decodes.bit_length() < min(self._decode_s)

    def _decodes_alone_s(self, num_decodes: int) -> float | None:
        """Time of a step of so many decodes, by those that were seen; None before any. More decodes take no less."""
        if not num_decodes or not self._decode_s:
            return None
        fewer = max((seen for seen in self._decode_s.values() if seen[0] <= num_decodes), default=None)
        more = min((seen for seen in self._decode_s.values() if seen[0] > num_decodes), default=None)
        if more is None:
            assert fewer is not None
            return fewer[1]
        if fewer is None:
            fewer = (0, _FIXED * more[1])
        share = (num_decodes - fewer[0]) / (more[0] - fewer[0])
        return min(fewer[1], more[1]) * (1.0 - share) + more[1] * share
