"""The search of one request for an endpoint: what was tried, what is left, and how long to wait for it."""

from __future__ import annotations

import math

from cluster.domain.errors import EngineFailed, RejectReason, RequestRejected
from cluster.domain.ids import Incarnation
from cluster.router.admission_desk import Ticket
from cluster.router.interruption import Interruption
from cluster.router.policy.contracts import Choice, Demand
from cluster.router.policy.prompt_blocks import PromptBlocks
from cluster.router.retry_budget import RetryRefused
from cluster.router.sequence_stream import LossReason
from cluster.router.session import EngineSession
from cluster.router.surroundings import Surroundings
from cluster.router.validation import ValidRequest
from cluster.router.waiting_rank import Entry

# A request that kills whatever it meets must not take the fleet down: so many replicas in a row may break under it
# before they gave it a token.
FRUITLESS_MAX = 2
NOBODYS_FAULT = frozenset({LossReason.REMOVED, LossReason.SLOW})
SENT_BACK_MAX = 8  # how often endpoints that seemed to have room may have none for one new request


class ServedElsewhere(Exception):  # noqa: N818 - a reason to begin anew
    """Endpoints of another checkpoint would take the request, tokenized anew."""


class EndpointSearch:
    """Finds the endpoint of each attempt of one request.

    A new request waits its turn at the admission desk, if it may. A request that has lost its replica waits before all
    others, exempt from bounds, for ``failover_wait_s`` at most, which begins anew with every token
    (``made_progress``). ``losses`` counts the replicas that it has left, because they broke or were slow.
    ``cached_tokens``: of the prompt, that the last endpoint found is thought to have cached.
    """

    def __init__(
        self,
        request: ValidRequest,
        checkpoint_digest: str,
        around: Surroundings,
        interruption: Interruption,
        arrived_s: float | None = None,
    ) -> None:
        self._request, self._digest, self._around = request, checkpoint_digest, around
        self._interruption = interruption
        self._blocks = PromptBlocks(request.prompt_token_ids, request.cache_salt)
        self._failed: set[Incarnation] = set()
        self._draining: set[Incarnation] = set()
        self._ticket: Ticket | None = None
        self._arrived_s = around.clock.now() if arrived_s is None else arrived_s
        self._session: EngineSession | None = None
        self._choice: Choice | None = None  # the last one, for as long as it may turn out not to be used
        self._sent_s: float | None = None
        self._sent_back = 0
        self._wait_until_s: float | None = None
        self._fruitless = 0  # replicas in a row that broke before they gave it a token
        self._fruitful = False  # the one it is on has given it some
        self._moves = 0  # losses that were a wish of ours: the replica was slow
        self._settles = False  # the last loss was one of these: the slow replica is better than a wait
        self.losses = 0
        self.cached_tokens = 0

    def made_progress(self) -> None:
        if self._sent_s is not None and self._ticket is not None:
            self._around.desk.first_token_after(self._ticket, self._around.clock.now() - self._sent_s)
            self._sent_s = None
        if self._choice is not None:  # its first token; the further ones change nothing
            self._wait_until_s = None
            self._fruitless, self._fruitful, self._choice = 0, True, None

    def refused_full(self) -> None:
        """The endpoint had no room after all."""
        assert self._session is not None, "nobody was asked"
        self._session.load.refused()
        self._sent_back += 1
        self._not_used()

    def not_sent(self, incarnation: Incarnation, reason: LossReason) -> None:
        """The endpoint took nothing after all, since its session had just gone down or had too much to send.

        No loss, as when it has no room; but a loss for a request that this befalls again and again after one.
        """
        if self.losses and self._sent_back >= SENT_BACK_MAX:
            self._not_used()
            self.lost(incarnation, reason)
        else:
            self.refused_full()

    def refused_draining(self, incarnation: Incarnation) -> None:
        self._draining.add(incarnation)
        self._not_used()

    def lost(self, incarnation: Incarnation, reason: LossReason) -> None:
        """EngineFailed when the request may not be tried again: see ``RetryRefused``."""
        self.losses += 1
        self._settles = reason is LossReason.SLOW
        if not self._settles:
            self._failed.add(incarnation)
        if not self._fruitful and reason not in NOBODYS_FAULT:
            self._fruitless += 1
        self._fruitful = False
        self._around.metrics.failovers.labels(reason=reason.value).inc()
        if self._settles:  # the replica lives: who finds no better place at once comes back
            self._moves += 1
            self._not_used()
            return
        allowed = self._around.config.max_failovers
        if self.losses - self._moves > allowed:
            raise self._gives_up(
                RetryRefused.FAILOVERS,
                f"{self.losses - self._moves} replicas broke under this request, more than max_failovers {allowed}",
            )
        if self._fruitless > FRUITLESS_MAX:
            raise self._gives_up(
                RetryRefused.FRUITLESS,
                f"{self._fruitless} replicas in a row broke under this request before they gave it a token",
            )
        wait_s = self._around.fleet.health.retry(incarnation)
        if wait_s is not None:
            fault = "The replica broke, and so many did of late that the budget of retries is used up"
            raise self._gives_up(RetryRefused.BUDGET, fault, wait_s)

    def _gives_up(self, why: RetryRefused, fault: str, retry_after_s: float | None = None) -> EngineFailed:
        self._around.metrics.retries_refused.labels(reason=why.value).inc()
        message = f"{fault}; send it again with the tokens received so far."
        return EngineFailed(message, retryable=True, retry_after_s=retry_after_s)

    async def endpoint(self, deadline_s: float | None = None) -> EngineSession:
        """The endpoint of the next attempt, which is to be submitted before anything else is awaited.

        ``deadline_s``: seconds until the client's deadline. RequestRejected or RequestEvicted for a new request,
        ServedElsewhere for one that is ``movable``, EngineFailed for one that had an endpoint.
        """
        self._interruption.check()
        now_s = self._around.clock.now()
        ticket = self._ticket
        if ticket is None:
            ticket = self._ticket = self._new_ticket(now_s, deadline_s)
        elif self.losses:
            if self._wait_until_s is None:
                self._wait_until_s = now_s + self._around.config.failover_wait_s
            ticket.entry.exempt, ticket.entry.due_s = True, self._wait_until_s
        elif self._sent_back > SENT_BACK_MAX:
            message = f"Model {self._request.model} has no room for another request; try again in a moment."
            raise RequestRejected(RejectReason.QUEUE_FULL, message)
        found = await self._around.desk.place(ticket, self._interruption)
        if found is None:
            self._interruption.check()
            if self._request.movable and not self.losses and self._served_elsewhere():
                raise ServedElsewhere
            raise self._no_endpoint()
        session, self._choice = found
        choice = self._choice
        if self._interruption.error is not None:
            self._not_used()
            self._interruption.check()
        self._around.metrics.of_request.endpoint_picks[session.replica_name, choice.scorer].inc(1)
        self._digest = session.endpoint.checkpoint_digest
        self.cached_tokens = choice.candidate.cached_tokens
        self._session = session
        if not self.losses:
            self._sent_s = self._around.clock.now()
        return session

    def refused_invalid(self) -> None:
        """The endpoint says that nobody can serve it."""
        self._not_used()

    def _not_used(self) -> None:
        """The endpoint gives this request no token: it was not sent, was refused, or left before the first one."""
        choice, self._choice = self._choice, None
        if choice is not None:
            choice.not_used()

    def close(self, generated: int, cached_prompt_tokens: int, *, complete: bool) -> None:
        """The request is over, by itself (``complete``) or otherwise, after so many tokens of its own."""
        if self._ticket is not None:
            computed = max(0, self._ticket.tokens - cached_prompt_tokens)
            self._around.desk.close(self._ticket, computed, generated, complete=complete)
        if complete and self._session is not None and not self.losses:
            series, model = self._around.metrics.of_request, self._request.model
            series.expected_cached_tokens[model,].inc(self.cached_tokens)
            series.cached_tokens[model,].inc(cached_prompt_tokens)
        self._not_used()  # without a token from there, and nobody learns any more how the endpoint would have done
        self._ticket = None  # which knows us: what has ended is not to wait for the collector

    def _new_ticket(self, now_s: float, deadline_s: float | None) -> Ticket:
        request = self._request
        prompt_tokens = len(request.prompt_token_ids) + len(request.resumed_token_ids)
        entry = Entry(
            tenant=request.tenant,
            priority=request.priority,
            prompt_tokens=prompt_tokens,
            max_tokens=max(0, request.sampling.max_tokens - len(request.resumed_token_ids)),
            arrived_s=self._arrived_s,
            deadline_s=math.inf if deadline_s is None else now_s + deadline_s,
        )
        return Ticket(request.model, self._digest, entry, self._demand, prompt_tokens, request.movable)

    def _demand(self, needs_room: bool) -> Demand:  # noqa: FBT001 - what the desk asks with
        return Demand(
            model=self._request.model,
            checkpoint_digest=self._digest,
            refused=frozenset(self._draining),
            failed=frozenset(self._failed),
            needs_room=needs_room,
            settles=self._settles,
            prompt_tokens=len(self._request.prompt_token_ids),
            blocks=self._blocks,
            session_key=self._request.session_key,
        )

    def _served_elsewhere(self) -> bool:
        return self._around.fleet.serves(Demand(self._request.model, refused=frozenset(self._draining)))

    def _no_endpoint(self) -> RequestRejected:
        message = f"No replica of model {self._request.model} takes new requests; try again in a moment."
        reason = RejectReason.DRAINING if self._draining else RejectReason.NO_ENDPOINT
        return RequestRejected(reason, message)
