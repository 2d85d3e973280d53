"""How much may be tried again: a death costs nothing, what keeps failing gets a share of the traffic. Pure.

A replica that dies takes work with it that was promised to go on, all of it at once; a retry storm is something else:
the same requests, broken again and again. So every loss of an incarnation's session grants as many retries as it held
sequences, once in a while; any other retry is paid from a budget that new requests fill. The budget is that of Finagle:
deposits that fade away, a small floor for quiet routers.
"""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from dataclasses import dataclass

from cluster.domain.ids import Incarnation


class RetryRefused(enum.StrEnum):
    """Why a request that lost its replica is not sent to another: the label of cluster_router_retries_refused_total."""

    FAILOVERS = "max_failovers"  # it has outlived as many as it may
    FRUITLESS = "fruitless"  # several replicas in a row broke before they gave it a token
    BUDGET = "budget"  # what keeps failing has had its share of the traffic


@dataclass(frozen=True, slots=True)
class RetryRules:
    """``share`` of a retry for each new request, ``floor_per_s`` more for each second."""

    share: float = 0.2
    floor_per_s: float = 1.0
    kept_s: float = 10.0  # deposits fade with this time constant, so that quiet hours pay for no storm
    granted_again_s: float = 60.0  # an incarnation whose session breaks again before that gets no further grant
    grants_max: int = 4096  # incarnations whose grants are remembered


@dataclass(slots=True)
class _Grant:
    given_s: float
    left: int


class RetryBudget:
    """Retries never exceed share x new requests + floor x seconds + the grants; see ``RetryRules``."""

    def __init__(self, rules: RetryRules | None = None, now_s: float = 0.0) -> None:
        self._rules = rules or RetryRules()
        # A router that has just begun may retry as much as one that has been idle for long.
        self._balance = self._rules.floor_per_s * self._rules.kept_s
        self._at_s = now_s
        self._grants: OrderedDict[Incarnation, _Grant] = OrderedDict()

    def entered(self, now_s: float) -> None:
        """A new request was sent to its first endpoint."""
        self._fade(now_s)
        self._balance += self._rules.share

    def lost(self, incarnation: Incarnation, sequences: int, now_s: float) -> None:
        """The session with ``incarnation`` has failed with so many sequences open."""
        rules, before = self._rules, self._grants.get(incarnation)
        if before is not None and now_s - before.given_s < rules.granted_again_s:
            return
        self._grants[incarnation] = _Grant(now_s, sequences)
        self._grants.move_to_end(incarnation)
        if len(self._grants) > rules.grants_max:
            self._grants.popitem(last=False)

    def retry(self, incarnation: Incarnation, now_s: float) -> bool:
        """Whether a request that lost ``incarnation`` may be placed again; takes the credit for it."""
        grant = self._grants.get(incarnation)
        if grant is not None and grant.left > 0:
            grant.left -= 1
            return True
        self._fade(now_s)
        if self._balance < 1.0:
            return False
        self._balance -= 1.0
        return True

    def wait_s(self) -> float:
        """How long until the floor alone pays the next retry; a bound for quiet routers, sooner with traffic."""
        return max(0.0, 1.0 - self._balance) / self._rules.floor_per_s

    def _fade(self, now_s: float) -> None:
        """The balance moves towards what the floor alone sustains: floor x kept."""
        if now_s <= self._at_s:
            return
        resting = self._rules.floor_per_s * self._rules.kept_s
        left = math.exp((self._at_s - now_s) / self._rules.kept_s)
        self._balance = resting + (self._balance - resting) * left
        self._at_s = now_s
