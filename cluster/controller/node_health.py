"""Is this node well? Read off its own ranks, for probes and metrics: nobody elsewhere is asked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.domain.clock import Clock
from cluster.domain.replica import RankPhase
from cluster.engine.rank_record import living
from cluster.telemetry.exposition import Page, Routes
from cluster.telemetry.metrics import NodeMetrics

Phases = tuple[RankPhase, ...]


@dataclass(frozen=True, slots=True)
class NodeView:
    """What a node's probes say. ``empty_since_s``: member of the cluster without a rank since then; None otherwise.

    Ready: all its ranks have warmed up; or it has been empty for long, and nothing here waits for anything (a rollout
    of pods would otherwise stop at the first spare one). Started once, started for good: later loads are no start.
    """

    ready: bool = False
    started: bool = False
    empty_since_s: float | None = None

    def seen(self, phases: Phases, now_s: float, idle_after_s: float, *, joined: bool) -> NodeView:
        """The view after a look: the node's ranks, and whether it belongs to the cluster."""
        if phases:
            ready = all(phase is RankPhase.READY for phase in phases)
            return NodeView(ready, self.started or ready)
        if not joined:
            return NodeView(started=self.started)
        since_s = now_s if self.empty_since_s is None else self.empty_since_s
        idle = now_s - since_s >= idle_after_s
        return NodeView(idle, self.started or idle, since_s)


class NodeHealth:
    """What the worker of ``node_dir`` tells about its ranks. ``joined``: whether the node belongs to the cluster now.

    Safe for several threads; ``look`` it must, every second or so, for idleness is time without ranks.
    """

    def __init__(
        self, node_dir: Path, clock: Clock, idle_after_s: float, metrics: NodeMetrics, joined: Callable[[], bool]
    ) -> None:
        self._node_dir, self._clock, self._idle_after_s = node_dir, clock, idle_after_s
        self._metrics, self._joined = metrics, joined
        self._lock = threading.Lock()
        self._view = NodeView()
        self.look()

    def look(self) -> NodeView:
        """Counts the ranks that live here; metrics follow."""
        with self._lock:
            phases, joined = tuple(record.phase for record in living(self._node_dir)), self._joined()
            self._view = self._view.seen(phases, self._clock.now(), self._idle_after_s, joined=joined)
            self._metrics.up.set(joined)
            for phase in RankPhase:
                self._metrics.ranks.labels(phase.value).set(phases.count(phase))
            return self._view

    def ready(self) -> bool:
        return self.look().ready

    def routes(self) -> Routes:
        """Beside the usual pages: /startedz."""
        return {"/startedz": self._started}

    def _started(self) -> Page:
        return Page(200, b"started\n") if self.look().started else Page(503, b"starting\n")
