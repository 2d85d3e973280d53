"""In which order a profile looks at the members of a group. Pure: chance and turns are arguments."""

from __future__ import annotations

import random
from collections.abc import Iterator

from cluster.router.holders import Holders
from cluster.router.policy.contracts import Demand, Turn
from cluster.router.policy.group import Group

HOLDERS_MAX = 12  # of those who hold most of a prompt, that are looked at where not everybody is


def at_random(group: Group, _demand: Demand, _holders: Holders, _turn: Turn, rng: random.Random) -> Iterator[int]:
    return group.shuffled(rng)


def in_turn(group: Group, _demand: Demand, _holders: Holders, turn: Turn, _rng: random.Random) -> Iterator[int]:
    """From the member whose turn it is."""
    count = len(group)
    for step in range(count):
        yield (turn.position + step) % count


def round_the_ring(group: Group, demand: Demand, _holders: Holders, _turn: Turn, _rng: random.Random) -> Iterator[int]:
    """From the home of the request's conversation."""
    key = 0 if demand.blocks is None else demand.blocks.key(demand.session_key, group.block_size)
    return group.ring.walk(key)


def holders_first(group: Group, _demand: Demand, holders: Holders, _turn: Turn, rng: random.Random) -> Iterator[int]:
    """Who holds most of the prompt, then anybody.

    Equal holders come in a random order: among thousands that hold one system prompt none is ever special.
    """
    for incarnation, _blocks in holders.longest(HOLDERS_MAX, rng.getrandbits(32)):
        position = group.positions.get(incarnation)
        if position is not None:
            yield position
    yield from group.shuffled(rng)
