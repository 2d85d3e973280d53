"""What the router knows of its endpoints: the controller's table, and the live load of each. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from cluster.domain.endpoint import Endpoint, EndpointTable, LoadSnapshot


class Standing(enum.Enum):
    """How an endpoint has behaved of late."""

    HEALTHY = "healthy"
    SLOW = "slow"  # its streams get their tokens much later than those of its peers
    EJECTED = "ejected"  # its transport failed; nothing goes there until a probe may


class Candidate(NamedTuple):
    """One endpoint as a policy sees it.

    ``tokens`` are queued and running there, as far as we know, and ``queued_tokens`` of them have to be computed before
    a newcomer's; ``cached_tokens`` of the prompt in question lie in its prefix cache; ``at_home``: where every router
    would begin to cache what nobody has cached of the prompt; with ``has_room`` it would begin a new sequence soon
    rather than queue it.
    """

    endpoint: Endpoint
    session_up: bool
    tokens: int = 0
    cached_tokens: int = 0
    has_room: bool = True
    standing: Standing = Standing.HEALTHY
    queued_tokens: int = 0
    at_home: bool = False


QUEUED_PROMPT_TOKENS_MAX = 16_384  # of one endpoint; more of them wait in the router, where they can still move
BACKLOG_SHARE = 8  # one sequence for so many in a step may wait in the engine, so that none of its slots stays empty


class LiveLoad:
    """Tokens and sequences at one endpoint: what its last message told, and what we have sent meanwhile.

    The report lags by a step and covers other routers too; our own account is instant and knows only us.
    The larger one is nearer to the truth. ``max_num_seqs``: sequences of its steps, 0 while that is not known.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._outstanding_tokens = 0
        self._sent_since_report = 0
        self._reported_tokens = 0
        self._queued_since_report = 0
        self._queued_before_report = 0
        self._sequences = 0
        self._sequences_since_report = 0
        self._held_sequences = 0
        self._held_tokens = 0
        self._refused = False
        self._max_num_seqs = 0
        self.snapshot = LoadSnapshot()
        self._room: bool | None = None  # ``has_room`` until something changes: picks ask far more often

    @property
    def max_num_seqs(self) -> int:
        return self._max_num_seqs

    @max_num_seqs.setter
    def max_num_seqs(self, number: int) -> None:
        self._room = None
        self._max_num_seqs = number

    def sent(self, tokens: int, cached_tokens: int = 0) -> None:
        """A sequence is on its way, of whose tokens so many need not be computed."""
        self._room = None
        self._outstanding_tokens += tokens
        self._sent_since_report += tokens
        self._queued_since_report += tokens - cached_tokens
        self._sequences += 1
        self._sequences_since_report += 1

    def hold(self, tokens: int) -> None:
        """Keeps a place for a sequence that is about to be sent."""
        self._room = None
        self._held_sequences += 1
        self._held_tokens += tokens

    def let_go(self, tokens: int) -> None:
        """The other end of ``hold``."""
        self._room = None
        self._held_sequences -= 1
        self._held_tokens -= tokens
        assert self._held_sequences >= 0, "a place was given back twice"

    @property
    def refuses(self) -> bool:
        """Whether the endpoint took no further sequence since it last reported."""
        return self._refused

    def refused(self) -> None:
        """The endpoint took no further sequence: it has no room before it reports again."""
        self._room = None
        self._refused = True

    def ended(self, tokens: int) -> None:
        self._room = None
        self._sequences -= 1
        self._outstanding_tokens -= tokens
        assert self._outstanding_tokens >= 0, "a sequence ended twice"

    def reported(self, load: LoadSnapshot) -> None:
        self._room = None
        self.snapshot = load
        self._sent_since_report = 0
        self._queued_before_report, self._queued_since_report = self._queued_since_report, 0
        self._sequences_since_report = 0
        self._refused = False
        self._reported_tokens = load.kv_blocks_used * self._block_size + load.queued_prompt_tokens

    @property
    def tokens(self) -> int:
        return max(self._outstanding_tokens, self._reported_tokens + self._sent_since_report) + self._held_tokens

    @property
    def queued_tokens(self) -> int:
        """Those of ``tokens`` that have to be computed before a newcomer's.

        What was sent shortly before a report may have crossed with it: it counts until the next one.
        """
        crossed = self._queued_before_report if self._sequences else 0
        return max(self.snapshot.queued_prompt_tokens, crossed) + self._queued_since_report + self._held_tokens

    @property
    def outstanding_tokens(self) -> int:
        return self._outstanding_tokens

    @property
    def has_room(self) -> bool:
        """Whether one more sequence would begin soon: with slots, prompts and KV blocks all within their bounds.

        An endpoint without sequences has room for any. What was sent since the report counts for no more than what is
        still ours there: sequences end, and some are cancelled, before the next report.
        """
        if self._room is None:
            self._room = self._has_room()
        return self._room

    def _has_room(self) -> bool:
        if self._refused:
            return False
        load = self.snapshot
        newer = min(self._sequences_since_report, self._sequences)
        reported = load.running_sequences + load.waiting_sequences + newer
        sequences = max(self._sequences, reported) + self._held_sequences
        if not sequences:
            return True
        slots = self._max_num_seqs
        if slots and sequences >= slots + max(1, slots // BACKLOG_SHARE):
            return False
        newer = min(self._queued_since_report, self._outstanding_tokens) + self._held_tokens
        if load.queued_prompt_tokens + newer >= QUEUED_PROMPT_TOKENS_MAX:
            return False
        newer = min(self._sent_since_report, self._outstanding_tokens) + self._held_tokens
        blocks = load.kv_blocks_used + (load.queued_prompt_tokens + newer) / self._block_size
        return not load.kv_blocks_total or blocks < load.kv_blocks_total

    @property
    def places(self) -> int:
        """How many more sequences would begin soon, by their number: 0 without room, 1 while the slots are unknown."""
        if not self.has_room:
            return 0
        slots, load = self.max_num_seqs, self.snapshot
        if not slots:
            return 1
        newer = min(self._sequences_since_report, self._sequences)
        reported = load.running_sequences + load.waiting_sequences + newer
        return slots + max(1, slots // BACKLOG_SHARE) - max(self._sequences, reported) - self._held_sequences


def supersedes(new: EndpointTable, current: EndpointTable | None) -> bool:
    """Whether ``new`` may replace ``current``: epochs only grow, and count within one controller state."""
    return current is None or new.state_id != current.state_id or new.epoch >= current.epoch


@dataclass(frozen=True, slots=True)
class TableChange:
    """What is to be done after a new table: a replica that changed its address or identity is another one."""

    opened: tuple[Endpoint, ...]
    closed: tuple[Endpoint, ...]
    updated: tuple[Endpoint, ...]


def table_change(current: tuple[Endpoint, ...], new: EndpointTable) -> TableChange:
    """From the endpoints we have to those of ``new``; draining alone is an update, not another endpoint."""
    before = {_identity(e): e for e in current}
    after = {_identity(e): e for e in new.endpoints}
    return TableChange(
        opened=tuple(e for key, e in after.items() if key not in before),
        closed=tuple(e for key, e in before.items() if key not in after),
        updated=tuple(e for key, e in after.items() if key in before and before[key] != e),
    )


def _identity(endpoint: Endpoint) -> tuple[object, ...]:
    return endpoint.incarnation, endpoint.address, endpoint.checkpoint_digest, endpoint.block_size
