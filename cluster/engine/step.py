"""What one engine step is told and what comes out of it: frozen values that may cross threads and sockets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.domain.request import SequenceEnd, TokenLogprob

StepKind = Literal["prefill", "decode", "mixed"]


@dataclass(frozen=True, slots=True, order=True)
class SequenceKey:
    """Who a sequence is: a session of this leader, and the id its router chose there (never reused)."""

    session: int
    sequence_id: int


@dataclass(frozen=True, slots=True)
class StepEntry:
    """One sequence's share of a step.

    ``token_ids`` are computed at positions ``start .. start + len - 1``. ``block_ids`` are the sequence's KV
    blocks from position 0 to the last of these tokens, in order. ``sample`` asks for the token after the
    last one: its position in the whole sequence is ``end``.
    """

    key: SequenceKey
    token_ids: tuple[int, ...]
    start: int
    block_ids: tuple[int, ...]
    sample: bool

    @property
    def end(self) -> int:
        """One past the last computed position; the noise position of a sampled token."""
        return self.start + len(self.token_ids)

    @property
    def is_decode(self) -> bool:
        return self.sample and self.start > 0 and len(self.token_ids) == 1


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass: decodes first, then prefill chunks. Never empty. Steps count from 1 without a gap."""

    step: int
    entries: tuple[StepEntry, ...]

    def __post_init__(self) -> None:
        assert self.step >= 1, self.step
        assert self.entries, "a plan without work is no plan"

    @property
    def num_tokens(self) -> int:
        """Tokens that this pass computes."""
        return sum(len(entry.token_ids) for entry in self.entries)

    @property
    def kind(self) -> StepKind:
        """A decode computes exactly one token behind known ones and samples; everything else is prefill."""
        decodes = sum(entry.is_decode for entry in self.entries)
        if decodes == len(self.entries):
            return "decode"
        return "mixed" if decodes else "prefill"


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One new token; ``logprob`` only where the sequence asked for it."""

    key: SequenceKey
    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """One token for each entry of the plan that samples, in plan order."""

    step: int
    tokens: tuple[SampledToken, ...]


@dataclass(frozen=True, slots=True)
class SequenceProgress:
    """News of one sequence: its new tokens (never a stop token), and its end if it has come.

    ``logprobs`` is empty or as long as ``token_ids``. ``detail`` is one sentence for people when ``end``
    is a refusal.
    """

    key: SequenceKey
    attempt: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    end: SequenceEnd | None = None
    detail: str = ""
    cached_prompt_tokens: int = 0
