"""Who should serve a request."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.router.endpoint_table import Candidate
from cluster.router.policy.contracts import Demand, Scorer


def _fewest_tokens(candidates: Sequence[Candidate], _demand: Demand) -> list[float]:
    """1 for the endpoint with the least tokens queued and running, 0 for the one with the most."""
    tokens = [candidate.tokens for candidate in candidates]
    least, span = min(tokens), max(tokens) - min(tokens)
    return [1.0 - (t - least) / span if span else 1.0 for t in tokens]


LEAST_LOAD = Scorer("least_load", _fewest_tokens)
