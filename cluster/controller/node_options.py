"""How a machine joins a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """``address``: of the head; ``host``: of this machine, as others reach it. None: as Ray counts them.

    ``controller``: its Control address, for a worker that is to be in ``status``; empty: it is not told.
    """

    address: str
    host: str
    num_cpus: int | None = None
    num_gpus: int | None = None
    token_file: Path | None = None
    metrics_port: int = 9100
    idle_after_s: float = 60.0
    controller: str = ""
