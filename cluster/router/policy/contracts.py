"""What a policy is made of."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from cluster.domain.ids import Incarnation
from cluster.router.endpoint_table import Candidate
from cluster.router.holders import Holders

if TYPE_CHECKING:
    from cluster.router.policy.group import Group
    from cluster.router.policy.prompt_blocks import PromptBlocks


class Demand(NamedTuple):
    """What one request asks of an endpoint.

    ``checkpoint_digest``: what it was tokenized for, as ``Endpoint`` has it, empty for any; a continuation must find
    the same: other weights, or these in another element type or with another rope, would go on with another text.
    ``refused``: incarnations that said no; ``failed``: incarnations that broke under this request. With
    ``needs_room`` an endpoint that would only queue it does not qualify; then one that is slow or ejected does not
    either, as long as a sound one is full for now; who ``settles`` takes a slow one. ``prompt_tokens``: those to be
    computed where nothing is cached. ``blocks``: the prompt as prefix caches know it, one object for all attempts of a
    request; None where nobody cares. ``session_key``: requests with one key belong to one conversation.
    """

    model: str
    checkpoint_digest: str = ""
    refused: frozenset[Incarnation] = frozenset()
    failed: frozenset[Incarnation] = frozenset()
    needs_room: bool = False
    settles: bool = False
    prompt_tokens: int = 0
    blocks: PromptBlocks | None = None
    session_key: str = ""


@dataclass(frozen=True, slots=True)
class Filter:
    """Keeps the candidates that qualify. One that is not ``required`` steps aside when nobody would be left.

    ``static``: the verdict changes only with the endpoint table and with sessions, so it is asked once for both.
    """

    name: str
    keep: Callable[[Candidate, Demand], bool]
    required: bool = True
    static: bool = False


@dataclass(frozen=True, slots=True)
class Scorer:
    """One number in [0, 1] for each candidate, more is better. Candidates come in the order of the profile's walk."""

    name: str
    score: Callable[[Sequence[Candidate], Demand], Sequence[float]]


# The index of the candidate to take; ``scores`` is never empty.
Picker = Callable[[Sequence[float], random.Random], int]


@dataclass(slots=True)
class Turn:
    """What a router remembers between two picks for one model and checkpoint.

    ``position``: whose turn it is among the members of a group. ``doubted``, of large groups only: who was not sound
    when last asked, the oldest answers first; and how many filters had said that it was, before one said no.
    """

    position: int = 0
    doubted: dict[Incarnation, int] = field(default_factory=dict)


# The members of a group, by position, in the order in which a profile looks at them. May repeat some; names every
# member when it is followed to its end, so that somebody who qualifies is found if there is one.
Walk = Callable[["Group", Demand, Holders, Turn, random.Random], Iterator[int]]


@dataclass(frozen=True, slots=True)
class Profile:
    """A whole policy: every filter in order, the weighted sum of the scorers, one picker.

    ``walk`` and ``enough`` bound the work of one pick: members are looked at in the walk's order until ``enough`` of
    them qualify. ``uses_blocks``: candidates come with what is cached there; ``uses_homes``: and with ``at_home``.
    """

    name: str
    filters: tuple[Filter, ...]
    scorers: tuple[tuple[Scorer, float], ...]
    picker: Picker
    walk: Walk
    enough: int
    uses_blocks: bool = False
    uses_homes: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """The endpoint taken, and the scorer that spoke loudest for it ("only" when there was no choice).

    ``undo``: what was noted because a request goes there.
    """

    candidate: Candidate
    scorer: str
    undo: tuple[Callable[[], None], ...] = field(default=(), compare=False)

    def not_used(self) -> None:
        """No request went there after all; to be said once, soon after the choice."""
        for take_back in self.undo:
            take_back()
