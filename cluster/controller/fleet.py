"""The one owner of what is known about replicas: reports and life-cycle events in, frozen views out."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from cluster.config.schema import ControllerConfig
from cluster.controller.observed import (
    DrainingNode,
    Observed,
    RankView,
    ReplicaView,
    Report,
    SlotHistory,
    StaleIncarnation,
)
from cluster.controller.reconcile import after_failure
from cluster.controller.replica_lifecycle import ReplicaEvent, born
from cluster.domain.ids import Incarnation, RankId, ReplicaId
from cluster.domain.replica import ReplicaPhase

RETRY_S = 5.0
STALE_KEPT = 1024


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """What outlives the controller about a slot: its last generation and what that was built of."""

    generation: int
    fingerprint: str
    world_size: int


@dataclass(frozen=True, slots=True)
class Transition:
    """One step of one replica's life, for logs and metrics."""

    incarnation: Incarnation
    before: ReplicaPhase
    after: ReplicaPhase
    event: ReplicaEvent
    reason: str
    story: tuple[str, ...]


class Fleet:
    """All incarnations of all slots. Not for several threads: it belongs to the controller's event loop.

    ``slots`` are the durable records of an earlier life. ``on_transition`` hears of every phase change.
    """

    def __init__(
        self,
        settings: ControllerConfig,
        slots: Mapping[ReplicaId, SlotRecord],
        now_s: float,
        adopt_for_s: float = 0.0,
        on_transition: Callable[[Transition], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._records = dict(slots)
        self._history = {replica: SlotHistory(record.generation) for replica, record in slots.items()}
        self._views: dict[ReplicaId, ReplicaView] = {}
        self._stale: dict[Incarnation, StaleIncarnation] = {}
        self._streams: dict[RankId, object] = {}
        self._draining: dict[str, DrainingNode] = {}
        self._end_by_s = math.inf
        self._adopt_until_s = now_s + adopt_for_s
        self._on_transition = on_transition

    # ---- views ----

    def observed(self) -> Observed:
        return Observed(
            replicas=tuple(self._views[replica] for replica in sorted(self._views)),
            slots=dict(self._history),
            stale=tuple(self._stale.values()),
            adopt_until_s=self._adopt_until_s,
            draining=dict(self._draining),
        )

    def slots(self) -> dict[ReplicaId, SlotRecord]:
        """What the store must keep."""
        return dict(self._records)

    def view(self, incarnation: Incarnation) -> ReplicaView | None:
        view = self._views.get(incarnation.replica)
        return view if view is not None and view.incarnation == incarnation else None

    def live(self) -> frozenset[Incarnation]:
        """Incarnations whose processes must not be touched by a sweep."""
        return frozenset(view.incarnation for view in self._views.values() if not view.life.ended)

    # ---- life-cycle events ----

    def start(self, incarnation: Incarnation, fingerprint: str, world_size: int, reason: str, now_s: float) -> None:
        """A new incarnation is born; the caller has made its generation durable or does so before it acts."""
        replica = incarnation.replica
        assert replica not in self._views, f"{replica} has a live generation"
        last = self._history.get(replica, SlotHistory())
        assert incarnation.generation > last.generation, (incarnation, last)
        self._history[replica] = replace(last, generation=incarnation.generation)
        self._records[replica] = SlotRecord(incarnation.generation, fingerprint, world_size)
        life = born(incarnation, now_s, reason)
        self._views[replica] = ReplicaView(life, fingerprint, (None,) * world_size, now_s)

    def advance(
        self, incarnation: Incarnation, event: ReplicaEvent, reason: str, now_s: float, drain_s: float = 0.0
    ) -> None:
        """Applies ``event``; ignored when the incarnation is not its slot's current one any more, or has ended."""
        view = self.view(incarnation)
        if view is None or view.life.ended:
            return
        life = view.life.after(event, reason, now_s)
        view = replace(view, life=life, blocked="" if event is ReplicaEvent.PLACED else view.blocked)
        if event is ReplicaEvent.DRAIN:
            view = replace(view, drain_until_s=min(now_s + drain_s, self._end_by_s))
        if event is ReplicaEvent.READY:
            view = replace(view, ready_at_s=now_s)
        if event is ReplicaEvent.FAIL:
            self._remember_failure(view, now_s)
        before = self._views[incarnation.replica].phase
        self._views[incarnation.replica] = view
        self._on_transition(Transition(incarnation, before, life.phase, event, reason, life.story))

    def end_by(self, until_s: float) -> None:
        """What drains, and what will, has ended by then, whatever it was promised; asked again, the earlier counts."""
        self._end_by_s = min(self._end_by_s, until_s)
        for replica, view in self._views.items():
            if view.drain_until_s is not None:
                self._views[replica] = replace(view, drain_until_s=min(view.drain_until_s, self._end_by_s))

    def note_blocked(self, incarnation: Incarnation, reason: str) -> None:
        """Why a pending replica waits; empty when it waits no more."""
        view = self.view(incarnation)
        if view is not None and not view.life.ended:
            self._views[incarnation.replica] = replace(view, blocked=reason)

    def note_placed(self, incarnation: Incarnation, node_ids: frozenset[str]) -> None:
        """Where a replica is about to get its devices; nowhere when it lets go of them. Ended meanwhile, too."""
        view = self.view(incarnation)
        if view is not None:
            self._views[incarnation.replica] = replace(view, placed_on=node_ids)

    # ---- nodes that are about to go ----

    def drain_nodes(self, node_ids: Collection[str], host: str, until_s: float) -> None:
        """Nothing is placed there any more; asked again, the earlier deadline counts."""
        for node_id in node_ids:
            known = self._draining.get(node_id)
            earliest_s = until_s if known is None else min(until_s, known.until_s)
            self._draining[node_id] = DrainingNode(node_id, host, earliest_s)

    def keep_nodes(self, living: Collection[str]) -> None:
        """Forgets the draining nodes that have left the cluster: whoever comes back is another node."""
        self._draining = {node_id: node for node_id, node in self._draining.items() if node_id in living}

    def draining(self) -> dict[str, str]:
        """Address of every draining node by its id."""
        return {node_id: node.host for node_id, node in self._draining.items()}

    def removing(self, incarnation: Incarnation) -> None:
        view = self.view(incarnation)
        if view is not None:
            self._views[incarnation.replica] = replace(view, teardown=True)

    def removed(self, incarnation: Incarnation, now_s: float, *, gone: bool) -> None:
        """Nothing is left of it (or something is, and another attempt follows after a pause)."""
        stale = self._stale.get(incarnation)
        if stale is not None:
            if gone:
                del self._stale[incarnation]
            else:
                self._stale[incarnation] = replace(stale, retry_at_s=now_s + RETRY_S)
        view = self.view(incarnation)
        if view is None or not view.life.ended:
            return
        if gone:
            del self._views[incarnation.replica]
            for rank in range(len(view.ranks)):
                self._streams.pop(RankId(incarnation, rank), None)
        else:
            self._views[incarnation.replica] = replace(view, teardown=False, retry_at_s=now_s + RETRY_S)

    def fencing(self, incarnation: Incarnation, now_s: float) -> None:
        """Somebody is killing a stale incarnation; no second attempt before a pause."""
        stale = self._stale.get(incarnation)
        if stale is not None:
            self._stale[incarnation] = replace(stale, retry_at_s=now_s + 2 * RETRY_S)

    def _remember_failure(self, view: ReplicaView, now_s: float) -> None:
        ready_for_s = None if view.ready_at_s is None else now_s - view.ready_at_s
        history = self._history.get(view.replica, SlotHistory(view.incarnation.generation))
        self._history[view.replica] = after_failure(
            history, ready_for_s, self._settings, now_s,
            fingerprint=view.fingerprint, needs_change=view.needs_change, cause=view.life.reason,
        )  # fmt: skip

    def end_pauses(self, models: Collection[str]) -> None:
        """Somebody says what is wanted, perhaps once more: files may be mended, so nothing waits out a failure."""
        for replica, history in self._history.items():
            if replica.model in models:
                self._history[replica] = replace(history, start_after_s=0.0)

    # ---- reports ----

    def report(self, report: Report, stream: object, now_s: float) -> None:
        """Takes one report in. ``stream`` identifies the connection it came on: the latest one counts."""
        incarnation = report.rank_id.incarnation
        if self.view(incarnation) is None and not self._adopt(incarnation, now_s):
            self._fence(report)
            return
        view = self._views[incarnation.replica]
        rank = report.rank_id.rank
        if view.life.ended or rank >= len(view.ranks):
            return
        self._streams[report.rank_id] = stream
        last = view.ranks[rank]
        moved = last is None or _progress(last.report) != _progress(report)
        fresh = RankView(report, now_s, now_s if moved or last is None else last.progress_at_s)
        self._views[incarnation.replica] = replace(view, ranks=(*view.ranks[:rank], fresh, *view.ranks[rank + 1 :]))

    def stream_broken(self, rank_id: RankId, stream: object) -> bool:
        """The connection of a rank ended; False when that was an older one, or nobody's."""
        if rank_id not in self._streams or self._streams[rank_id] != stream:
            return False
        del self._streams[rank_id]
        view = self.view(rank_id.incarnation)
        last = view.ranks[rank_id.rank] if view is not None else None
        if view is None or last is None or view.life.ended:
            return False
        broken = replace(last, connected=False)
        ranks = (*view.ranks[: rank_id.rank], broken, *view.ranks[rank_id.rank + 1 :])
        self._views[rank_id.incarnation.replica] = replace(view, ranks=ranks)
        return True

    def _adopt(self, incarnation: Incarnation, now_s: float) -> bool:
        """Takes over a replica of an earlier life of the controller, if it is its slot's last generation."""
        record = self._records.get(incarnation.replica)
        if record is None or record.generation != incarnation.generation or now_s > self._adopt_until_s:
            return False
        if incarnation.replica in self._views:
            return False
        life = born(incarnation, now_s, "its ranks reported to a restarted controller")
        ranks = (None,) * record.world_size
        self._views[incarnation.replica] = ReplicaView(life, record.fingerprint, ranks, now_s, adopted=True)
        self.advance(incarnation, ReplicaEvent.ADOPTED, "adopted", now_s)
        return True

    def _fence(self, report: Report) -> None:
        incarnation = report.rank_id.incarnation
        known = self._stale.get(incarnation)
        if known is None and len(self._stale) >= STALE_KEPT:
            return  # their streams go on, so they come back when there is room
        world_size = max(report.rank_id.rank + 1, known.world_size if known else 1)
        record = self._records.get(incarnation.replica)
        if record is not None and record.generation == incarnation.generation:
            world_size = max(world_size, record.world_size)
        self._stale[incarnation] = StaleIncarnation(incarnation, world_size, known.retry_at_s if known else 0.0)


def _progress(report: Report) -> tuple[object, ...]:
    return (report.phase, report.bytes_loaded, report.step)
