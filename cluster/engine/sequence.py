"""A request's state inside one engine."""

from __future__ import annotations

import math
from collections import abc
from dataclasses import dataclass, field

from cluster.domain.request import SamplingParams, SequenceEnd
from cluster.engine.step import SampledToken, SequenceKey, SequenceProgress


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt, output so far, and what of both is in the KV cache.

    Built by whoever receives a submit; from ``Scheduler.submit`` on only the scheduler writes to it.
    ``generated_token_ids`` given at construction were produced elsewhere (a resume): they are computed like
    a prompt, count towards ``max_tokens`` and are not reported again. ``deadline_s`` is absolute, in the
    scheduler's time base. A higher ``priority`` goes first.
    """

    key: SequenceKey
    prompt_token_ids: abc.Sequence[int]
    params: SamplingParams
    generated_token_ids: list[int] = field(default_factory=list)
    attempt: int = 1
    priority: int = 0
    deadline_s: float | None = None
    request_id: str = ""

    arrival: int = field(default=0, init=False)
    resumed_tokens: int = field(default=0, init=False)
    started: bool = field(default=False, init=False)
    num_computed: int = field(default=0, init=False)
    cached_prompt_tokens: int = field(default=0, init=False)
    block_ids: tuple[int, ...] = field(default=(), init=False)
    preemptions: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.prompt_token_ids = tuple(self.prompt_token_ids)
        self.generated_token_ids = list(self.generated_token_ids)
        self.resumed_tokens = len(self.generated_token_ids)
        self.started = self.resumed_tokens > 0

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller goes first and is preempted last: higher priority, then earlier arrival."""
        return (-self.priority, self.arrival)

    @property
    def num_tokens(self) -> int:
        """Known tokens, prompt and output."""
        return len(self.prompt_token_ids) + len(self.generated_token_ids)

    @property
    def next_position(self) -> int:
        """Index, in the whole sequence, of the token to be generated next; its noise is keyed by it."""
        return self.num_tokens

    @property
    def num_uncomputed(self) -> int:
        """Known tokens whose keys and values are not in the cache."""
        return self.num_tokens - self.num_computed

    @property
    def is_prefilling(self) -> bool:
        """False once only the newest token is left to compute, behind others that are computed."""
        return self.num_computed == 0 or self.num_uncomputed > 1

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Known tokens at positions ``start .. end - 1``, across prompt and output."""
        num_prompt = len(self.prompt_token_ids)
        if end <= num_prompt:
            return tuple(self.prompt_token_ids[start:end])
        generated = self.generated_token_ids[max(0, start - num_prompt) : end - num_prompt]
        return (*self.prompt_token_ids[start:], *generated)

    @property
    def due_s(self) -> float:
        """The deadline; infinite when there is none."""
        return math.inf if self.deadline_s is None else self.deadline_s

    @property
    def late_end(self) -> SequenceEnd:
        """How a passed deadline ends this sequence."""
        return SequenceEnd.ABORTED_DEADLINE if self.started else SequenceEnd.EVICTED_DEADLINE

    def progress(
        self, token: SampledToken | None = None, *, end: SequenceEnd | None = None, detail: str = ""
    ) -> SequenceProgress:
        """News of this sequence: the token, the end, or both."""
        token_ids = () if token is None else (token.token_id,)
        logprobs = () if token is None or token.logprob is None else (token.logprob,)
        return SequenceProgress(self.key, self.attempt, token_ids, logprobs, end, detail, self.cached_prompt_tokens)
