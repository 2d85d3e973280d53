"""What a policy is made of."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.domain.ids import Incarnation
from cluster.router.endpoint_table import Candidate


@dataclass(frozen=True, slots=True)
class Demand:
    """What one request asks of an endpoint.

    ``checkpoint_digest``: the weights it was tokenized for, empty for any; a continuation must find the same.
    ``refused``: incarnations that said no; ``failed``: incarnations that broke under this request. With
    ``needs_room`` an endpoint that would only queue it does not qualify. ``prompt_tokens``: those to be computed where
    nothing is cached.
    """

    model: str
    checkpoint_digest: str = ""
    refused: frozenset[Incarnation] = frozenset()
    failed: frozenset[Incarnation] = frozenset()
    needs_room: bool = False
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Filter:
    """Keeps the candidates that qualify. One that is not ``required`` steps aside when nobody would be left."""

    name: str
    keep: Callable[[Candidate, Demand], bool]
    required: bool = True


@dataclass(frozen=True, slots=True)
class Scorer:
    """One number in [0, 1] for each candidate, more is better."""

    name: str
    score: Callable[[Sequence[Candidate], Demand], Sequence[float]]


# The index of the candidate to take; ``scores`` is never empty.
Picker = Callable[[Sequence[float], random.Random], int]


@dataclass(frozen=True, slots=True)
class Profile:
    """A whole policy: every filter in order, the weighted sum of the scorers, one picker."""

    name: str
    filters: tuple[Filter, ...]
    scorers: tuple[tuple[Scorer, float], ...]
    picker: Picker


@dataclass(frozen=True, slots=True)
class Choice:
    """The endpoint taken, and the scorer that spoke loudest for it ("only" when there was no choice)."""

    candidate: Candidate
    scorer: str
