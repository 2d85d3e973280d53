"""How the processes and reservations of a rank are named, so that whoever comes later can find them."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.domain.errors import ConfigError
from cluster.domain.ids import Incarnation, RankId, ReplicaId

RANK_VARIABLE = "LLM_CLUSTER_RANK"
# Two clusters of one name on one host are told apart by where they keep their state.
RUN_VARIABLE = "LLM_CLUSTER_RUN"
# The run directory of the node itself, where its ranks leave their records.
NODE_VARIABLE = "LLM_CLUSTER_NODE_DIR"


def rank_marker(cluster: str, rank_id: RankId) -> str:
    """Of a rank: CLUSTER/MODEL/SLOT#GENERATION.RANK."""
    return f"{cluster}/{rank_id}"


def parse_marker(marker: str) -> tuple[str, RankId] | None:
    """The inverse of ``rank_marker``; None for anything else."""
    cluster, slash, rest = marker.partition("/")
    replica, sharp, life = rest.rpartition("#")
    generation, dot, rank = life.partition(".")
    if not (cluster and slash and sharp and dot and generation.isdecimal() and rank.isdecimal()):
        return None
    try:
        parsed = ReplicaId.parse(replica)
    except ConfigError:
        return None
    return cluster, RankId(Incarnation(parsed, int(generation)), int(rank))


def group_name(cluster: str, incarnation: Incarnation) -> str:
    """Of the placement group."""
    return f"{cluster}/{incarnation}"


def parse_group_name(name: str) -> tuple[str, Incarnation] | None:
    parsed = parse_marker(f"{name}.0")
    return None if parsed is None else (parsed[0], parsed[1].incarnation)


@dataclass(frozen=True, slots=True)
class SweepOrder:
    """Whose remains to remove on one node: all marked processes of (cluster, run) except ``live`` incarnations.

    With ``only``, no incarnation but that one is touched. With ``newest``, none is touched that is newer than its
    slot's incarnation there: it may have been started after the order was written. An empty ``cluster`` means
    every cluster of the run. ``rank_ports``: first and last rendezvous port, which
    tell this cluster's shared-memory segments from others.
    """

    cluster: str
    run: str
    rank_ports: tuple[int, int]
    live: frozenset[Incarnation] = frozenset()
    only: Incarnation | None = None
    newest: frozenset[Incarnation] | None = None

    def condemns(self, rank_marker: str, run: str) -> bool:
        parsed = parse_marker(rank_marker)
        if parsed is None or parsed[0] != (self.cluster or parsed[0]) or run != self.run:
            return False
        return self.condemns_incarnation(parsed[1].incarnation)

    def condemns_incarnation(self, incarnation: Incarnation) -> bool:
        if self.only is not None:
            return incarnation == self.only
        if incarnation in self.live:
            return False
        return self.newest is None or any(
            last.replica == incarnation.replica and last.generation >= incarnation.generation for last in self.newest
        )


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep found. ``left``: processes that did not die in time."""

    killed: tuple[int, ...] = ()
    left: tuple[int, ...] = ()
    segments: tuple[str, ...] = ()
