"""A request's state inside one engine."""

from __future__ import annotations

import math
from collections import abc
from dataclasses import dataclass, field

from cluster.domain.request import SamplingParams, SequenceEnd
from cluster.engine.block_pool import BlockPool
from cluster.engine.step import SampledToken, SequenceKey, SequenceProgress, SequenceStart, StepEntry

NO_SLOT = -1


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt, output so far, and what of both is in the KV cache.

    Built by whoever receives a submit; from ``Scheduler.submit`` on only the scheduler writes to it.
    ``generated_token_ids`` given at construction were produced elsewhere (a resume): they are computed like
    a prompt, count towards ``max_tokens`` and are not reported again. ``deadline_s`` is absolute, in the
    scheduler's time base. A higher ``priority`` goes first. Cached blocks are shared only under one ``cache_salt``.

    ``num_tokens`` counts known tokens, ``num_planned`` those of them whose computation is planned, ``num_computed``
    those that are committed, all from the first on. ``num_plans`` outstanding plans name it. Of its ``block_ids`` the
    ranks know ``num_told``; the first ``num_recorded`` are full and final. ``hash_chain``: the root and the names of
    full blocks, as far as they were asked for.
    """

    key: SequenceKey
    prompt_token_ids: abc.Sequence[int]
    params: SamplingParams
    generated_token_ids: list[int] = field(default_factory=list)
    attempt: int = 1
    priority: int = 0
    deadline_s: float | None = None
    request_id: str = ""
    cache_salt: bytes = b""

    arrival: int = field(default=0, init=False)
    resumed_tokens: int = field(default=0, init=False)
    max_length: int = field(default=0, init=False)  # known tokens at which it ends
    started: bool = field(default=False, init=False)
    live: bool = field(default=False, init=False)  # the scheduler has it, and it is not over
    slot: int = field(default=NO_SLOT, init=False)
    num_tokens: int = field(default=0, init=False)
    num_planned: int = field(default=0, init=False)
    num_computed: int = field(default=0, init=False)
    num_plans: int = field(default=0, init=False)
    rope_prompt: int = field(default=0, init=False)  # ``StepEntry.num_prompt`` of its entries
    cached_prompt_tokens: int = field(default=0, init=False)
    block_ids: list[int] = field(default_factory=list, init=False)
    num_told: int = field(default=0, init=False)
    num_recorded: int = field(default=0, init=False)
    hash_chain: list[bytes] = field(default_factory=list, init=False)
    hash_variant: int = field(default=0, init=False)
    admissions: int = field(default=0, init=False)
    preemptions: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.prompt_token_ids = tuple(self.prompt_token_ids)
        self.generated_token_ids = list(self.generated_token_ids)
        self.resumed_tokens = len(self.generated_token_ids)
        self.started = self.resumed_tokens > 0
        self.num_tokens = len(self.prompt_token_ids) + self.resumed_tokens

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller goes first and is preempted last: higher priority, then earlier arrival."""
        return (-self.priority, self.arrival)

    @property
    def is_prefilling(self) -> bool:
        """False once nothing but the newest token, behind others, is left to plan."""
        return self.num_planned == 0 or self.num_tokens - self.num_planned > 1

    @property
    def resumes(self) -> bool:
        """Whether somebody reads it already: while it is computed anew, a stream stands still."""
        return bool(self.generated_token_ids)

    def append(self, token_id: int) -> None:
        """One more known token."""
        self.generated_token_ids.append(token_id)
        self.num_tokens += 1

    def admit(self, slot: int, cached: list[int], fresh: list[int], block_size: int) -> None:
        """From now on it runs: ``cached`` blocks hold its first tokens, ``fresh`` ones take the rest."""
        self.slot, self.block_ids = slot, cached + fresh
        self.num_planned = self.num_computed = len(cached) * block_size
        self.num_recorded = len(cached)
        self.rope_prompt = len(self.prompt_token_ids)
        if not self.admissions:
            self.cached_prompt_tokens = min(self.num_computed, self.rope_prompt)
        self.admissions += 1
        self.started = True

    def give_back(self) -> list[int]:
        """It runs no longer; its blocks, for whoever takes them."""
        blocks = self.block_ids
        self.slot, self.block_ids = NO_SLOT, []
        self.num_planned = self.num_computed = self.num_told = self.num_recorded = 0
        return blocks

    def begin(self) -> SequenceStart:
        """What the sampling rank is told with the first entry after an admission."""
        return SequenceStart(self.slot, self.params, tuple(self.prompt_token_ids), tuple(self.generated_token_ids))

    def plan(self, count: int) -> StepEntry:
        """The computation of the next ``count`` tokens, with all blocks that the ranks do not know yet."""
        start, told, blocks = self.num_planned, self.num_told, self.block_ids
        end = start + count
        self.num_planned = end
        self.num_plans += 1
        new: tuple[int, ...] = ()
        if told < len(blocks):
            new = tuple(blocks[told:])
            self.num_told = len(blocks)
        sample = end == self.num_tokens
        return StepEntry(self.key, self.slot, self.tokens(start, end), start, told, new, sample, self.rope_prompt)

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Known tokens at positions ``start .. end - 1``, across prompt and output."""
        num_prompt = len(self.prompt_token_ids)
        if end - start == 1 and start >= num_prompt:  # a decode
            return (self.generated_token_ids[start - num_prompt],)
        if start >= num_prompt:
            return tuple(self.generated_token_ids[start - num_prompt : max(0, end - num_prompt)])
        if end <= num_prompt:
            return tuple(self.prompt_token_ids[start:end])
        return (*self.prompt_token_ids[start:], *self.generated_token_ids[: end - num_prompt])

    @property
    def due_s(self) -> float:
        """The deadline; infinite when there is none."""
        return math.inf if self.deadline_s is None else self.deadline_s

    @property
    def late_end(self) -> SequenceEnd:
        """How a passed deadline ends this sequence."""
        return SequenceEnd.ABORTED_DEADLINE if self.started else SequenceEnd.EVICTED_DEADLINE

    def late_detail(self, num_waiting: int) -> str:
        """The same for people; so many sequences waited when it ended."""
        if self.started:
            return f"The deadline came after {len(self.generated_token_ids)} tokens; allow the request more time."
        return f"The deadline came while {num_waiting} requests waited; allow the request more time, or add a replica."

    def progress(
        self, token: SampledToken | None = None, *, end: SequenceEnd | None = None, detail: str = ""
    ) -> SequenceProgress:
        """News of this sequence: the token, the end, or both."""
        token_ids = () if token is None else (token.token_id,)
        logprobs = () if token is None or token.logprob is None else (token.logprob,)
        return SequenceProgress(self.key, self.attempt, token_ids, logprobs, end, detail, self.cached_prompt_tokens)

    def check(self, pool: BlockPool) -> None:
        """Every invariant of a running sequence, for tests and post-mortems."""
        held = len(self.block_ids)
        assert self.num_computed <= self.num_planned <= self.num_tokens, f"{self.key} computes what is not planned"
        assert (self.num_planned > self.num_computed) == (self.num_plans > 0), f"{self.key} waits for no plan"
        assert self.num_computed < self.num_tokens, f"{self.key} runs with nothing to compute"
        assert pool.blocks_for(self.num_planned) <= held <= pool.blocks_for(self.num_tokens), f"{self.key} holds {held}"
        assert self.num_told == held or not self.num_plans, f"{self.key} has blocks that its plans do not name"
        assert self.num_recorded == self.num_computed // pool.block_size, f"{self.key} has full blocks without a record"
        unfinished = self.block_ids[self.num_computed // pool.block_size :]
        assert all(pool.name_of(block) is None for block in unfinished), f"{self.key} has a name for what may change"
