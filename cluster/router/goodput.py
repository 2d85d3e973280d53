"""Whether a request was as quick as promised. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Timing:
    """When one request's tokens came; clock times in seconds. ``tokens`` counts those of this call only."""

    arrived_s: float
    first_token_s: float | None = None
    last_token_s: float | None = None
    tokens: int = 0

    def took(self, count: int, now_s: float) -> None:
        if self.first_token_s is None:
            self.first_token_s = now_s
        self.last_token_s = now_s
        self.tokens += count

    def meets(self, ttft_objective_s: float, tpot_objective_s: float, ended_s: float) -> bool:
        """Time to first token and mean time per later token; what ended without a token counts with its end."""
        first_s = ended_s if self.first_token_s is None else self.first_token_s
        if first_s - self.arrived_s > ttft_objective_s:
            return False
        if self.last_token_s is None or self.tokens < 2:
            return True
        return (self.last_token_s - first_s) / (self.tokens - 1) <= tpot_objective_s
