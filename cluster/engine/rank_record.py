"""A small file per rank in its node's run directory: what the node's own probes need, without the controller."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.config.process_identity import find_process, started_s
from cluster.domain.replica import RankPhase
from cluster.engine.progress import RankProgress


@dataclass(frozen=True, slots=True)
class RankRecord:
    """One rank process: where it is in its life, and its ports by name. ``started_s``: tells reused ids apart."""

    rank: str
    pid: int
    started_s: float
    phase: RankPhase
    ports: Mapping[str, int]


def leave(node_dir: Path, rank: str, progress: RankProgress) -> None:
    """The calling process's record, in place of its last one. OSError when it cannot be written."""
    folder = _folder(node_dir)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    living(node_dir)  # removes what the dead left, so that it stays small
    pid = os.getpid()
    record = {
        "rank": rank,
        "pid": pid,
        "started_s": started_s(psutil.Process(pid)),
        "phase": progress.phase.value,
        "ports": dict(progress.ports),
    }
    draft = folder / f"{pid}.new"
    draft.write_text(json.dumps(record), encoding="utf-8")
    draft.replace(folder / f"{pid}.json")


def living(node_dir: Path) -> tuple[RankRecord, ...]:
    """Records of the ranks that run on this node; what dead ones left is removed."""
    found = []
    for file in sorted(_folder(node_dir).glob("*.json")):
        record = _read(file)
        if record is not None and find_process(record.pid, record.started_s) is not None:
            found.append(record)
        else:
            file.unlink(missing_ok=True)
    return tuple(found)


def _folder(node_dir: Path) -> Path:
    return node_dir / "ranks"


def _read(file: Path) -> RankRecord | None:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        ports = {str(name): int(port) for name, port in stored["ports"].items()}
        phase = RankPhase(stored["phase"])
        return RankRecord(str(stored["rank"]), int(stored["pid"]), float(stored["started_s"]), phase, ports)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # no file is replaced half-way, so this is nobody's
