"""Phases of a replica and of a rank, as everybody names them."""

from __future__ import annotations

import enum


class ReplicaPhase(enum.StrEnum):
    """PENDING -> STARTING -> LOADING -> READY -> DRAINING -> STOPPED; FAILED from any."""

    PENDING = "PENDING"
    STARTING = "STARTING"
    LOADING = "LOADING"
    READY = "READY"
    DRAINING = "DRAINING"
    STOPPED = "STOPPED"
    FAILED = "FAILED"


class RankPhase(enum.StrEnum):
    """What one process of a replica is doing."""

    STARTING = "STARTING"
    LOADING = "LOADING"
    WARMING_UP = "WARMING_UP"
    READY = "READY"
    FAILED = "FAILED"
