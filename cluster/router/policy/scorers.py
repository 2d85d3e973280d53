"""Who should serve a request.

Affinity and load are both told in tokens that have to be computed before the request's own first token, and divided by
the same unit: where their scorers have equal weights, the highest sum is the endpoint with the fewest tokens to
compute, whatever the load of the others. So one hot endpoint switches nobody else's affinity off, a cache never
outweighs a queue that is longer than what it saves (times the ratio of the weights), and what is not cached anywhere
goes to the least loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.router.endpoint_table import Candidate
from cluster.router.policy.contracts import Demand, Scorer

# A token of a running sequence delays a newcomer far less than one that waits to be computed: each step reads it, which
# takes little beside computing it. Somewhat more or less hardly matters; with much less, running sequences pile up,
# with much more a few of them cost a conversation its cache.
RUNNING_WEIGHT = 0.05


def tokens_ahead(candidate: Candidate) -> float:
    """What a newcomer there waits for, in tokens to be computed."""
    return candidate.queued_tokens + RUNNING_WEIGHT * (candidate.tokens - candidate.queued_tokens)


def _fewest_tokens(candidates: Sequence[Candidate], _demand: Demand) -> list[float]:
    """1 for the endpoint with the least tokens ahead, 0 for the one with the most."""
    tokens = [tokens_ahead(candidate) for candidate in candidates]
    least, span = min(tokens), max(tokens) - min(tokens)
    return [1.0 - (t - least) / span if span else 1.0 for t in tokens]


def _cached_prefix(candidates: Sequence[Candidate], demand: Demand) -> list[float]:
    """The tokens of the prompt that need not be computed, in units."""
    unit = _unit(candidates, demand)
    return [min(candidate.cached_tokens, demand.prompt_tokens) / unit for candidate in candidates]


def _short_queue(candidates: Sequence[Candidate], demand: Demand) -> list[float]:
    """1 less the tokens ahead, in units."""
    unit = _unit(candidates, demand)
    return [1.0 - tokens_ahead(candidate) / unit for candidate in candidates]


def _unit(candidates: Sequence[Candidate], demand: Demand) -> float:
    """What no endpoint's tokens ahead and no prompt exceed: it cancels out where weights are equal."""
    return max(1.0, demand.prompt_tokens, *map(tokens_ahead, candidates))


def _at_home(candidates: Sequence[Candidate], demand: Demand) -> list[float]:
    """The whole prompt for the conversation's home, in units."""
    unit = _unit(candidates, demand)
    return [demand.prompt_tokens / unit if candidate.at_home else 0.0 for candidate in candidates]


def _order(candidates: Sequence[Candidate], _demand: Demand) -> list[float]:
    """1 for the first that the walk met, falling to the last."""
    return [1.0 - place / len(candidates) for place in range(len(candidates))]


LEAST_LOAD = Scorer("least_load", _fewest_tokens)
CACHED_PREFIX = Scorer("cached_prefix", _cached_prefix)
SHORT_QUEUE = Scorer("short_queue", _short_queue)
AT_HOME = Scorer("at_home", _at_home)
TURN = Scorer("turn", _order)
RING = Scorer("ring", _order)
