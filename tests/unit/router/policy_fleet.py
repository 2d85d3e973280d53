"""A made-up fleet for tests of policies: seats that say of themselves what they are told to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.domain.endpoint import Endpoint
from cluster.domain.ids import Incarnation, ReplicaId
from cluster.router.endpoint_table import Candidate, Standing
from cluster.router.holders import Holders
from cluster.router.policy.contracts import Demand
from cluster.router.policy.prompt_blocks import PromptBlocks
from cluster.router.prefix_index import PrefixIndex
from cluster.v1 import engine_pb2

BLOCK_SIZE = 16
DIGEST = "sha256:a"


@dataclass
class FakeSeat:
    slot: int
    queued_tokens: int = 0
    running_tokens: int = 0
    has_room: bool = True
    standing: Standing = Standing.HEALTHY
    digest: str = DIGEST
    generation: int = 1

    @property
    def incarnation(self) -> Incarnation:
        return Incarnation(ReplicaId("demo", self.slot), self.generation)

    def candidate(self, cached_tokens: int = 0, *, has_room: bool, at_home: bool = False) -> Candidate:
        endpoint = Endpoint(self.incarnation, f"127.0.0.1:{5000 + self.slot}", self.digest, BLOCK_SIZE)
        return Candidate(
            endpoint,
            session_up=True,
            tokens=self.queued_tokens + self.running_tokens,
            cached_tokens=cached_tokens,
            has_room=has_room,
            standing=self.standing,
            queued_tokens=self.queued_tokens,
            at_home=at_home,
        )


class CountedSeat:
    """A seat that counts, for all seats with one ``counts``, how often what was asked."""

    def __init__(self, seat: FakeSeat, counts: Counter[str]) -> None:
        self.seat, self.incarnation, self._counts = seat, seat.incarnation, counts

    @property
    def has_room(self) -> bool:
        self._counts["has_room"] += 1
        return self.seat.has_room

    def candidate(self, cached_tokens: int = 0, *, has_room: bool, at_home: bool = False) -> Candidate:
        self._counts["candidate"] += 1
        return self.seat.candidate(cached_tokens, has_room=has_room, at_home=at_home)


def prompt_of(tokens: int, name: int = 0) -> tuple[int, ...]:
    """A prompt of its own for each ``name``."""
    return tuple(1000 * name + position for position in range(tokens))


def demand_for(prompt: Sequence[int], **fields: object) -> Demand:
    return Demand("demo", DIGEST, prompt_tokens=len(prompt), blocks=PromptBlocks(prompt), **fields)


def holders_of(prompt: Sequence[int], held: Mapping[int, int]) -> Holders:
    """``held``: tokens of ``prompt`` in the cache of each slot."""
    index = PrefixIndex()
    names = PromptBlocks(prompt).leading(BLOCK_SIZE)
    for slot, tokens in held.items():
        events = engine_pb2.BlockEvents(
            sequence_number=1, reset=True, complete=True, stored=names[: tokens // BLOCK_SIZE]
        )
        assert index.apply(Incarnation(ReplicaId("demo", slot), 1), events)
    return index.holders(names)
