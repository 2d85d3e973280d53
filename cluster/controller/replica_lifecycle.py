"""The life of one incarnation of a replica: a table (from, event) -> to, and a bounded story."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from cluster.domain.errors import ReplicaError
from cluster.domain.ids import Incarnation
from cluster.domain.replica import ReplicaPhase

STORY_LINES = 32


class ReplicaEvent(enum.StrEnum):
    """What can happen to a replica. The value is a metric label."""

    PLACED = "placed"  # placement group and rank actors exist, ranks are told to start
    ADOPTED = "adopted"  # ranks of an earlier controller reported
    LOADING = "loading"  # a rank reads weights
    READY = "ready"  # every rank has warmed up
    DRAIN = "drain"
    STOP = "stop"
    FAIL = "fail"


_P, _E = ReplicaPhase, ReplicaEvent
TRANSITIONS: dict[tuple[ReplicaPhase, ReplicaEvent], ReplicaPhase] = {
    (_P.PENDING, _E.PLACED): _P.STARTING,
    (_P.PENDING, _E.ADOPTED): _P.STARTING,
    (_P.PENDING, _E.STOP): _P.STOPPED,
    (_P.PENDING, _E.FAIL): _P.FAILED,
    (_P.STARTING, _E.LOADING): _P.LOADING,
    (_P.STARTING, _E.READY): _P.READY,
    (_P.STARTING, _E.STOP): _P.STOPPED,
    (_P.STARTING, _E.FAIL): _P.FAILED,
    (_P.LOADING, _E.READY): _P.READY,
    (_P.LOADING, _E.STOP): _P.STOPPED,
    (_P.LOADING, _E.FAIL): _P.FAILED,
    (_P.READY, _E.DRAIN): _P.DRAINING,
    (_P.READY, _E.FAIL): _P.FAILED,
    (_P.DRAINING, _E.STOP): _P.STOPPED,
    (_P.DRAINING, _E.FAIL): _P.FAILED,
}
TERMINAL = frozenset({ReplicaPhase.STOPPED, ReplicaPhase.FAILED})


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """Where an incarnation is, since when and why; times are the controller's monotonic seconds."""

    incarnation: Incarnation
    phase: ReplicaPhase
    since_s: float
    reason: str
    story: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        return self.phase in TERMINAL

    def after(self, event: ReplicaEvent, reason: str, now_s: float) -> Lifecycle:
        """The next phase; ReplicaError with the whole story when ``event`` has no place in this one."""
        to = TRANSITIONS.get((self.phase, event))
        if to is None:
            told = "; ".join(self.story) or "no story yet"
            raise ReplicaError(f"{self.incarnation} is {self.phase} and cannot take {event!r} ({reason}): {told}")
        line = f"{now_s:.3f} {self.phase} -> {to}: {reason}"
        return replace(self, phase=to, since_s=now_s, reason=reason, story=(*self.story, line)[-STORY_LINES:])


def born(incarnation: Incarnation, now_s: float, reason: str) -> Lifecycle:
    return Lifecycle(incarnation, ReplicaPhase.PENDING, now_s, reason, (f"{now_s:.3f} PENDING: {reason}",))
