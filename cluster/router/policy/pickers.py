"""Which of the scored endpoints it is."""

from __future__ import annotations

import random
from collections.abc import Sequence


def best(scores: Sequence[float], rng: random.Random) -> int:
    """The highest score; ties are broken by ``rng``, so that equal endpoints share the work."""
    top = max(scores)
    return rng.choice([index for index, score in enumerate(scores) if score == top])
