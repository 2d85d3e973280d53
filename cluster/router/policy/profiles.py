"""The policies there are, and how one is applied."""

from __future__ import annotations

import random
from collections.abc import Sequence

from cluster.router.endpoint_table import Candidate
from cluster.router.policy import filters, pickers, scorers
from cluster.router.policy.contracts import Choice, Demand, Profile

ONLY = "only"

LEAST_LOAD = Profile(
    name="least_load",
    filters=(
        filters.SERVES_MODEL,
        filters.SESSION_UP,
        filters.NOT_DRAINING,
        filters.SAME_CHECKPOINT,
        filters.NOT_REFUSED,
        filters.NOT_FAILED,
    ),
    scorers=((scorers.LEAST_LOAD, 1.0),),
    picker=pickers.best,
)


def choose(profile: Profile, candidates: Sequence[Candidate], demand: Demand, rng: random.Random) -> Choice | None:
    """The endpoint ``profile`` takes for ``demand``; None when none qualifies."""
    left = list(candidates)
    for rule in profile.filters:
        kept = [candidate for candidate in left if rule.keep(candidate, demand)]
        if kept or rule.required:
            left = kept
    if not left:
        return None
    if len(left) == 1:
        return Choice(left[0], ONLY)
    columns = [(scorer.name, [weight * s for s in scorer.score(left, demand)]) for scorer, weight in profile.scorers]
    totals = [sum(scores[index] for _, scores in columns) for index in range(len(left))]
    taken = profile.picker(totals, rng)
    loudest = max(columns, key=lambda column: column[1][taken])[0]
    return Choice(left[taken], loudest)
