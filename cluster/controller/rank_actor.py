"""The Ray actor around one rank process: it checks its host, starts the rank, and dies with its raylet."""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import threading
from collections.abc import Callable

from cluster.config.listening import can_listen
from cluster.controller.rank_marker import NODE_VARIABLE
from cluster.controller.rank_specs import HostFacts
from cluster.engine import shm_kernel
from cluster.engine.rank_spec import RankSpec

RANK_ENTRY = "cluster.engine.rank:start_rank"
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """SIGKILL when the process that started this one ends; at once when it has ended already.

    The kernel ties the signal to the parent's thread that forked; a raylet forks from its main thread.
    """
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


class RankActor:
    """Small on purpose: once a rank runs, nothing asks its actor for anything."""

    def __init__(self) -> None:
        die_with_parent()

    def prepare(self, bind_host: str, candidates: tuple[int, ...]) -> HostFacts:
        """Which of ``candidates`` can be listened on here."""
        free = tuple(port for port in candidates if can_listen(bind_host, port))
        cores, node_dir = len(os.sched_getaffinity(0)), os.environ.get(NODE_VARIABLE, "")
        return HostFacts(os.getpid(), cores, free, shm_kernel.is_built(), node_dir)

    def launch(self, spec: RankSpec, entry: str = RANK_ENTRY) -> int:
        """Starts the rank's threads and returns the process id."""
        module, _, name = entry.partition(":")
        start: Callable[[RankSpec], None] = getattr(importlib.import_module(module), name)
        start(spec)
        return os.getpid()

    def hold(self) -> None:
        """Never answers: its pending result is how the controller hears from Ray that the process ended."""
        threading.Event().wait()
