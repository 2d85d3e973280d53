"""How the endpoints have behaved: sessions tell, the choice of an endpoint and the retries of requests ask.

Thin: the decisions are those of ejection.py, slowness.py and retry_budget.py; here are the clock and the metrics.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from cluster.domain.clock import Clock, MonotonicClock
from cluster.domain.endpoint import LoadSnapshot
from cluster.domain.ids import Incarnation
from cluster.router.ejection import EjectionRules, Ejections
from cluster.router.endpoint_table import Standing
from cluster.router.retry_budget import RetryBudget, RetryRules
from cluster.router.sequence_stream import LossReason
from cluster.router.slowness import Pace, Slowness, SlownessRules
from cluster.telemetry.metrics import RouterMetrics

# The transport's fault or a hung engine's; never what an engine answers, and never the controller's wish.
EJECTING = frozenset({LossReason.BROKEN, LossReason.SILENT, LossReason.STUCK})
SLOW = "slow"
EJECTION_CAUSES = (*sorted(reason.value for reason in EJECTING), SLOW)  # labels of cluster_router_ejections_total


class FleetHealth:
    """The standing of every endpoint, and the budget of retries. Lives on the router's event loop."""

    def __init__(
        self,
        clock: Clock | None = None,
        metrics: RouterMetrics | None = None,
        ejection: EjectionRules | None = None,
        slowness: SlownessRules | None = None,
        retries: RetryRules | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.clock = clock or MonotonicClock()
        self.metrics = metrics
        self.ejections = Ejections(ejection)
        self.slowness = Slowness(slowness, rng)
        self.retries = RetryBudget(retries, self.clock.now())

    def standing(self, incarnation: Incarnation) -> Standing:
        """HEALTHY for whatever is not known. Changes with events and with time; asking changes nothing."""
        if not (self.ejections.open or self.slowness.convicted):
            return Standing.HEALTHY  # all are, nearly always: a pick asks this of many
        now_s = self.clock.now()
        if self.ejections.ejected(incarnation, now_s):
            return Standing.EJECTED
        return Standing.SLOW if self.slowness.slow(incarnation, now_s) else Standing.HEALTHY

    def picked(self, incarnation: Incarnation) -> Callable[[], None] | None:
        """A request goes there: the probe, where one is due.

        Then the answer is what has to be called if the request is not sent after all, so that the next one may be.
        """
        if not (self.ejections.open or self.slowness.convicted):
            return None
        now_s = self.clock.now()
        trusted_again = self.ejections.picked(incarnation, now_s)
        quick_again = self.slowness.picked(incarnation, now_s)
        if not (trusted_again or quick_again):
            return None

        def unpicked() -> None:
            if trusted_again:
                self.ejections.unpicked(incarnation)
            if quick_again:
                self.slowness.unpicked(incarnation, self.clock.now())

        return unpicked

    def entered(self) -> None:
        """A new request was sent to its first endpoint."""
        self.retries.entered(self.clock.now())

    def retry(self, incarnation: Incarnation) -> float | None:
        """None when a request that lost ``incarnation`` may be placed again; else in how many seconds one may."""
        if self.retries.retry(incarnation, self.clock.now()):
            return None
        return self.retries.wait_s()

    def pulse(self, incarnation: Incarnation) -> SessionPulse:
        """For the session with ``incarnation``."""
        return SessionPulse(incarnation, self)


class SessionPulse:
    """What one session tells of its endpoint: up, steps and beats, down, closed. ``slow``: found so, probe or not."""

    __slots__ = ("_health", "_incarnation", "_load", "_noted", "_pace", "_suspected", "slow")

    def __init__(self, incarnation: Incarnation, health: FleetHealth) -> None:
        self._incarnation = incarnation
        self._health = health
        self._pace: Pace | None = None
        self._load = LoadSnapshot()  # after the last step
        self._suspected = False
        self.slow = False
        self._noted = Standing.HEALTHY

    def came_up(self) -> None:
        health = self._health
        health.ejections.came_up(self._incarnation)
        self._pace = health.slowness.came_up(self._incarnation)
        self._suspected = health.ejections.suspected(self._incarnation)
        self._show(Standing.HEALTHY)  # an earlier incarnation of the replica may have left another one
        self._note()

    def stepped(self, step: int, load: LoadSnapshot) -> None:
        """A message with tokens; ``load`` is that of the whole engine after it."""
        now_s = self._health.clock.now()
        before, self._load = self._load, load
        prompts = before.queued_prompt_tokens > 0 or load.running_sequences > before.running_sequences
        if self._pace is not None:
            sequences = max(before.running_sequences, load.running_sequences)  # some have ended with it, or come for it
            self._pace.stepped(now_s, step, busy=load.running_sequences > 0, prompts=prompts, sequences=sequences)
            if self._pace.slow is not self.slow:
                self._note()
        if self._suspected:
            self._health.ejections.delivered(self._incarnation, now_s)
            self._suspected = self._health.ejections.suspected(self._incarnation)
            self._note()

    def idle(self) -> None:
        """The engine runs nothing."""
        if self._pace is not None:
            self._pace.idle()

    def beat(self, step_age_s: float) -> None:
        """Every half second or so: verdicts that came with time alone are noted. No step runs at age 0."""
        if not step_age_s:
            self.idle()
        self._note()

    def leaving(self, open_sequences: int) -> int:
        """How many of so many sequences are better moved elsewhere now; ``moved`` says that they are."""
        return 0 if self._pace is None else self._pace.leaving(open_sequences)

    def moved(self, sequences: int) -> None:
        if self._pace is not None:
            self._pace.moved(sequences)

    def submitted(self, attempt: int) -> None:
        """A sequence is on its way there."""
        if attempt == 1:
            self._health.entered()

    def went_down(self, reason: LossReason, sequences: int) -> None:
        """The session, which was up, has failed with so many sequences open."""
        health, now_s = self._health, self._health.clock.now()
        self._pace = None
        health.slowness.went_down(self._incarnation)
        health.ejections.went_down(self._incarnation)
        health.retries.lost(self._incarnation, sequences, now_s)
        if reason in EJECTING:
            health.ejections.failed(self._incarnation, now_s)
            self._count(reason.value)
        self._note()

    def closed(self, sequences: int) -> None:
        """The endpoint has left the table with so many sequences open; its series go with the replica's."""
        health = self._health
        health.ejections.left(self._incarnation)
        health.slowness.went_down(self._incarnation)
        health.retries.lost(self._incarnation, sequences, health.clock.now())
        self._pace = None

    def _note(self) -> None:
        """Shows the standing, and counts the verdict slow once."""
        health = self._health
        standing = health.standing(self._incarnation)
        slow = self._pace is not None and self._pace.slow
        if slow and not self.slow:
            self._count(SLOW)
        self.slow = slow
        if standing is not self._noted:
            self._show(standing)

    def _show(self, standing: Standing) -> None:
        self._noted = standing
        if self._health.metrics is not None:
            for one in Standing:
                series = self._health.metrics.endpoint_standing.labels(str(self._incarnation.replica), one.value)
                series.set(1 if one is standing else 0)

    def _count(self, reason: str) -> None:
        if self._health.metrics is not None:
            self._health.metrics.ejections.labels(reason=reason).inc()
