"""What a client asks for, and how it ends."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

GREEDY = 0.0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Every default resolved: what the engine samples with.

    ``max_tokens`` counts the whole request, tokens generated before a resume included. ``stop_token_ids``
    holds the end tokens too unless the request ignores them. ``temperature`` 0 is greedy. Penalties as in
    the field: ``repetition_penalty`` over prompt and output (1 = off), presence and frequency over output.
    """

    max_tokens: int
    temperature: float = GREEDY
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int = 0

    def __post_init__(self) -> None:
        assert self.max_tokens >= 1, self.max_tokens
        assert self.temperature >= 0, self.temperature
        assert 0 < self.top_p <= 1, self.top_p
        assert 0 <= self.min_p <= 1, self.min_p
        assert self.repetition_penalty > 0, self.repetition_penalty
        assert 0 <= self.seed < 2**64, self.seed

    @property
    def greedy(self) -> bool:
        return self.temperature == GREEDY


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithms, after penalties, before temperature; ``top`` in falling order."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class SequenceEnd(enum.StrEnum):
    """How a sequence left its engine; exactly one for each."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    REJECTED_CAPACITY = "rejected_capacity"
    REJECTED_INVALID = "rejected_invalid"
    REJECTED_DRAINING = "rejected_draining"
    EVICTED_DEADLINE = "evicted_deadline"
    ABORTED_DEADLINE = "aborted_deadline"


class Outcome(enum.StrEnum):
    """How a request ended: exactly one each, and the label of cluster_router_requests_total."""

    COMPLETED = "completed"
    ABORTED_CLIENT = "aborted_client"
    ABORTED_DEADLINE = "aborted_deadline"
    REJECTED_INVALID = "rejected_invalid"
    REJECTED_CAPACITY = "rejected_capacity"
    EVICTED_DEADLINE = "evicted_deadline"
    REJECTED_UNAVAILABLE = "rejected_unavailable"
    FAILED_REPLICA = "failed_replica"
    FAILED_INTERNAL = "failed_internal"
