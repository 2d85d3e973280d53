"""What the router knows of its endpoints: the controller's table, and the live load of each. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from cluster.domain.endpoint import Endpoint, EndpointTable, LoadSnapshot


class Standing(enum.Enum):
    """How an endpoint has behaved of late."""

    HEALTHY = "healthy"
    SLOW = "slow"  # its streams get their tokens much later than those of its peers
    EJECTED = "ejected"  # its transport failed; nothing goes there until a probe may


@dataclass(frozen=True, slots=True)
class Candidate:
    """One endpoint as a policy sees it.

    ``tokens`` are queued and running there, as far as we know; ``cached_tokens`` of the prompt in question lie in its
    prefix cache; with ``has_room`` it would begin a new sequence soon rather than queue it.
    """

    endpoint: Endpoint
    session_up: bool
    tokens: int = 0
    cached_tokens: int = 0
    has_room: bool = True
    standing: Standing = Standing.HEALTHY


class LiveLoad:
    """Tokens at one endpoint: what its last message told, and what we have sent meanwhile.

    The report lags by a step and covers other routers too; our own account is instant and knows only us.
    The larger one is nearer to the truth.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._outstanding_tokens = 0
        self._sent_since_report = 0
        self._reported_tokens = 0
        self.snapshot = LoadSnapshot()

    def sent(self, tokens: int) -> None:
        self._outstanding_tokens += tokens
        self._sent_since_report += tokens

    def ended(self, tokens: int) -> None:
        self._outstanding_tokens -= tokens
        assert self._outstanding_tokens >= 0, "a sequence ended twice"

    def reported(self, load: LoadSnapshot) -> None:
        self.snapshot = load
        self._sent_since_report = 0
        self._reported_tokens = load.kv_blocks_used * self._block_size + load.queued_prompt_tokens

    @property
    def tokens(self) -> int:
        return max(self._outstanding_tokens, self._reported_tokens + self._sent_since_report)

    @property
    def outstanding_tokens(self) -> int:
        return self._outstanding_tokens


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
