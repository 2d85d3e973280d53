"""The search of one request for an endpoint: what was tried, what is left, and how long to wait for it."""

from __future__ import annotations

import asyncio

from cluster.domain.errors import EngineFailed, RejectReason, RequestRejected
from cluster.domain.ids import Incarnation
from cluster.router.policy.contracts import Demand
from cluster.router.sequence_stream import LossReason
from cluster.router.session import EngineSession
from cluster.router.surroundings import Interruption, Surroundings
from cluster.router.validation import ValidRequest

REFUSALS_MAX = 1  # further endpoints that a new request tries after one is full
FULL_PAUSE_S = 0.1  # a started request that finds every endpoint full looks again after this


class EndpointSearch:
    """Finds the endpoint of each attempt of one request.

    A new request takes one now or is rejected. A request that has lost its replica waits, exempt from bounds, for
    ``failover_wait_s`` at most, which begins anew with every token (``made_progress``). ``losses`` counts the replicas
    that broke under it.
    """

    def __init__(
        self, request: ValidRequest, checkpoint_digest: str, around: Surroundings, interruption: Interruption
    ) -> None:
        self._request, self._digest, self._around = request, checkpoint_digest, around
        self._interruption = interruption
        self._failed: set[Incarnation] = set()
        self._full: set[Incarnation] = set()
        self._draining: set[Incarnation] = set()
        self._wait_until_s: float | None = None
        self.losses = 0

    def made_progress(self) -> None:
        self._wait_until_s = None

    def refused_full(self, incarnation: Incarnation) -> None:
        self._full.add(incarnation)

    def refused_draining(self, incarnation: Incarnation) -> None:
        self._draining.add(incarnation)

    def lost(self, incarnation: Incarnation, reason: LossReason) -> None:
        """EngineFailed when more replicas broke under the request than ``max_failovers`` allows."""
        self._failed.add(incarnation)
        self.losses += 1
        self._around.metrics.failovers.labels(reason=reason.value).inc()
        allowed = self._around.config.max_failovers
        if self.losses > allowed:
            raise EngineFailed(
                f"{self.losses} replicas broke under this request, more than max_failovers {allowed}; "
                "send it again with the tokens received so far.",
                retryable=True,
            )

    async def endpoint(self) -> EngineSession:
        """An endpoint for the next attempt; RequestRejected, or EngineFailed for a request that had one."""
        self._interruption.check()
        picked = self._pick()
        if picked is not None:
            return picked
        if not self.losses:
            raise self._rejection()
        gauge = self._around.metrics.queued_requests.labels(model=self._request.model)
        loop = asyncio.get_running_loop()
        if self._wait_until_s is None:
            self._wait_until_s = loop.time() + self._around.config.failover_wait_s
        with gauge.track_inprogress():
            while (left_s := self._wait_until_s - loop.time()) > 0:
                await self._pause(min(left_s, FULL_PAUSE_S) if self._full else left_s)
                self._interruption.check()
                self._full.clear()
                picked = self._pick()
                if picked is not None:
                    return picked
        raise EngineFailed(
            f"The replica broke and no other was ready within failover_wait_s "
            f"({self._around.config.failover_wait_s:g} s); send the request again with the tokens received so far.",
            retryable=True,
        )

    def _pick(self) -> EngineSession | None:
        if len(self._full) > REFUSALS_MAX and not self.losses:
            return None
        demand = Demand(
            model=self._request.model,
            checkpoint_digest=self._digest,
            refused=frozenset(self._full | self._draining),
            failed=frozenset(self._failed),
        )
        found = self._around.fleet.choose(demand)
        if found is None:
            return None
        session, choice = found
        replica = str(session.endpoint.incarnation.replica)
        self._around.metrics.endpoint_picks.labels(replica=replica, scorer=choice.scorer).inc()
        self._digest = session.endpoint.checkpoint_digest
        return session

    def _rejection(self) -> RequestRejected:
        model = self._request.model
        if self._full:
            message = f"Model {model} has no room for another request; try again in a moment."
            return RequestRejected(RejectReason.QUEUE_FULL, message)
        message = f"No replica of model {model} takes new requests; try again in a moment."
        reason = RejectReason.DRAINING if self._draining else RejectReason.NO_ENDPOINT
        return RequestRejected(reason, message)

    async def _pause(self, limit_s: float) -> None:
        """Until an endpoint changes, the request is interrupted, or ``limit_s`` have passed."""
        change = self._around.fleet.change()
        interrupted = asyncio.ensure_future(self._interruption.wait())
        try:
            await asyncio.wait((change, interrupted), timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            change.cancel()
            interrupted.cancel()
