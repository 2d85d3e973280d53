"""How many prompt tokens a step may carry while others stream: the tokens that keep a step near a decode's own time.

A long prompt is computed in chunks beside the decodes. A chunk's cost per token differs by machine, by model and, since
attention looks back, along the prompt; so it is measured, step by step, and the next chunk follows from it. Pure:
durations come in as arguments.
"""

from __future__ import annotations

# A chunk is never smaller: every step has its fixed costs, and a prompt must come to its end.
LEAST_CHUNK_TOKENS = 8
# The weight of the newest observation. Costs rise slowly along a prompt; one hiccup of the machine passes quickly.
_NEWEST = 0.3
# A prompt that costs no more than so many decode steps is short: it is computed at once, for what stays in small pieces
# costs everybody more. 8 is what a stream's reader may notice as one pause.
_SHORT_STEPS = 8


class PrefillPace:
    """The measured cost of decodes and of prompt tokens, and what follows for the next chunk.

    ``slowdown``: how many times its own time a step with decodes may take because of a prompt beside them. Where more
    sequences wait for their first token than there are streams, each stream may be slowed down for as many of them as
    come on it: one long prompt does not hold up the streams, and one stream does not hold up a crowd. Decodes are told
    apart by the power of two that holds their number, since a step's time grows with it.
    """

    def __init__(self, slowdown: float, most_tokens: int) -> None:
        assert slowdown > 1.0, slowdown
        assert most_tokens >= 1, most_tokens
        self._slowdown, self._most_tokens = slowdown, most_tokens
        self._decode_s: dict[int, float] = {}
        self._token_s: float | None = None

    def observe(self, num_decodes: int, num_prompt_tokens: int, seconds: float) -> None:
        """A step with so many decodes and prompt tokens took so long."""
        assert seconds >= 0.0, seconds
        if not num_prompt_tokens:
            bucket = num_decodes.bit_length()
            self._decode_s[bucket] = _blend(self._decode_s.get(bucket), seconds)
            return
        rest = seconds - (self._decodes_alone_s(num_decodes) or 0.0)
        # Decodes of which nothing is known count as prompt tokens: the chunk is then too small, not too large.
        self._token_s = _blend(self._token_s, max(rest, 0.0) / num_prompt_tokens)

    def budget(self, num_decodes: int, num_without_token: int = 1) -> int:
        """Tokens of long prompts for the next step beside ``num_decodes`` decodes; so many wait for a first token."""
        alone = self._decodes_alone_s(num_decodes) if num_decodes else None
        if not num_decodes or not self._token_s:
            return self._most_tokens
        if alone is None:
            return min(LEAST_CHUNK_TOKENS, self._most_tokens)
        crowd = max(1.0, num_without_token / num_decodes)
        tokens = int((self._slowdown - 1.0) * crowd * alone / self._token_s)
        return min(max(tokens, LEAST_CHUNK_TOKENS), self._most_tokens)

    def short_prompt(self, num_decodes: int) -> int:
        """Tokens up to which a prompt is short beside ``num_decodes`` decodes; 0 when nothing is known."""
        alone = self._decodes_alone_s(num_decodes)
        if not alone or not self._token_s:
            return 0
        return min(int(_SHORT_STEPS * alone / self._token_s), self._most_tokens)

    def _decodes_alone_s(self, num_decodes: int) -> float | None:
        """Time of a step of so many decodes, of the nearest number that was seen; None before any."""
        if not num_decodes or not self._decode_s:
            return None
        bucket = num_decodes.bit_length()
        return self._decode_s[min(self._decode_s, key=lambda seen: (abs(seen - bucket), seen))]


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + _NEWEST * (new - old)
