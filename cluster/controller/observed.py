"""What is: a frozen view of every replica and rank, made of their reports."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from cluster.controller.replica_lifecycle import Lifecycle
from cluster.domain.ids import Incarnation, RankId, ReplicaId
from cluster.domain.replica import RankPhase, ReplicaPhase


@dataclass(frozen=True, slots=True)
class RankActivity:
    """What the leader has in hand."""

    running_sequences: int = 0
    waiting_sequences: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0

    @property
    def idle(self) -> bool:
        return self.running_sequences == 0 and self.waiting_sequences == 0


@dataclass(frozen=True, slots=True)
class Report:
    """One report of one rank. ``step_age_s``: 0 when idle. ``ports``: engine (leader only), metrics.

    ``waits_for_peer``: its own share of the step is done, or it failed for want of another rank. ``needs_change``: it
    failed over its model's files or its options, so that starting it again changes nothing.
    """

    rank_id: RankId
    pid: int
    node_id: str
    host: str
    device: str
    phase: RankPhase
    step: int = 0
    step_age_s: float = 0.0
    compute_s: float = 0.0
    bytes_loaded: int = 0
    bytes_total: int = 0
    ports: Mapping[str, int] = field(default_factory=dict)
    failure: str = ""
    log_file: str = ""
    peak_host_bytes: int = 0
    activity: RankActivity = RankActivity()
    checkpoint_digest: str = ""
    block_size: int = 0
    waits_for_peer: bool = False
    needs_change: bool = False


@dataclass(frozen=True, slots=True)
class RankView:
    """A rank's last report, when it came, when it last made progress, and whether its stream is open."""

    report: Report
    reported_at_s: float
    progress_at_s: float
    connected: bool = True

    def where(self) -> str:
        r = self.report
        return f"rank {r.rank_id.rank} on {r.host or r.node_id} ({r.device}, pid {r.pid})"


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One incarnation. ``teardown``: whether somebody is removing its remains, or nothing is left of it.

    ``retry_at_s``: no earlier attempt to remove its remains. ``placed_on``: Ray's ids of the nodes it was given.
    """

    life: Lifecycle
    fingerprint: str
    ranks: tuple[RankView | None, ...]
    born_s: float
    adopted: bool = False
    ready_at_s: float | None = None
    drain_until_s: float | None = None
    teardown: bool = False
    retry_at_s: float = 0.0
    blocked: str = ""
    placed_on: frozenset[str] = frozenset()

    @property
    def node_ids(self) -> frozenset[str]:
        """Where it has ranks, or is about to: as placed, and as its ranks report (an adopted one was placed before)."""
        return self.placed_on | {rank.report.node_id for rank in self.ranks if rank is not None}

    @property
    def needs_change(self) -> bool:
        """Whether a rank failed over what it was given."""
        return any(rank is not None and rank.report.needs_change for rank in self.ranks)

    @property
    def half_known(self) -> bool:
        """Whether ranks of an earlier controller's replica are still to report: it may serve, anywhere."""
        return self.adopted and None in self.ranks

    @property
    def incarnation(self) -> Incarnation:
        return self.life.incarnation

    @property
    def replica(self) -> ReplicaId:
        return self.life.incarnation.replica

    @property
    def phase(self) -> ReplicaPhase:
        return self.life.phase

    @property
    def leader(self) -> RankView | None:
        return self.ranks[0]

    @property
    def engine_address(self) -> str:
        """HOST:PORT of the leader's Engine service; empty until it has told."""
        if self.leader is None or "engine" not in self.leader.report.ports:
            return ""
        return f"{self.leader.report.host}:{self.leader.report.ports['engine']}"


@dataclass(frozen=True, slots=True)
class SlotHistory:
    """What a slot remembers of its incarnations: the last generation and how often in a row they failed.

    ``fingerprint``: what those were built of; the pause until ``start_after_s`` is for the like of them. ``cause``: of
    the last failure, for people: the failed incarnation itself leaves as soon as nothing is left of it.
    """

    generation: int = 0
    failures: int = 0
    start_after_s: float = 0.0
    fingerprint: str = ""
    cause: str = ""

    def pauses(self, fingerprint: str, now_s: float) -> bool:
        """Whether nothing that is built of the same may start yet; mended options wait for nothing."""
        return now_s < self.start_after_s and fingerprint == self.fingerprint


@dataclass(frozen=True, slots=True)
class StaleIncarnation:
    """Ranks that report an incarnation which is not their slot's: fenced out, to be killed."""

    incarnation: Incarnation
    world_size: int
    retry_at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DrainingNode:
    """A node where nothing is placed any more. ``until_s``: its replicas' streams have ended or are cut by then."""

    node_id: str
    host: str
    until_s: float


@dataclass(frozen=True, slots=True)
class Observed:
    """The whole view. Until ``adopt_until_s`` nothing is started: ranks of an earlier controller may report.

    ``draining``: by node id.
    """

    replicas: tuple[ReplicaView, ...] = ()
    slots: Mapping[ReplicaId, SlotHistory] = field(default_factory=dict)
    stale: tuple[StaleIncarnation, ...] = ()
    adopt_until_s: float = 0.0
    draining: Mapping[str, DrainingNode] = field(default_factory=dict)

    def on_nodes(self, node_ids: Collection[str]) -> tuple[ReplicaView, ...]:
        """Replicas of which something is or may be on one of the nodes."""
        return tuple(v for v in self.replicas if v.half_known or not v.node_ids.isdisjoint(node_ids))

    def leaving(self, view: ReplicaView) -> tuple[DrainingNode, ...]:
        """Those of its nodes that are draining, the most urgent first."""
        nodes = [self.draining[node_id] for node_id in view.node_ids if node_id in self.draining]
        return tuple(sorted(nodes, key=lambda node: (node.until_s, node.host)))

    def of_model(self, name: str) -> tuple[ReplicaView, ...]:
        return tuple(view for view in self.replicas if view.replica.model == name)
