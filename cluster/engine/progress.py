"""What a rank process tells about itself: written by its compute thread, read by its heartbeat."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.domain.clock import Clock
from cluster.domain.endpoint import LoadSnapshot
from cluster.domain.replica import RankPhase


@dataclass(slots=True)
class RankProgress:
    """Single writer, many readers: every field is one assignment, so that no lock is needed.

    ``step_started_s``: clock time at which the step now running began, None when idle. ``waits_for_peer``: this rank's
    share of it is done and another one's is not, or it failed because another one is gone. ``needs_change``: it failed
    over what it was given, files or options, and would again.
    """

    clock: Clock
    phase: RankPhase = RankPhase.STARTING
    step: int = 0
    step_started_s: float | None = None
    waits_for_peer: bool = False
    needs_change: bool = False
    compute_s: float = 0.0
    bytes_loaded: int = 0
    bytes_total: int = 0
    peak_host_bytes: int = 0
    failure: str = ""
    load: LoadSnapshot = field(default_factory=LoadSnapshot)
    ports: dict[str, int] = field(default_factory=dict)

    def step_age_s(self) -> float:
        started = self.step_started_s
        return 0.0 if started is None else max(0.0, self.clock.now() - started)

    def begin_step(self) -> None:
        self.step_started_s = self.clock.now()

    def end_step(self, step: int, compute_s: float) -> None:
        """``compute_s``: CPU seconds of the compute thread, so that waiting for a peer in its sleep does not count."""
        self.compute_s = compute_s
        self.step = step
        self.step_started_s = None
