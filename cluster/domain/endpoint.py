"""What a router knows of the replicas it may send to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from cluster.domain.ids import Incarnation


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The leader of a ready replica; ``address`` is HOST:PORT of its Engine service.

    ``checkpoint_digest``: of what it serves: source, weights, element type, rope scaling (``RankSpec.served_digest``).
    """

    incarnation: Incarnation
    address: str
    checkpoint_digest: str
    block_size: int
    draining: bool = False

    @property
    def model(self) -> str:
        return self.incarnation.replica.model


@dataclass(frozen=True, slots=True)
class EndpointTable:
    """Everything at once; ``models`` are desired, ready or not.

    ``epoch`` only grows within one ``state_id``, which names the controller's durable state: a controller that
    starts afresh counts from the beginning under another one.
    """

    epoch: int
    endpoints: tuple[Endpoint, ...] = ()
    models: tuple[str, ...] = ()
    state_id: str = ""


class LoadSnapshot(NamedTuple):
    """An engine's load as its last step message told it."""

    running_sequences: int = 0
    waiting_sequences: int = 0
    queued_prompt_tokens: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
