"""What one engine step is told and what comes out of it: frozen values that may cross threads and sockets.

What there is one of for each sequence and step is a named tuple: a frozen dataclass takes four times as long to build.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from cluster.domain.request import SamplingParams, SequenceEnd, TokenLogprob

StepKind = Literal["prefill", "decode", "mixed"]


class SequenceKey(NamedTuple):
    """Who a sequence is: a session of this leader, and the id its router chose there (never reused)."""

    session: int
    sequence_id: int


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """What the sampling rank must know of a sequence before its first step, and again after a preemption.

    From then on that rank appends what it samples itself; nothing of this travels twice.
    """

    slot: int
    params: SamplingParams
    prompt_token_ids: tuple[int, ...]
    generated_token_ids: tuple[int, ...]


class StepEntry(NamedTuple):
    """One sequence's share of a step.

    ``slot`` is the sequence's row in every rank's tables, from 0, for as long as it runs. ``token_ids`` are computed
    at positions ``start .. start + len - 1``. ``new_block_ids`` are KV blocks that the ranks do not know yet: they go
    to the sequence's block table from index ``first_block`` on (0: the table begins anew). ``sample`` asks for the
    token after the last one: its position in the whole sequence is ``end``. ``num_prompt``: tokens of the prompt,
    for rotary embeddings that depend on it; where one length switches the frequencies of all tokens, a sequence that
    is computed anew beyond that length counts all tokens that were known then.
    """

    key: SequenceKey
    slot: int
    token_ids: tuple[int, ...]
    start: int
    first_block: int
    new_block_ids: tuple[int, ...]
    sample: bool
    num_prompt: int

    @property
    def end(self) -> int:
        """One past the last computed position; the noise position of a sampled token."""
        return self.start + len(self.token_ids)

    @property
    def is_decode(self) -> bool:
        return self.sample and self.start > 0 and len(self.token_ids) == 1


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass: decodes first, then prefill chunks. Never empty. Steps count from 1 without a gap.

    Plans are run in order; ``starts`` are the sequences that begin (anew) in this one.
    """

    step: int
    entries: tuple[StepEntry, ...]
    starts: tuple[SequenceStart, ...] = ()

    def __post_init__(self) -> None:
        assert self.step >= 1, self.step
        assert self.entries, "a plan without work is no plan"

    @property
    def num_tokens(self) -> int:
        """Tokens that this pass computes."""
        return sum(len(entry.token_ids) for entry in self.entries)

    @property
    def num_decodes(self) -> int:
        """Entries that compute exactly one token behind known ones and sample; everything else is prefill."""
        return sum([entry.sample and entry.start > 0 and len(entry.token_ids) == 1 for entry in self.entries])

    @property
    def kind(self) -> StepKind:
        return step_kind(self.num_decodes, len(self.entries))


def step_kind(num_decodes: int, num_entries: int) -> StepKind:
    """How a step of so many entries is called in metrics."""
    if num_decodes == num_entries:
        return "decode"
    return "mixed" if num_decodes else "prefill"


class SampledToken(NamedTuple):
    """One new token; ``logprob`` only where the sequence asked for it."""

    key: SequenceKey
    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """One token for each entry of the plan that samples, in plan order."""

    step: int
    tokens: tuple[SampledToken, ...]


class SequenceProgress(NamedTuple):
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
