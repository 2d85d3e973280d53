"""Removes a node's orphans: marked processes, and shared-memory segments that no process maps any more."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from cluster.config.process_identity import outlive
from cluster.controller.rank_marker import RANK_VARIABLE, RUN_VARIABLE, SweepOrder, Swept

KILL_DEADLINE_S = 5.0
# A segment that is just being made is not mapped yet for an instant.
SEGMENT_AGE_S = 3.0
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where shm_open puts its names on Linux
# deepspeed/ops/csrc/cpu/comm/shm.cpp: prefix, uid, MASTER_ADDR, MASTER_PORT, rank.
_SEGMENT = re.compile(r"deepspeed_allreduce_buffer_(\d+)_(.+)_(\d+)_(\d+)")


def sweep_node(order: SweepOrder) -> Swept:
    """Kills the condemned, waits until they are gone, unlinks their segments."""
    condemned = [process for process in psutil.process_iter() if _is_condemned(process, order)]
    theirs = set(_mapped_segments(process.pid for process in condemned))
    for process in condemned:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    left = outlive(condemned, KILL_DEADLINE_S)
    segments = _unlink_segments(order, theirs)
    return Swept(tuple(p.pid for p in condemned), tuple(p.pid for p in left), segments)


def _is_condemned(process: psutil.Process, order: SweepOrder) -> bool:
    try:
        environment = process.environ()
    except (psutil.Error, OSError):
        return False
    marker = environment.get(RANK_VARIABLE)
    return marker is not None and order.condemns(marker, environment.get(RUN_VARIABLE, ""))


def _unlink_segments(order: SweepOrder, theirs: set[str]) -> tuple[str, ...]:
    candidates = [name for name in _segments() if _is_ours(name, order.rank_ports)]
    if not candidates:
        return ()
    in_use = set(_mapped_segments(psutil.pids()))
    removed: list[str] = []
    for name in candidates:
        if name in in_use or not (name in theirs or _is_old(name)):
            continue
        (SHARED_MEMORY / name).unlink(missing_ok=True)
        removed.append(name)
    return tuple(removed)


def _segments() -> list[str]:
    try:
        return [entry.name for entry in SHARED_MEMORY.iterdir() if _SEGMENT.fullmatch(entry.name)]
    except OSError:
        return []


def _is_ours(name: str, ports: tuple[int, int]) -> bool:
    match = _SEGMENT.fullmatch(name)
    return match is not None and int(match[1]) == os.getuid() and ports[0] <= int(match[3]) <= ports[1]


def _is_old(name: str) -> bool:
    try:
        made_s = (SHARED_MEMORY / name).stat().st_mtime
    except OSError:
        return False
    # File times are wall time; nothing but this comparison looks at it.
    return time.time() - made_s > SEGMENT_AGE_S  # noqa: TID251


def _mapped_segments(pids: Iterable[int]) -> Iterable[str]:
    for pid in pids:
        try:
            maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        yield from (match[0] for match in _SEGMENT_IN_MAPS.finditer(maps))


_SEGMENT_IN_MAPS = re.compile(r"deepspeed_allreduce_buffer_\d+_[^\s/]+_\d+_\d+")
